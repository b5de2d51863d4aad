"""Saves and restores the state of a run, and hands its parameters to the next stage.

A step lies in `workdir/checkpoints/<step>` as two items: `params`, the field that the next
stage reads, and `state`, the rest, so that nothing is stored twice. Orbax commits a step by
renaming its folder: a killed save leaves nothing that looks like one. But its data files
carry no checksum, and a flipped bit would load as a wrong number. Hence
`<step>.sha256.json` (`integrity`) beside each committed step, checked before every load. A
step without hashes, which is what a process killed between commit and hashing leaves, is
loaded with a warning, and hashed then.

In a run of several processes all of them call every function, the folder is one that all of
them see, and process 0 alone hashes, deletes and writes JSON.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from instructax.checkpoints.checksums import (
    FORMAT,
    digests,
    find_damage,
    has_checksums,
    read_record,
    record_path,
)
from instructax.config import ConfigError
from instructax.runtime.distributed import all_hosts
from instructax.runtime.files import write_json
from instructax.runtime.nonfinite import Diverged
from instructax.types import Params

logger = logging.getLogger(__name__)

ITEMS = ("params", "state")


class CheckpointMismatch(ConfigError):
    """The stored leaves are not those asked for; the message names the first such leaf."""


def committed_steps(workdir: Path) -> list[int]:
    """The steps that can be read, in rising order; stray folders and unfinished saves are
    not among them."""
    root = Path(workdir) / "checkpoints"
    # `0099` and digits of other scripts are numbers for `int`, but no names that a step is
    # saved under.
    found = (
        [path for path in root.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)]
        if root.is_dir()
        else []
    )
    return sorted(
        int(path.name) for path in found if all((path / item).is_dir() for item in ITEMS)
    )


def files_hash(workdir: Path, step: int) -> str:
    """One sha256 for all files of a step; "" if their hashes were never written."""
    files = (read_record(Path(workdir) / "checkpoints" / str(step)) or {"files": None})[
        "files"
    ]
    return (
        hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        if files
        else ""
    )


def best_step(workdir: Path) -> int | None:
    """The newest step among those with the best value of the metric that the newest step
    names; None if it names none.

    The highest value is the best, of a metric whose name ends in "loss" the lowest.
    """
    root, steps = Path(workdir) / "checkpoints", committed_steps(workdir)
    stored = {
        step: read_record(root / str(step)) or {"best_metric": "", "metric": None}
        for step in steps
    }
    name = stored[steps[-1]]["best_metric"] if steps else ""
    sign = -1 if name.endswith("loss") else 1
    rated = {
        s: sign * x["metric"]
        for s, x in stored.items()
        if x["best_metric"] == name and x["metric"] is not None
    }
    return max(rated, key=lambda step: (rated[step], step), default=None)


class Checkpoints:
    """The checkpoints of the one run that writes to `workdir`; what other programs read
    goes through `load_params`.

    Args:
      save_every: steps between two saves by `maybe_save`.
      keep: how many of the newest steps stay.
      best_metric: the name of a metric whose best step (see `best_step`) stays as well; "" for none.
      exported: the field of the state that the next stage reads: "params" of TrainState, "ema" of PpoState.
    """

    def __init__(
        self, workdir: Path, *, save_every: int, keep: int, best_metric: str, exported: str
    ):
        for name, value in (("save_every", save_every), ("keep", keep)):
            if value < 1:
                raise ConfigError(
                    f"{name} is {value}; it must be at least 1: set it in the config of the run"
                )
        self._workdir, self._root = Path(workdir), Path(workdir).absolute() / "checkpoints"
        self._save_every, self._keep = save_every, keep
        self._best_metric, self._exported = best_metric, exported
        self._saved: int | None = None  # the step that this object last saved or restored
        self.unevaluated: dict[str, Any] | None = (
            None  # the metrics of a restored step whose evaluation was given up
        )
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        if jax.process_index() == 0:
            self._root.mkdir(parents=True, exist_ok=True)
            for path in (
                *self._root.glob("*.orbax-checkpoint-tmp*"),
                *self._root.glob("*.deleted"),
            ):
                _delete(path)
            for path in self._root.glob("*.sha256.json"):
                if not path.with_name(path.name.partition(".")[0]).exists():
                    path.unlink()  # of a save that was killed

    def steps(self) -> list[int]:
        """The committed steps, in rising order."""
        return committed_steps(self._workdir)

    def due(self, step: int) -> bool:
        """Whether `maybe_save` would save `step`: whether it is a multiple of `save_every`."""
        return step % self._save_every == 0

    def maybe_save(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Starts a save if one is due. Raises what a finished save failed with."""
        if self._pending is not None and self._pending[1].done():
            self.wait()
        if self.due(step):
            self.save(step, state, metrics)

    def save(
        self, step: int, state: Any, metrics: Mapping[str, Any], *, evaluated: bool = True
    ) -> None:
        """Starts a save once the one before has ended; does nothing if `step` is saved
        already.

        If the step is not `evaluated`, its metrics are kept for the run that goes on from
        it: `unevaluated`. Returns when the arrays have been copied from the devices, so the
        caller may donate `state` at once; writing, hashing and deleting old steps go on in
        the background. Raises what the save before failed with, and Diverged for a state
        that is not finite.
        """
        self.wait()
        if step == self._saved:
            return
        if not all_finite(state):
            raise Diverged(
                f"the state of step {step} is not finite, nothing of it is saved: lower the learning rate"
            )
        note = {"unevaluated": None if evaluated else jax.device_get(dict(metrics))}
        note |= (
            self._rating(step, metrics)
            if evaluated
            else {"best_metric": self._best_metric, "metric": None}
        )
        if jax.process_index() == 0:
            write_json(
                record_path(self._root / str(step)),
                {"format": FORMAT, **note, "files": None},
            )
        items = {
            "params": getattr(state, self._exported),
            "state": dataclasses.replace(state, **{self._exported: None}),
        }
        context = ocp.Context()
        # A folder that cannot be made then fails here; else Orbax's threads wait 20 minutes
        # for it, even at exit.
        context.async_options.create_directories_asynchronously = False
        with context:
            response = ocp.save_checkpointables_async(
                str(self._root / str(step)), items, overwrite=True
            )
        self._pending = step, self._thread.submit(self._finish, step, response, note)

    def _rating(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        if self._best_metric and self._best_metric not in metrics:
            logger.warning(
                "step %d cannot become the best checkpoint: best_metric %r is not among its metrics (%s)",
                *(step, self._best_metric, ", ".join(sorted(metrics))),
            )
        metric = float(metrics[self._best_metric]) if self._best_metric in metrics else None
        return {"best_metric": self._best_metric, "metric": metric}

    def mark_evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Notes at the restored step, which was `unevaluated`, that it now is evaluated."""
        self.unevaluated = None
        if jax.process_index() == 0 and self._saved is not None:
            path = self._root / str(self._saved)
            rating = self._rating(self._saved, metrics)
            write_json(
                record_path(path),
                {**(read_record(path) or {}), **rating, "unevaluated": None},
            )

    def _finish(
        self, step: int, response: ocp.AsyncResponse[None], note: dict[str, Any]
    ) -> None:
        """Waits for the commit, then hashes the step and deletes the steps that need not
        stay."""
        try:
            response.result()
        except ValueError as error:  # TensorStore's, of what the system refused
            reason = " ".join(str(error).split())
            raise OSError(
                f"the checkpoint of step {step} cannot be written ({reason}); the steps before it are whole: "
                "make room and start again"
            ) from error
        self._settle(step, note)

    def _settle(self, step: int, note: Mapping[str, Any]) -> None:
        if jax.process_index() > 0:
            return
        path = self._root / str(step)
        write_json(record_path(path), {"format": FORMAT, **note, **digests(path)})
        # Steps after this one are not of this run, and one that was not hashed does not
        # take the place of one that was.
        steps = [old for old in self.steps() if old <= step]
        staying = [old for old in steps if has_checksums(self._root / str(old))][
            -self._keep :
        ]
        for old in set(steps) - set(staying) - {best_step(self._workdir)}:
            remains = (self._root / str(old)).rename(
                self._root / f"{old}.deleted"
            )  # at once no longer a step
            record_path(self._root / str(old)).unlink(missing_ok=True)
            _delete(remains)

    def wait(self) -> None:
        """Blocks until the save under way is committed and hashed; raises what it failed
        with."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        future.result()
        self._saved = step

    def close(self) -> None:
        """`wait`, and no more saves after."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self, abstract_state: Any) -> tuple[Any, int] | None:
        """The newest undamaged step, straight into the shardings of `abstract_state`; None
        if nothing was ever saved.

        Damaged newer steps, and folders that only look like steps, are reported and set
        aside as `<step>.damaged`.

        Args:
          abstract_state: the state with jax.ShapeDtypeStruct leaves that have shardings, of any mesh.

        Raises:
          CheckpointMismatch: a leaf is missing, extra, or of another shape or dtype.
          FromTheFuture: a newer version of this program has written it.
          ValueError: every step is damaged.
        """
        self.wait()
        exported = getattr(abstract_state, self._exported)
        abstract = {
            "params": exported,
            "state": dataclasses.replace(abstract_state, **{self._exported: None}),
        }
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = _damage(self._root / str(step)) or _unreadable(
                self._root / str(step), abstract
            )
            if damage:
                damaged[step] = damage
                continue
            items = _load(self._root / str(step), abstract, cast=False)
            for newer, reason in damaged.items():
                logger.warning(
                    "checkpoint %d IS DAMAGED and set aside, going on from %d: %s",
                    newer,
                    step,
                    reason,
                )
                self._set_aside(newer)
            self._saved = step
            record = read_record(self._root / str(step)) or {
                "best_metric": self._best_metric,
                "metric": None,
            }
            self.unevaluated = record.get("unevaluated")
            if not record.get("files"):
                self._settle(step, record)
            return dataclasses.replace(
                items["state"], **{self._exported: items["params"]}
            ), step
        if damaged:
            raise ConfigError(
                f"every checkpoint is damaged; restore a copy of {self._root}: {'; '.join(damaged.values())}"
            )
        return None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._root / f"{step}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            (self._root / str(step)).rename(target)
            record_path(self._root / str(step)).unlink(missing_ok=True)


def _delete(path: Path) -> None:
    """Deletes a folder; of a symbolic link itself alone, and nothing of where it leads."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


@jax.jit
def all_finite(state: Any) -> jax.Array:
    """Whether every number of the state is finite: b[]."""
    floating = (
        leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floating]))


