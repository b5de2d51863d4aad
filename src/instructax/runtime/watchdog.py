"""Ends a process that stands still: a hung collective or a stuck reader would hold its
devices for ever."""

import contextlib
import faulthandler
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

from instructax.runtime.files import open_no_follow

TICK = 5.0  # seconds after which the watchdog looks again, or less


class Watchdog:
    """While entered, aborts the process (SIGABRT, code 134) once `seconds` have passed
    without a `beat`; 0: never.

    Time in which the process itself was stopped, as by SIGSTOP or a frozen container, does
    not count. Before it aborts, it writes to `report` what was begun last and the stacks of
    all threads. A thread that holds Python's lock for ever holds up the watchdog too.
    """

    def __init__(self, seconds: float, report: Path):
        self._seconds, self._report = seconds, report
        self._woken, self._left = threading.Condition(), False
        self.beat("start")

    def beat(self, name: str) -> None:
        """Notes that work called `name` begins or ends now."""
        self._last = time.monotonic(), name

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self.beat("start")
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._woken:
            self._left = True
            self._woken.notify()

    def _watch(self) -> None:
        tick, looked = min(TICK, self._seconds / 4), time.monotonic()
        with self._woken:
            while not self._left:
                self._woken.wait(tick)
                now = time.monotonic()
                if now - looked > 2 * tick:  # this thread stood still too
                    began, name = self._last
                    self._last = began + (now - looked - tick), name
                looked = now
                if (still := now - self._last[0]) >= self._seconds:
                    self._abort(still)

    def _abort(self, still: float) -> None:
        line = f"watchdog: nothing has moved for {still:.0f} s since {self._last[1]!r}; stacks: {self._report}"
        with contextlib.suppress(OSError), open_no_follow(self._report, "w") as file:
            print(line, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        print(line, file=sys.stderr, flush=True)
        resource.setrlimit(
            resource.RLIMIT_CORE, (0, 0)
        )  # a core of all parameters helps nobody
        os.abort()
