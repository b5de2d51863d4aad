"""Saves and restores the state of a run.

A step is stored in `workdir/checkpoints/<step>` as two items: `params`, the field that the
next stage reads, and `state`, everything else, so nothing is stored twice. Orbax commits a
step by renaming its folder, so a killed save leaves nothing that looks like a step. But its
data files have no checksums, and a flipped bit would be loaded as a wrong number. Therefore
each committed step has a file `<step>.sha256.json` next to it (see `checksums`), which is
verified before every load. If a process is killed between commit and hashing, its step has
no hashes: the next process loads it with a warning and hashes it.

In a run of several processes, all of them call every function and share the folder. Only
process 0 hashes, deletes and writes JSON.
"""

import concurrent.futures
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from instructax.checkpoints.checksums import FORMAT, hash_files, read_record, record_path
from instructax.checkpoints.restore import find_problem, load_items
from instructax.checkpoints.steps import committed_steps, delete_folder, delete_old_steps
from instructax.config import ConfigError
from instructax.runtime.files import write_json
from instructax.runtime.nonfinite import Diverged, all_finite

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of the one run that writes to `workdir`.

    Other programs read them with `restore.load_params`.

    Args:
      workdir: the folder of the run.
      save_every: steps between two saves by `maybe_save`, at least 1.
      keep: how many of the newest steps are kept, at least 1.
      best_metric: name of a metric whose best step (see `best_step`) is kept as well;
        "" for none.
      best_mode: "min" or "max": which value of `best_metric` is the best.
      exported: the field of the state that the next stage reads: "params" of TrainState,
        "ema" of PpoState.

    Attributes:
      unevaluated: the metrics of a restored step whose evaluation was abandoned; None
        if the restored step was evaluated.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        save_every: int,
        keep: int,
        best_metric: str,
        best_mode: str,
        exported: str,
    ):
        self._workdir = Path(workdir)
        self._root = Path(workdir).absolute() / "checkpoints"
        self._save_every = save_every
        self._keep = keep
        self._best_metric = best_metric
        self._best_mode = best_mode
        self._exported = exported
        self.unevaluated: dict[str, Any] | None = None

        # The step that this object saved or restored last, and the save in progress.
        self._saved: int | None = None
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        # One thread, so saves finish in order and never compete for the disk.
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        if jax.process_index() == 0:
            self._remove_remains()

    def _remove_remains(self) -> None:
        """Creates the folder, and deletes the leftovers of killed processes."""
        # Unfinished saves of Orbax, and steps that were about to be deleted.
        self._root.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.orbax-checkpoint-tmp*", "*.deleted"):
            for path in self._root.glob(pattern):
                delete_folder(path)
        # Records without a step: the record is written first.
        for path in self._root.glob("*.sha256.json"):
            step = path.name.partition(".")[0]
            if not path.with_name(step).exists():
                path.unlink()

    def steps(self) -> list[int]:
        """The committed steps, in rising order."""
        return committed_steps(self._workdir)

    def due(self, step: int) -> bool:
        """Whether `maybe_save` would save `step`: it is a multiple of `save_every`."""
        return step % self._save_every == 0

    def maybe_save(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Starts a save if one is due; raises the error of a previous save that failed."""
        # Errors of a background save must not wait for the next save.
        if self._pending is not None and self._pending[1].done():
            self.wait()
        if self.due(step):
            self.save(step, state, metrics)

    def save(
        self, step: int, state: Any, metrics: Mapping[str, Any], *, evaluated: bool = True
    ) -> None:
        """Starts a save, after waiting for the previous one.

        Returns when the arrays have been copied from the devices, so the caller may donate
        `state` at once. Writing, hashing and deleting old steps continue in the background.
        Does nothing if `step` is saved already.

        Args:
          step: finished steps of `state`.
          state: the state to save.
          metrics: the metrics of the step, among them `best_metric`.
          evaluated: False if the step's evaluation was abandoned. Its metrics are then kept
            for the resumed run, as `unevaluated`.

        Raises:
          Diverged: the state is not finite.
          OSError: the previous save failed.
        """
        # At most one save in progress: the next one could need its memory.
        self.wait()
        if step == self._saved:
            return
        # A checkpoint with NaN would make the run unrecoverable, because older steps are
        # deleted.
        if not all_finite(state):
            raise Diverged(
                f"the state of step {step} is not finite, nothing of it is saved: lower "
                "the learning rate"
            )
        # Only an evaluated step can become the best one.
        if evaluated:
            record = {"unevaluated": None, **self._rating(step, metrics)}
        else:
            record = {"unevaluated": jax.device_get(dict(metrics)), **self._no_rating()}

        # Before the step itself: a process killed before hashing must not lose the record.
        # It also invalidates the hashes of a step that is overwritten.
        path = self._root / str(step)
        if jax.process_index() == 0:
            write_json(record_path(path), {"format": FORMAT, **record, "files": None})

        # Returns when the arrays are on the host; the rest happens in the background.
        response = self._start_writing(path, state)
        self._pending = (step, self._thread.submit(self._finish, step, response, record))

    def _start_writing(self, path: Path, state: Any) -> ocp.AsyncResponse[None]:
        context = ocp.Context()
        # A folder that cannot be created must fail here: otherwise Orbax's threads wait for
        # it for 20 minutes, even at exit.
        context.async_options.create_directories_asynchronously = False
        with context:
            return ocp.save_checkpointables_async(
                str(path), self._items(state), overwrite=True
            )

    def _items(self, state: Any) -> dict[str, Any]:
        """The two items of a step; the exported field is None in the second."""
        return {
            "params": getattr(state, self._exported),
            "state": dataclasses.replace(state, **{self._exported: None}),
        }

    def _rating(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a step's record that `best_step` reads.

        A missing metric is a warning, not an error: a typo should not end a long run.
        """
        if self._best_metric in metrics:
            value = float(metrics[self._best_metric])
            return {**self._no_rating(), "metric": value}
        if self._best_metric:
            logger.warning(
                "step %d cannot become the best checkpoint: best_metric %r is not among "
                "its metrics (%s)",
                step,
                self._best_metric,
                ", ".join(sorted(metrics)),
            )
        return self._no_rating()

    def _no_rating(self) -> dict[str, Any]:
        return {
            "best_metric": self._best_metric,
            "best_mode": self._best_mode,
            "metric": None,
        }

    def mark_evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of the restored step, which was `unevaluated`."""
        self.unevaluated = None
        # The record exists: `restore` hashes steps that were not hashed.
        if jax.process_index() == 0 and self._saved is not None:
            path = self._root / str(self._saved)
            record = read_record(path) or {}
            rating = self._rating(self._saved, metrics)
            write_json(record_path(path), {**record, **rating, "unevaluated": None})

    def _finish(
        self, step: int, response: ocp.AsyncResponse[None], record: dict[str, Any]
    ) -> None:
        """In the background: waits for the commit, then hashes the step."""
        try:
            response.result()
        # How TensorStore reports errors of the operating system, such as a full disk.
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise OSError(
                f"the checkpoint of step {step} cannot be written ({reason}); the steps "
                "before it are whole: make room and start again"
            ) from error
        self._hash_and_clean_up(step, record)

    def _hash_and_clean_up(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes the hashes of a committed step, then deletes the steps it displaces."""
        if jax.process_index() > 0:
            return
        path = self._root / str(step)
        write_json(record_path(path), {"format": FORMAT, **record, **hash_files(path)})
        # After hashing: until the new step is verifiable, the old ones stay.
        delete_old_steps(self._workdir, step, self._keep)

    def wait(self) -> None:
        """Blocks until the save in progress is committed and hashed; raises its error."""
        if self._pending is None:
            return
        # Forget it first: if it failed, the error is raised only once.
        step, future = self._pending
        self._pending = None
        future.result()
        self._saved = step

    def close(self) -> None:
        """Waits for the save in progress; no more saves afterwards."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self, abstract_state: Any) -> tuple[Any, int] | None:
        """Restores the newest undamaged step, directly into the shardings of the run.

        Damaged newer steps, and folders that only look like steps, are reported and set
        aside as `<step>.damaged`.

        Args:
          abstract_state: the state with jax.ShapeDtypeStruct leaves that have shardings, of
            any mesh.

        Returns:
          (state, step), or None if nothing was ever saved.

        Raises:
          CheckpointMismatch: a leaf is missing, unexpected, or has another shape or dtype.
          NewerFormatError: a newer version of this program has written the step.
          ConfigError: every step is damaged.
        """
        self.wait()
        abstract = self._items(abstract_state)
        damaged: dict[int, str] = {}
        # Newest first.
        for step in reversed(self.steps()):
            path = self._root / str(step)
            if problem := find_problem(path, abstract):
                damaged[step] = problem
                continue
            # Exact dtypes: a resumed run must continue bit for bit.
            items = load_items(path, abstract, cast=False)
            # Only now is it certain that there is a good step to fall back to.
            self._set_aside(damaged, good_step=step)
            self._mark_restored(step)
            state = dataclasses.replace(items["state"], **{self._exported: items["params"]})
            return state, step
        # Starting anew would silently throw away the work in these folders.
        if damaged:
            raise ConfigError(
                f"every checkpoint is damaged; restore a copy of {self._root}: "
                f"{'; '.join(damaged.values())}"
            )
        return None

    def _mark_restored(self, step: int) -> None:
        """Remembers the restored step and its metrics; hashes it if it has no hashes."""
        self._saved = step
        path = self._root / str(step)
        record = read_record(path) or self._no_rating()
        self.unevaluated = record.get("unevaluated")
        # The process that saved it was killed before hashing.
        if not record.get("files"):
            self._hash_and_clean_up(step, record)

    def _set_aside(self, damaged: Mapping[int, str], *, good_step: int) -> None:
        """Renames damaged steps to `<step>.damaged`, which no reader takes for a step.

        Args:
          damaged: step → what is wrong with it.
          good_step: the step that is restored instead.
        """
        for step, reason in damaged.items():
            logger.warning(
                "checkpoint %d IS DAMAGED and set aside, going on from %d: %s",
                step,
                good_step,
                reason,
            )
            if jax.process_index() > 0:
                continue
            path = self._root / str(step)
            target = self._root / f"{step}.damaged"
            # An earlier damaged copy of the same step.
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            record_path(path).unlink(missing_ok=True)