def load_params(path: Path, abstract_params: Params, *, step: int | None = None) -> Params:
    """The parameters of a finished run, straight into the reader's mesh, cast to the dtypes
    of `abstract_params`.

    Args:
      path: the workdir of a run.
      abstract_params: jax.ShapeDtypeStruct leaves with shardings.
      step: which step of the workdir; None means the newest.

    Raises:
      CheckpointMismatch: a leaf is missing, extra or of another shape.
      ValueError: no such step, or a file that differs from its hash.
    """
    path = Path(path).absolute()
    steps = committed_steps(path)
    if not steps or step not in (None, *steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise ConfigError(
            f"{wanted} in {path}, only of steps {steps}: run that stage first, or give its workdir"
        )
    path = path / "checkpoints" / str(steps[-1] if step is None else step)
    abstract = {"params": abstract_params}
    if damage := _damage(path) or _unreadable(path, abstract):
        raise ConfigError(
            f"checkpoint is damaged: {damage}; use another step or a copy of it"
        )
    return _load(path, abstract, cast=True)["params"]


def read_arrays(step: Path) -> dict[str, jax.Array]:
    """Every array of the step in the folder `step`, as it is stored, on the host: names as
    `params/blocks/bias`.

    Raises ValueError for a step that is damaged or cannot be read.
    """
    step = Path(step).absolute()
    if damage := _damage(step) or _unreadable(step, ITEMS):
        raise ConfigError(
            f"checkpoint is damaged: {damage}; use another step or a copy of it"
        )
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    metadata = ocp.checkpointables_metadata(str(step)).metadata
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host),
        {item: metadata[item] for item in ITEMS},
    )
    return _leaves(ocp.load_checkpointables(str(step), abstract))


