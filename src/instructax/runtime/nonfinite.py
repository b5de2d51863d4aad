"""Non-finite gradients: keep skipped batches, and abort after too many in a row.

The update itself is skipped inside the compiled program (`training.optimizer`). Neither is
in the paper.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.runtime.files import open_no_follow

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Training produced non-finite numbers; the last checkpoint is from before."""


@jax.jit
def all_finite(state: Any) -> jax.Array:
    """Whether every floating-point number of the state is finite: b[]."""
    finite = []
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            finite.append(jnp.all(jnp.isfinite(leaf)))
    return jnp.all(jnp.stack(finite))


class NonFiniteGuard:
    """Watches for skipped updates, stores their batches, and ends a diverging run.

    The metrics of an update are read when the next one has been dispatched, so the devices
    never wait for the host.

    Args:
      max_skipped: how many updates in a row may be skipped.
      folder: where the batches of skipped updates go, as `<step>-<process>.npz`.
    """

    def __init__(self, max_skipped: int, folder: Path):
        self._max_skipped = max_skipped
        self._folder = folder
        self._pending: tuple[int, Any, Any] | None = None  # step, batch, skipped
        self._skipped_in_a_row = 0

    def observe(self, step: int, batch: Any, metrics: dict[str, Any]) -> None:
        """Checks the previous update, and keeps this one. Raises Diverged."""
        self.check()
        self._pending = (step, batch, metrics.get("skipped", 0.0))

    def check(self) -> None:
        """Checks the update that was observed last. Raises Diverged."""
        if self._pending is None:
            return
        step, batch, skipped = self._pending
        self._pending = None
        # Reading the value waits for the device. It is the fraction of skipped optimizer
        # steps.
        if not float(skipped):
            self._skipped_in_a_row = 0
            return

        self._skipped_in_a_row += 1
        path = self._folder / f"{step}-{jax.process_index()}.npz"
        # The batch of the update that ends the run is only kept if no other is.
        if self._skipped_in_a_row <= max(self._max_skipped, 1):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open_no_follow(path, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **_local_arrays(batch))
        if self._skipped_in_a_row > self._max_skipped:
            raise Diverged(
                f"gradients were not finite in {self._skipped_in_a_row} updates in a row, "
                f"up to step {step}; the first of their batches are in {self._folder}. "
                "The same command repeats it from the last checkpoint; lower the learning "
                "rate"
            )
        logger.warning(
            "step %d: gradients are not finite, the update is skipped; its batch: %s",
            step,
            path,
        )


def _local_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The rows of a batch that are on this process, by path."""

    def local(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        # Devices of one `tensor` group hold the same rows: keep one shard per index.
        shards = {str(shard.index): shard for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(shard.data) for shard in shards.values()])

    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        arrays[name] = local(leaf)
    return arrays
