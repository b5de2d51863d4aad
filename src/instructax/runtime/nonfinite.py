"""Numbers that are none: updates that are skipped, and the end of a run that has nothing
else left."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructax.runtime.files import open_no_follow

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """What was computed is no longer a number; the last checkpoint is of before."""


class NonFiniteGuard:
    """Notes the updates that were skipped for gradients that are not finite, each with its
    batch, and ends a run that skips too many in a row.

    The figures of an update are looked at when the next one is under way, so that the
    devices never wait.

    Args:
      most: how many updates in a row may be skipped.
      folder: where the batches of the first of them go, `<step>-<process>.npz`.
    """

    def __init__(self, most: int, folder: Path):
        self._most, self._folder = most, folder
        self._last: tuple[int, Any, Any] | None = None
        self._row = 0

    def observe(self, step: int, batch: Any, metrics: dict[str, Any]) -> None:
        """Looks at the update before, and keeps this one. Raises Diverged."""
        self.check()
        self._last = step, batch, metrics.get("skipped", 0.0)

    def check(self) -> None:
        """Looks at the last update. Raises Diverged."""
        if self._last is None:
            return
        (step, batch, skipped), self._last = self._last, None
        if not float(skipped):
            self._row = 0
            return
        self._row += 1
        path = self._folder / f"{step}-{jax.process_index()}.npz"
        if self._row <= max(
            self._most, 1
        ):  # of a row too long, the last batch is not needed
            self._folder.mkdir(parents=True, exist_ok=True)
            with open_no_follow(path, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **_local_arrays(batch))
        if self._row <= self._most:
            logger.warning(
                "step %d: gradients are not finite, the update is skipped; its batch: %s",
                step,
                path,
            )
            return
        raise Diverged(
            f"gradients were not finite in {self._row} updates in a row, up to step {step}; the first of their batches "
            f"are in {self._folder}. The same command repeats it from the last checkpoint; lower the learning rate"
        )


def _local_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The rows of a batch that this process has, by path."""

    def local(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        shards = {str(shard.index): shard for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(shard.data) for shard in shards.values()])

    return {
        jax.tree_util.keystr(path, simple=True, separator="."): local(x)
        for path, x in jax.tree.leaves_with_path(tree)
    }
