"""Reads saved steps, after comparing their files with the checksums.

In a run of several processes, all of them must call these functions.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from instructax.checkpoints.checksums import find_damage, has_checksums
from instructax.checkpoints.steps import ITEMS, committed_steps
from instructax.config import ConfigError
from instructax.runtime.distributed import all_hosts
from instructax.types import Params

logger = logging.getLogger(__name__)


class CheckpointMismatch(ConfigError):
    """The stored leaves differ from those requested; the message names the first one."""


def load_params(path: Path, abstract_params: Params, *, step: int) -> Params:
    """Loads the parameters of a run, directly into the reader's mesh.

    Args:
      path: the workdir of the run.
      abstract_params: jax.ShapeDtypeStruct leaves with shardings; the parameters are
        cast to their dtypes.
      step: which step to load.

    Raises:
      CheckpointMismatch: a leaf is missing, unexpected or has another shape.
      ConfigError: there is no such step, or a file differs from its checksum.
    """
    # Orbax accepts absolute paths only.
    path = Path(path).absolute()
    # A run that is still writing has steps as well; only committed ones count.
    steps = committed_steps(path)
    if step not in steps:
        raise ConfigError(
            f"no checkpoint of step {step} in {path}, only of steps {steps}: run that "
            "stage first, or give its workdir"
        )
    step_path = path / "checkpoints" / str(step)
    # One item is read: the optimizer state, often twice as large, stays on disk.
    abstract = {"params": abstract_params}
    _refuse_damage(step_path, abstract)
    # Parents may be stored in another dtype than the reader computes in.
    return load_items(step_path, abstract, cast=True)["params"]


def read_arrays(step_path: Path) -> dict[str, jax.Array]:
    """Reads every array of a step, as it is stored, into host memory.

    Returns:
      Name, such as `params/blocks/mlp/up/bias`, → array.

    Raises:
      ConfigError: the step is damaged or cannot be read.
    """
    step_path = Path(step_path).absolute()
    _refuse_damage(step_path, ITEMS)
    # The arrays may not fit on an accelerator, and the reader wants them in memory.
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    # Shapes and dtypes only; no array is read yet.
    metadata = ocp.checkpointables_metadata(str(step_path)).metadata
    stored = {item: metadata[item] for item in ITEMS}

    def on_host(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)

    abstract = jax.tree.map(on_host, stored)
    return _leaves(ocp.load_checkpointables(str(step_path), abstract))


def _refuse_damage(step_path: Path, items: Iterable[str]) -> None:
    if problem := find_problem(step_path, items):
        raise ConfigError(
            f"checkpoint is damaged: {problem}; use another step or a copy of it"
        )


def find_problem(step_path: Path, items: Iterable[str]) -> str:
    """Why the `items` of a step cannot be used; "" if they can.

    Collective: the result is empty on all processes or on none.
    """
    return _checksum_problem(step_path) or _unreadable_item(step_path, items)


def _checksum_problem(step_path: Path) -> str:
    """The first difference from the checksums of a step; "" if there is none."""
    problem = ""
    # Hashing reads every byte: once is enough, and the result is shared.
    if jax.process_index() == 0:
        damage = find_damage(step_path)
        if not has_checksums(step_path) and not damage:
            logger.warning(
                "%s has no hashes (the run was killed before it wrote them): loading it "
                "unchecked",
                step_path,
            )
        problem = damage[0] if damage else ""
    if all_hosts(not problem):
        return ""
    # The other processes know that there is a problem, but not its text.
    return problem or f"{step_path}, as process 0 reports"


def _unreadable_item(step_path: Path, items: Iterable[str]) -> str:
    """The first item of a step that cannot be read; "" if all can.

    Detects folders that look like a step but have no checksums.
    """
    # Each process looks for itself: one of them may see another state of the file system.
    unreadable = []
    try:
        stored = ocp.checkpointables_metadata(str(step_path)).metadata
        for item in items:
            # Orbax has logged the reason.
            if stored[item] is None:
                unreadable.append(item)
    except (OSError, ValueError, KeyError) as error:
        unreadable = [f"({error})"]
    if all_hosts(not unreadable):
        return ""
    if unreadable:
        return f"{step_path / unreadable[0]} cannot be read"
    return f"{step_path}, as another process reports"


def load_items(step_path: Path, abstract: dict[str, Any], *, cast: bool) -> dict[str, Any]:
    """Loads items of a step into the shapes and shardings of `abstract`.

    Args:
      step_path: the folder of the step.
      abstract: item → tree of jax.ShapeDtypeStruct.
      cast: whether floating-point leaves may be stored in another dtype.

    Raises:
      CheckpointMismatch: the stored leaves are not those of `abstract`.
    """
    # Before reading: Orbax' own error would not name the leaf.
    stored = ocp.checkpointables_metadata(str(step_path)).metadata
    for item, tree in abstract.items():
        _check_leaves(step_path / item, _leaves(stored[item]), _leaves(tree), cast)
    return ocp.load_checkpointables(str(step_path), abstract)


def _leaves(tree: Any) -> dict[str, Any]:
    """Path → leaf.

    Paths are the same for a dataclass or named tuple and for the dict that Orbax stores.
    """
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        # As in `sharding.leaf_path`: `blocks/mlp/up/kernel`.
        leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    return leaves


def _check_leaves(
    where: Path, stored: dict[str, Any], wanted: dict[str, Any], cast: bool
) -> None:
    """Raises CheckpointMismatch at the first leaf that differs in dtype or shape."""
    # Stored leaves first, then those that are only wanted; a dict keeps the order.
    for name in {**stored, **wanted}:
        have = stored.get(name)
        want = wanted.get(name)
        if _describe(have, any_float=cast) != _describe(want, any_float=cast):
            raise CheckpointMismatch(
                f"leaf {name} is {_describe(have)} in {where}, but {_describe(want)} in "
                "this run: compare the model and the optimizer of the two configs"
            )


def _describe(leaf: Any, *, any_float: bool = False) -> str:
    """Such as `float32[8, 16]`; with `any_float` all floating dtypes look the same."""
    # The shape with its dtype, as JAX prints it.
    if leaf is None:
        return "absent"
    if any_float and jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"floating{list(leaf.shape)}"
    return f"{leaf.dtype}{list(leaf.shape)}"