def _unreadable(path: Path, items: Iterable[str]) -> str:
    """Which item of a step cannot be read, "" if all can: what is no step but looks like
    one has no hashes to differ from. The same on every process."""
    try:
        stored = ocp.checkpointables_metadata(str(path)).metadata
        missing = [item for item in items if stored[item] is None]  # Orbax has logged why
    except (OSError, ValueError, KeyError) as error:
        missing, stored = [f"({error})"], {}
    if all_hosts(not missing):
        return ""
    return (
        f"{path / missing[0]} cannot be read"
        if missing
        else f"{path}, as another process reports"
    )


def _load(path: Path, abstract: dict[str, Any], *, cast: bool) -> dict[str, Any]:
    stored = ocp.checkpointables_metadata(str(path)).metadata
    for name, tree in abstract.items():
        _check_leaves(path / name, _leaves(stored[name]), _leaves(tree), cast)
    return ocp.load_checkpointables(str(path), abstract)


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, the same for a dataclass or a named tuple and for the dict that Orbax
    stores of it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _check_leaves(
    where: Path, stored: dict[str, Any], wanted: dict[str, Any], cast: bool
) -> None:
    """Raises CheckpointMismatch at the first leaf that differs; `cast` allows another
    floating dtype."""

    def describe(leaf: Any, cast: bool) -> str:
        if leaf is None:
            return "absent"
        return f"{'floating' if cast and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype}{list(leaf.shape)}"

    for name in {**stored, **wanted}:
        have, want = stored.get(name), wanted.get(name)
        if describe(have, cast) != describe(want, cast):
            raise CheckpointMismatch(
                f"leaf {name} is {describe(have, False)} in {where}, but {describe(want, False)} in this run: "
                "compare the model and the optimizer of the two configs"
            )


def _damage(path: Path) -> str:
    """What differs from the hashes of a step, "" if nothing; empty or not, the same on
    every process."""
    damage = ""
    if jax.process_index() == 0:
        if not has_checksums(path) and not find_damage(path):
            logger.warning(
                "%s has no hashes (the run was killed before it wrote them): loading it unchecked",
                path,
            )
        damage = next(iter(find_damage(path)), "")
    return "" if all_hosts(not damage) else damage or f"{path}, as process 0 reports"
