"""What a run writes while it goes: metrics, samples, phase times and a closing summary.

`metrics.jsonl` holds one JSON object per step and `samples.jsonl` one per sample. Both are
appended to; a resumed run first drops the lines after the step it starts from, so each step
stands once. All that depends on a clock is under a key `time/…`: the other keys of a
resumed run are bit for bit those of an uninterrupted one. JSON has no NaN: a non-finite
metric is written as null and named in the list `nonfinite`.
"""

import contextlib
import dataclasses
import datetime
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
    to_jsonable,
    write_atomically,
    write_json,
)
from instructax.runtime.redaction import printable

RESERVED = ("step", "nonfinite")  # the keys that the log itself writes
MAIN = (
    "loss",
    "accuracy",
    "scores",
    "rewards",
    "kl",
    "entropy",
    "response_length",
)  # come first on the console
FIRST_STEP = "first_step"  # the phase of `first_step_done`
CONSOLE_METRICS = 6  # metrics on the console line: those of `MAIN`, then the others by name
CONSOLE_CHARACTERS = 160  # of each field of a sample on the console


def rewind(path: Path, start_step: int) -> None:
    """Keeps the lines of a JSONL log whose step is at most `start_step`; with `start_step`
    0 nothing is kept.

    A line that is not a JSON object with a step, such as the half line of a killed run, is
    dropped.
    """
    if not path.exists():
        return
    with path.open(errors="replace") as old:
        whole = (line for line in old if line.endswith("\n"))
        write_atomically(
            path,
            (line for line in whole if start_step > 0 and _step_of(line) <= start_step),
        )


