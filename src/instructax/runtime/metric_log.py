"""What a run writes while it trains: metrics, samples, phase times and a final summary.

`metrics.jsonl` holds one JSON object per step and `samples.jsonl` one per sample. Both are
appended to. A resumed run first drops the lines after the step it resumes from, so each
step occurs once. Everything that depends on a clock has a key `time/…`; the other keys of a
resumed run are bit for bit those of an uninterrupted one. JSON has no NaN: a non-finite
metric is written as null and named in the list `nonfinite`.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructax.config import ConfigError
from instructax.runtime.files import (
    open_no_follow,
    read_json_lines,
    rewind,
    to_jsonable,
    write_json,
)
from instructax.runtime.metric_display import TensorboardWriter, console_line, sample_line

# Keys that the log itself writes.
RESERVED = ("step", "nonfinite")

# The phase that `first_step_done` records.
FIRST_STEP = "first_step"


@dataclasses.dataclass(frozen=True)
class _Record:
    step: int
    metrics: dict[str, Any]
    phases: dict[str, float]  # seconds
    unix: float  # seconds


class MetricLog:
    """The log of one run in `workdir`; only process 0 writes.

    A context manager that flushes on any exit.

    Args:
      workdir: the folder of the run.
      total_steps: the last step of the run, for the console line and the estimated time of
        arrival.
      log_every: steps between two flushes, at least 1; each with one device-to-host
        copy and one console line.
      start_step: finished steps of the state that the run resumes from; 0 for a new run.
        Lines of later steps are dropped from the files.
      tensorboard: whether to write scalars to `workdir/tensorboard` as well.
      console: whether to print as well.
      beat: called with the name of every phase when it begins and when it ends, and with
        "steps" by `first_step_done`.
      on_flush: called with the last step whose record is in the file.
      start_recorded: whether `start_step` is already in the file; otherwise it is the step
        that is recorded next.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        log_every: int,
        start_step: int,
        tensorboard: bool,
        console: bool,
        beat: Callable[[str], None] = lambda name: None,
        on_flush: Callable[[int], None] = lambda step: None,
        start_recorded: bool = True,
    ):
        self._workdir = Path(workdir)
        self._total_steps = total_steps
        self._log_every = log_every
        self._writes = jax.process_index() == 0
        self._console = console and self._writes
        self._beat = beat
        self._on_flush = on_flush

        self._last_step = -1  # a new run may record step 0
        if start_step > 0:
            self._last_step = start_step if start_recorded else start_step - 1
        self._last_sampled = -1
        self._buffer: list[_Record] = []
        self._phases: dict[str, float] = {}
        self._files = contextlib.ExitStack()
        self._tensorboard: TensorboardWriter | None = None
        if self._writes:
            self._open(start_step, tensorboard)
        self._window_start = time.perf_counter()

    def _open(self, start_step: int, tensorboard: bool) -> None:
        if tensorboard:
            folder = self._workdir / "tensorboard"
            self._tensorboard = TensorboardWriter(folder, start_step)
            self._files.callback(self._tensorboard.close)
        self._workdir.mkdir(parents=True, exist_ok=True)
        # Rewind before opening: rewinding replaces the file.
        metrics = self._workdir / "metrics.jsonl"
        samples = self._workdir / "samples.jsonl"
        rewind(metrics, start_step)
        rewind(samples, start_step)
        self._metrics = self._files.enter_context(open_no_follow(metrics, "a"))
        self._samples = self._files.enter_context(open_no_follow(samples, "a"))

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of one step without waiting for the device.

        Args:
          step: later than every step before it.
          metrics: name → scalar or array of shape (), with no name of `RESERVED`. `tokens`,
            if present, is the step's number of tokens over all devices and gives
            `time/tokens_per_second_per_device`.

        Raises:
          ValueError: the step was recorded before, a name is reserved, or a metric is not a
            scalar.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step {step} follows step {self._last_step}: record each step once, in "
                "rising order"
            )
        _refuse_reserved(metrics)
        for name, value in metrics.items():
            if np.shape(value) != ():
                raise ValueError(
                    f"metric {name!r} has shape {np.shape(value)}; only scalars can be "
                    "recorded"
                )
        self._last_step = step
        phases = self._phases
        self._phases = {}
        # The device arrays are only referenced here; `flush` copies them.
        if self._writes:
            self._buffer.append(_Record(step, dict(metrics), phases, time.time()))
            if step % self._log_every == 0 or step == self._total_steps:
                self.flush()

    def flush(self) -> None:
        """Fetches and writes what was recorded since the last flush.

        `time/step_s` and `time/tokens_per_second_per_device` are means over these steps:
        the time of a single step is unknown, because the device works behind the host. The
        first step, most of which is compilation, only counts if there is no other.

        The log of a step should be flushed before its checkpoint is saved, as it is when
        `log_every` divides `save_every`; otherwise a killed and resumed run has a gap.
        """
        if not self._buffer:
            return
        records = self._buffer
        self._buffer = []
        # One transfer for all steps; this is the only place that waits for the device.
        fetched = jax.device_get([record.metrics for record in records])
        now = time.perf_counter()
        seconds = now - self._window_start
        self._window_start = now

        timed = [i for i, record in enumerate(records) if FIRST_STEP not in record.phases]
        # Only the first step: its time since the log was opened.
        if not timed:
            timed = [0]
            seconds = records[0].phases[FIRST_STEP]
        # Steps without `tokens`, as of an evaluation, count as 0.
        tokens = sum(float(fetched[i].get("tokens", 0)) for i in timed)
        throughput = tokens / seconds / jax.device_count()

        lines = []
        for record, metrics in zip(records, fetched, strict=True):
            times = {f"time/{name}_s": value for name, value in record.phases.items()}
            times["time/unix_s"] = record.unix
            times["time/step_s"] = seconds / len(timed)
            if "tokens" in metrics:
                times["time/tokens_per_second_per_device"] = throughput
            lines.append(_metrics_line(record.step, metrics, times))
        self._write(lines)
        self._on_flush(records[-1].step)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._metrics.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self._metrics.flush()
        if self._tensorboard is not None:
            self._tensorboard.write(lines)
        if self._console:
            print(console_line(lines[-1], self._total_steps), flush=True)

    def write_sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Appends one sample (prompt, response, score, …) at once.

        The first sample of a step that has a console line is printed.
        """
        _refuse_reserved(sample)
        if not self._writes:
            return
        line = {"step": step, **to_jsonable(sample)}
        self._samples.write(json.dumps(line, allow_nan=False) + "\n")
        self._samples.flush()
        # One sample per console line is enough to watch a run.
        if self._console and step != self._last_sampled and step % self._log_every == 0:
            print(sample_line(step, sample), flush=True)
        self._last_sampled = step

    def first_step_done(self, metrics: Mapping[str, Any]) -> None:
        """Waits for the metrics of the first step, and records how long it took.

        Most of these seconds are compilation. They become `time/first_step_s` of the next
        record, and a line on the console.
        """
        jax.block_until_ready(metrics)
        # From here on, time is no longer compilation; see `goodput`.
        self._beat("steps")
        now = time.perf_counter()
        seconds = now - self._window_start
        self._window_start = now
        self._phases[FIRST_STEP] = seconds
        if self._console:
            print(f"first step after {seconds:.1f} s", flush=True)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context manager: adds its wall time to `time/{name}_s` of the next record.

        It is the host's time: a block that only dispatches work to the device ends before
        the device does.
        """
        self._beat(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            # Also if the block raises: the phase has ended.
            self._beat(f"the end of {name}")
            elapsed = time.perf_counter() - start
            self._phases[name] = self._phases.get(name, 0.0) + elapsed

    def write_summary(self, metrics: Mapping[str, Any]) -> None:
        """Writes the final metrics of the run to `summary.json`, atomically."""
        if self._writes:
            write_json(self._workdir / "summary.json", metrics)

    def close(self) -> None:
        """Flushes and closes the files. A second call does nothing."""
        # The stack closes the files even if the flush fails.
        with self._files:
            self.flush()


def read_summary(workdir: Path) -> dict[str, Any]:
    """The final metrics of a run. Raises ConfigError if it has not finished."""
    path = workdir / "summary.json"
    if not path.exists():
        raise ConfigError(
            f"{workdir} is not a finished run: run the whole experiment, not its report "
            "alone"
        )
    return json.loads(path.read_text())


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The metrics of every step of a run."""
    return read_json_lines(workdir / "metrics.jsonl")


def _refuse_reserved(names: Mapping[str, Any]) -> None:
    for name in RESERVED:
        if name in names:
            raise ValueError(
                f"the name {name!r} is reserved for the log: rename that entry"
            )


def _metrics_line(
    step: int, metrics: Mapping[str, Any], times: Mapping[str, float]
) -> dict[str, Any]:
    """One line of `metrics.jsonl`, sorted by name, from metrics that are on the host."""
    # Python numbers: float32 becomes the double of the same value, so nothing is rounded.
    values = {name: np.asarray(metrics[name]).item() for name in sorted(metrics)}
    line = {"step": step, **to_jsonable(values)}
    nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
    if nonfinite:
        line["nonfinite"] = nonfinite
    return {**line, **times}
