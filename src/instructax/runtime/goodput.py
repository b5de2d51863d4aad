"""Where the time of a run went, over all of its processes: `goodput.jsonl`, appended to and
never rewound.

A line is {"kind", "seconds", "step", "process"}: so many seconds of one kind of work, up to
the finished step `step`, by the process that began at the Unix time `process`. Each second
of a process counts once, save `lost`: a process that goes on from an earlier step than its
forerunners had come to says how many of their seconds it does again. What a killed process
did after its last line is in no line.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from instructax.runtime.files import open_no_follow

KINDS = ("steps", "evaluation", "compile", "init", "restore", "save")
REDONE = ("steps", "evaluation")  # what is done again after a kill
PHASES = {
    "restore": "restore",
    "evaluate": "evaluation",
    "save": "save",
}  # name of a beat → kind


class GoodputLog:
    """Books the time of this process, and writes lines if it `writes`.

    Until the first beat all is `init`, from the start of the process on, or from the end of
    the run before it in the same process. Then the phases of `PHASES` are what they are
    called; the rest is `compile` before the beat "steps" and `steps` after it.
    """

    _before_ended = 0.0  # Unix time at which the last ledger of this process was closed

    def __init__(self, path: Path, *, writes: bool):
        self._process, self._last = round(_process_start(), 3), time.perf_counter()
        self._booked = {"init": time.time() - max(self._process, GoodputLog._before_ended)}
        self._kind, self._rest, self._step = "init", "compile", 0
        self._before = read_lines(path)
        self._file = _opened(path) if writes else None

    def beat(self, name: str) -> None:
        """Notes that work called `name` begins or ends now."""
        now = time.perf_counter()
        self._booked[self._kind] = self._booked.get(self._kind, 0.0) + now - self._last
        if name == "steps":
            self._rest = "steps"
        self._last, self._kind = now, PHASES.get(name, self._rest)

    def begin(self, step: int) -> None:
        """Notes that the run goes on from `step`; 0 is its beginning."""
        self.write(step)
        if lost := lost_seconds(self._before, step):
            self._line("lost", lost)

    def write(self, step: int, *, least: float = 1e-3) -> None:
        """Writes what is booked, up to the finished step `step`, and hands it to the
        system: a kill cannot take it. Fewer than `least` seconds wait for more."""
        self._step = step
        ready = {
            kind: seconds for kind, seconds in self._booked.items() if seconds >= least
        }
        self._booked = {
            kind: seconds for kind, seconds in self._booked.items() if kind not in ready
        }
        for kind, seconds in ready.items():
            self._line(kind, seconds)

    def _line(self, kind: str, seconds: float) -> None:
        line = {
            "kind": kind,
            "seconds": round(seconds, 6),
            "step": self._step,
            "process": self._process,
        }
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Writes what is still booked; no more lines after."""
        self.write(self._step, least=0.0)
        GoodputLog._before_ended = time.time()
        if self._file is not None:
            self._file.close()


def _process_start() -> float:
    """The Unix time at which this process began; where the system does not say, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def _opened(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_no_follow(path, "a")
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        file.write("\n")  # the half line of a killed process stays a line of its own
    return file


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ledger, [] if there is none."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            seconds, step, process = (
                float(line["seconds"]),
                int(line["step"]),
                float(line["process"]),
            )
            if math.isfinite(seconds) and line["kind"] in (*KINDS, "lost"):
                lines.append(
                    {
                        "kind": line["kind"],
                        "seconds": seconds,
                        "step": step,
                        "process": process,
                    }
                )
        except (
            ValueError,
            TypeError,
            KeyError,
            OverflowError,
            RecursionError,
        ):  # torn by a kill, or not ours
            continue
    return lines


def lost_seconds(lines: Iterable[Mapping[str, Any]], step: int) -> float:
    """The seconds that a run does again which goes on from `step`, those left out that were
    lost before."""
    standing: list[Mapping[str, Any]] = []
    for line in lines:
        if line["kind"] == "lost":
            standing = [earlier for earlier in standing if earlier["step"] <= line["step"]]
        elif line["kind"] in REDONE:
            standing.append(line)
    return sum(line["seconds"] for line in standing if line["step"] > step)


def read_totals(path: Path) -> dict[str, float]:
    """Seconds by kind, `lost` too, the number of `processes`, and `goodput`: the share of
    all seconds that went into steps and evaluations which were not done again. {} if there
    is no ledger."""
    lines = read_lines(path)
    if not lines:
        return {}
    seconds = {
        kind: sum(line["seconds"] for line in lines if line["kind"] == kind)
        for kind in (*KINDS, "lost")
    }
    useful = sum(seconds[kind] for kind in REDONE) - seconds["lost"]
    spent = sum(seconds[kind] for kind in KINDS)
    return {
        **seconds,
        "processes": len({line["process"] for line in lines}),
        "goodput": useful / spent if spent else 0.0,
    }


def format_totals(found: Mapping[str, float]) -> str:
    """`read_totals` as a line to read."""

    def clock(kind: str) -> str:
        return f"{kind} {timedelta(seconds=round(found[kind]))}"

    processes = f"{found['processes']:.0f} process{'es' if found['processes'] > 1 else ''}"
    kinds = ", ".join(clock(kind) for kind in (*KINDS, "lost") if found[kind])
    return f"goodput {found['goodput']:.0%} in {processes}: {kinds}"
