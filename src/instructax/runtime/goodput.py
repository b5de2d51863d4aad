"""Goodput: where the time of a run went, over all of its processes.

`goodput.jsonl` is only appended to and never rewound. A line is {"kind", "seconds", "step",
"process"}: how many seconds went into one kind of work, up to the finished step `step`, by
the process that started at the Unix time `process`. Each second of a process counts once,
except for the kind `lost`: a restarted process records how many seconds of its
predecessors' work it has to redo. What a killed process did after its last line is not
counted.
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

# Work that has to be redone after a kill.
REDONE = ("steps", "evaluation")

# Event name → kind of the time that follows it.
PHASES = {"restore": "restore", "evaluate": "evaluation", "save": "save"}


class GoodputLog:
    """Accounts for the time of this process.

    Until the first event all time is `init`, counted from the start of the process, or from
    the end of the previous run in the same process. After that, time in one of `PHASES` has
    that phase's kind. All other time is `compile` before the event "steps" and `steps`
    after it.

    Args:
      path: the log, shared by all processes that ever work on the run.
      writes: whether this process writes lines.
    """

    # Unix time at which the last log of this process was closed.
    _last_closed = 0.0

    def __init__(self, path: Path, *, writes: bool):
        self._process = round(_process_start(), 3)
        self._last_event = time.perf_counter()
        init_began = max(self._process, GoodputLog._last_closed)
        self._unwritten = {"init": time.time() - init_began}  # kind → seconds
        self._kind = "init"  # of the time since the last event
        self._default_kind = "compile"  # of time outside of `PHASES`
        self._step = 0
        self._earlier = read_events(path)
        self._file = _open_log(path) if writes else None

    def beat(self, name: str) -> None:
        """Records that the work called `name` begins or ends now."""
        # The time since the last event belongs to the kind that it started.
        now = time.perf_counter()
        seconds = self._unwritten.get(self._kind, 0.0)
        self._unwritten[self._kind] = seconds + now - self._last_event
        if name == "steps":
            self._default_kind = "steps"
        self._last_event = now
        self._kind = PHASES.get(name, self._default_kind)

    def begin(self, step: int) -> None:
        """Records the step that the run starts or resumes from; 0 is a new run."""
        # Everything so far was start-up and restore.
        self.write(step)
        if lost := lost_seconds(self._earlier, step):
            self._write_line("lost", lost)

    def write(self, step: int, *, least: float = 1e-3) -> None:
        """Writes the accumulated time and flushes it, so that a kill cannot lose it.

        Args:
          step: the last finished step.
          least: kinds with fewer seconds are kept for a later call.
        """
        self._step = step
        for kind, seconds in list(self._unwritten.items()):
            if seconds >= least:
                del self._unwritten[kind]
                self._write_line(kind, seconds)

    def _write_line(self, kind: str, seconds: float) -> None:
        if self._file is None:
            return
        line = {
            "kind": kind,
            "seconds": round(seconds, 6),
            "step": self._step,
            "process": self._process,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Writes the remaining time and closes the log."""
        self.write(self._step, least=0.0)
        # A second run in this process (an experiment) counts its init from here.
        GoodputLog._last_closed = time.time()
        if self._file is not None:
            self._file.close()


def _process_start() -> float:
    """The Unix time at which this process started; now, if the system does not tell."""
    try:
        # Fields of /proc/self/stat after the command's name, which may hold spaces; the
        # 22nd of all is the start in clock ticks after boot.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def _open_log(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_no_follow(path, "a")
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        # A killed process left half a line: keep it apart from ours.
        file.write("\n")
    return file


def read_events(path: Path) -> list[dict[str, Any]]:
    """The valid lines of a goodput log; [] if there is no file.

    Lines that a kill has torn, or that are not a goodput log's, are skipped.
    """
    if not path.exists():
        return []
    events = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            event = {
                "kind": line["kind"],
                "seconds": float(line["seconds"]),
                "step": int(line["step"]),
                "process": float(line["process"]),
            }
        # Half a line, deep nesting, or another program's file.
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
        if math.isfinite(event["seconds"]) and event["kind"] in (*KINDS, "lost"):
            events.append(event)
    return events


def lost_seconds(events: Iterable[Mapping[str, Any]], step: int) -> float:
    """Seconds of earlier work that a run resuming from `step` has to redo.

    Work that was already lost to an earlier restart is not counted again.
    """
    # Events in the order of the log; a `lost` event cancels the later steps before it.
    kept: list[Mapping[str, Any]] = []
    for event in events:
        if event["kind"] == "lost":
            kept = [earlier for earlier in kept if earlier["step"] <= event["step"]]
        elif event["kind"] in REDONE:
            kept.append(event)
    return sum(event["seconds"] for event in kept if event["step"] > step)


def read_totals(path: Path) -> dict[str, float]:
    """Sums a goodput log.

    Returns:
      Seconds of each kind and of `lost`, the number of `processes`, and `goodput`: the
      share of all seconds that went into steps and evaluations which were not redone. {} if
      there is no log.
    """
    events = read_events(path)
    if not events:
        return {}
    totals = dict.fromkeys((*KINDS, "lost"), 0.0)
    for event in events:
        totals[event["kind"]] += event["seconds"]
    # What had to be redone was useful only once.
    useful = sum(totals[kind] for kind in REDONE) - totals["lost"]
    spent = sum(totals[kind] for kind in KINDS)
    # The start time identifies a process.
    processes = len({event["process"] for event in events})
    goodput = useful / spent if spent else 0.0
    return {**totals, "processes": processes, "goodput": goodput}


def format_totals(totals: Mapping[str, float]) -> str:
    """The result of `read_totals` as one line of text."""
    parts = []
    for kind in (*KINDS, "lost"):
        if totals[kind]:
            parts.append(f"{kind} {timedelta(seconds=round(totals[kind]))}")
    plural = "es" if totals["processes"] > 1 else ""
    processes = f"{totals['processes']:.0f} process{plural}"
    return f"goodput {totals['goodput']:.0%} in {processes}: {', '.join(parts)}"
