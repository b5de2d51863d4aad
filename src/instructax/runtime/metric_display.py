"""How metrics and samples are shown: lines on the console, scalars in TensorBoard."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructax.config import ConfigError
from instructax.runtime.redaction import printable

# Metrics that come first on the console, in this order; the others follow by name.
MAIN_METRICS = (
    "loss",
    "accuracy",
    "scores",
    "rewards",
    "kl",
    "entropy",
    "response_length",
)
MAX_CONSOLE_METRICS = 6

# Longest shown part of each field of a sample, in characters.
MAX_FIELD = 160

# Entries of a line that are not metrics, or have a place of their own on the console.
NOT_METRICS = ("step", "nonfinite")
NOT_ON_CONSOLE = (*NOT_METRICS, "tokens")


def console_line(line: Mapping[str, Any], total_steps: int) -> str:
    """One line for people: step, main metrics, throughput, and time to the end.

    Args:
      line: a record of `metrics.jsonl`.
      total_steps: the last step of the run.
    """
    names = []
    for name in line:
        if name not in NOT_ON_CONSOLE and not name.startswith("time/"):
            names.append(name)
    names.sort(key=_console_order)

    parts = [f"step {line['step']}/{total_steps}"]
    for name in names[:MAX_CONSOLE_METRICS]:
        # JSON has no NaN: the log stores null.
        value = "non-finite" if line[name] is None else format(line[name], ".4g")
        parts.append(f"{name} {value}")
    throughput = line.get("time/tokens_per_second_per_device")
    if throughput is not None:
        parts.append(f"{throughput:,.0f} tokens/s/device")
    # Steps take about the same time; evaluations are not counted.
    seconds_left = (total_steps - line["step"]) * line["time/step_s"]
    parts.append(f"eta {datetime.timedelta(seconds=round(max(seconds_left, 0)))}")
    return "  ".join(parts)


def _console_order(name: str) -> tuple[int, str]:
    if name in MAIN_METRICS:
        return MAIN_METRICS.index(name), name
    return len(MAIN_METRICS), name


def sample_line(step: int, sample: Mapping[str, Any]) -> str:
    """One line for people with all fields of a sample, without control characters."""
    fields = []
    for name, value in sample.items():
        # Cut before escaping, which can make the text several times longer.
        fields.append(f"{name}: {printable(str(value)[:MAX_FIELD])}")
    return f"sample {step}  " + "  ".join(fields)


class TensorboardWriter:
    """Writes the scalars of metric lines for TensorBoard.

    Args:
      directory: where the event files go.
      start_step: the step that the run resumes from, 0 for a new run. TensorBoard
        hides what earlier event files say about later steps.

    Raises:
      ConfigError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, start_step: int):
        try:
            # An optional dependency, imported only when it is used.
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "tensorboard is on, but tensorboardX is not installed: pip install "
                "'instructax[tensorboard]', or turn tensorboard off in the config"
            ) from None
        # Events from this step on are ignored.
        purge_step = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Writes all finite metrics and times of records of `metrics.jsonl`."""
        for line in lines:
            for name, value in line.items():
                if name in NOT_METRICS or value is None:
                    continue
                self._writer.add_scalar(
                    name, value, line["step"], walltime=line["time/unix_s"]
                )
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()