def _step_of(line: str) -> float:
    """The step of a log line; infinity if the line has none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.inf


@dataclasses.dataclass(frozen=True)
class _Record:
    step: int
    metrics: dict[str, Any]
    phases: dict[str, float]  # seconds
    unix: float  # seconds


class MetricLog:
    """The log of one run in `workdir`; a context manager that flushes on any exit. Only
    process 0 writes.

    Args:
      total_steps: the run's last step, for the console line and the estimated time of arrival.
      log_every: steps between two flushes (one device-to-host copy and one console line each).
      start_step: finished steps of the state that the run continues from; 0 for a new run. What the files hold of later
        steps is dropped.
      tensorboard: also write scalars to `workdir/tensorboard`.
      console: also print.
      beat: called with the name of every phase when it begins and when it ends, and with "steps" by `first_step_done`.
      written: called with the last step whose record is in the file.
      recorded: whether `start_step` has been recorded; else it is recorded next.
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
        written: Callable[[int], None] = lambda step: None,
        recorded: bool = True,
    ):
        if log_every < 1:
            raise ConfigError(
                f"log_every is {log_every}; it must be at least 1: set it in the config of the run"
            )
        self._workdir = Path(workdir)
        self._total_steps, self._log_every = total_steps, log_every
        self._writes = jax.process_index() == 0
        self._console = console and self._writes
        self._beat, self._written = beat, written
        self._last_step = (
            start_step - (not recorded) if start_step > 0 else -1
        )  # a new run may record step 0
        self._last_sampled = -1
        self._buffer: list[_Record] = []
        self._phases: dict[str, float] = {}
        self._files, self._writer = contextlib.ExitStack(), None
        if self._writes:
            self._open(start_step, tensorboard)
        self._window_start = time.perf_counter()

    def _open(self, start_step: int, tensorboard: bool) -> None:
        if tensorboard:
            self._writer = _tensorboard_writer(self._workdir / "tensorboard", start_step)
            self._files.callback(self._writer.close)
        self._workdir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            rewind(self._workdir / name, start_step)
        self._metrics = self._files.enter_context(
            open_no_follow(self._workdir / "metrics.jsonl", "a")
        )
        self._samples = self._files.enter_context(
            open_no_follow(self._workdir / "samples.jsonl", "a")
        )

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of one step without waiting for the device.

        Args:
          step: later than every step before it.
          metrics: name → scalar or array of shape (). A name may not be one of `RESERVED`. `tokens`, if among them, is
            the number of tokens of the step over all devices and gives `time/tokens_per_second_per_device`.

        Raises:
          ValueError: a step recorded before, a reserved name, a metric that is not a scalar.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step {step} follows step {self._last_step}: record each step once, in rising order"
            )
        _refuse_reserved(metrics)
        for name, value in metrics.items():
            if np.shape(value) != ():
                raise ValueError(
                    f"metric {name!r} has shape {np.shape(value)}; only scalars can be recorded"
                )
        self._last_step = step
        phases, self._phases = self._phases, {}
        if self._writes:
            self._buffer.append(_Record(step, dict(metrics), phases, time.time()))
            if step % self._log_every == 0 or step == self._total_steps:
                self.flush()

    def flush(self) -> None:
        """Fetches and writes what `record` took since the last flush.

        `time/step_s` and `time/tokens_per_second_per_device` are means over these steps: a
        step's own time is unknown, since the device works behind the host. The first step,
        most of which went into compiling, counts only where there is no other. A
        checkpoint's step should be flushed before it is saved, as it is where `log_every`
        divides the steps between checkpoints: else a killed and resumed run has a gap in
        its log.
        """
        if not self._buffer:
            return
        records, self._buffer = self._buffer, []
        fetched = jax.device_get([record.metrics for record in records])
        now = time.perf_counter()
        seconds, self._window_start = now - self._window_start, now
        timed = [i for i, record in enumerate(records) if FIRST_STEP not in record.phases]
        if not timed:
            seconds, timed = records[0].phases[FIRST_STEP], [0]
        rate = (
            sum(float(fetched[i].get("tokens", 0)) for i in timed)
            / seconds
            / jax.device_count()
        )
        lines = []
        for record, metrics in zip(records, fetched, strict=True):
            times = {f"time/{name}_s": value for name, value in record.phases.items()}
            times |= {"time/unix_s": record.unix, "time/step_s": seconds / len(timed)}
            if "tokens" in metrics:
                times["time/tokens_per_second_per_device"] = rate
            lines.append(_line(record.step, metrics, times))
        self._write(lines)
        self._written(records[-1].step)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._metrics.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self._metrics.flush()
        if self._writer is not None:
            for line in lines:
                scalars = {
                    name: value
                    for name, value in line.items()
                    if name not in RESERVED and value is not None
                }
                for name, value in scalars.items():
                    self._writer.add_scalar(
                        name, value, line["step"], walltime=line["time/unix_s"]
                    )
            self._writer.flush()
        if self._console:
            print(self._console_line(lines[-1]), flush=True)

    def _console_line(self, line: dict[str, Any]) -> str:
        hidden = (*RESERVED, "tokens")
        names = [
            name for name in line if name not in hidden and not name.startswith("time/")
        ]
        names.sort(key=lambda name: (MAIN.index(name) if name in MAIN else len(MAIN), name))
        parts = [f"step {line['step']}/{self._total_steps}"]
        for name in names[:CONSOLE_METRICS]:
            parts.append(
                f"{name} {'non-finite' if line[name] is None else format(line[name], '.4g')}"
            )
        if (rate := line.get("time/tokens_per_second_per_device")) is not None:
            parts.append(f"{rate:,.0f} tokens/s/device")
        left = (self._total_steps - line["step"]) * line["time/step_s"]
        parts.append(f"eta {datetime.timedelta(seconds=round(max(left, 0)))}")
        return "  ".join(parts)

    def write_sample(self, step: int, record: Mapping[str, Any]) -> None:
        """Appends one sample (prompt, response, score, …) at once; the first of a step with
        a console line is shown."""
        _refuse_reserved(record)
        if not self._writes:
            return
        self._samples.write(
            json.dumps({"step": step, **to_jsonable(record)}, allow_nan=False) + "\n"
        )
        self._samples.flush()
        if self._console and step != self._last_sampled and step % self._log_every == 0:
            fields = (
                f"{name}: {printable(str(value)[:CONSOLE_CHARACTERS])}"
                for name, value in record.items()
            )
            print(f"sample {step}  " + "  ".join(fields), flush=True)
        self._last_sampled = step

    def first_step_done(self, metrics: Mapping[str, Any]) -> None:
        """Waits for the metrics of the first step, and notes the seconds since the log was
        opened, most of which went into compiling: `time/first_step_s` of the next record,
        and a line on the console."""
        jax.block_until_ready(metrics)
        self._beat("steps")
        now = time.perf_counter()
        seconds, self._window_start = now - self._window_start, now
        self._phases[FIRST_STEP] = seconds
        if self._console:
            print(f"first step after {seconds:.1f} s", flush=True)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall time of the block to `time/{name}_s` of the next record.

        It is the host's time: a block that only dispatches work to the device ends before
        the device does.
        """
        self._beat(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._beat(f"the end of {name}")
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Writes the final figures of the run to `summary.json`, atomically."""
        if self._writes:
            write_json(self._workdir / "summary.json", figures)

    def close(self) -> None:
        """Flushes and closes the files. A second call does nothing."""
        with self._files:
            self.flush()


def _refuse_reserved(names: Mapping[str, Any]) -> None:
    for name in RESERVED:
        if name in names:
            raise ValueError(f"the name {name!r} is the log's own: rename that entry")


def _line(
    step: int, metrics: Mapping[str, Any], times: Mapping[str, float]
) -> dict[str, Any]:
    """One line of `metrics.jsonl`, sorted by name, from metrics that are on the host."""
    values = {name: np.asarray(metrics[name]).item() for name in sorted(metrics)}
    nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
    return {
        "step": step,
        **to_jsonable(values),
        **({"nonfinite": nonfinite} if nonfinite else {}),
        **times,
    }


def _tensorboard_writer(directory: Path, start_step: int) -> Any:
    """A writer that hides what an earlier, rewound run wrote after `start_step`."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard is on, but tensorboardX is not installed: pip install 'instructax[tensorboard]', or turn "
            "tensorboard off in the config"
        ) from None
    return SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else 0)
