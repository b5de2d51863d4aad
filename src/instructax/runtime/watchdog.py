"""Aborts a process that hangs.

A hung collective or a blocked reader would otherwise hold its devices forever.
"""

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

# Longest time between two checks, in seconds.
MAX_TICK = 5.0


class Watchdog:
    """Context manager: aborts the process after `seconds` without a `beat`.

    The process ends with SIGABRT, code 134, after the last event and the stacks of all
    threads have been written to `report`. Time during which the process itself was stopped,
    as by SIGSTOP or a frozen container, does not count. A thread that never releases
    Python's global lock also blocks the watchdog.

    Args:
      seconds: the limit; 0 disables the watchdog.
      report: the file for the stacks.
    """

    def __init__(self, seconds: float, report: Path):
        self._seconds = seconds
        self._report = report
        self._condition = threading.Condition()
        self._closed = False
        self.beat("start")

    def beat(self, name: str) -> None:
        """Records that the work called `name` begins or ends now."""
        # One tuple: the watching thread must not see the time of one event with the name of
        # another.
        self._last = (time.monotonic(), name)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self.beat("start")
            # A daemon: the interpreter must not wait for it at exit.
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _watch(self) -> None:
        # Often enough to abort at most a quarter too late.
        tick = min(MAX_TICK, self._seconds / 4)
        last_check = time.monotonic()
        with self._condition:
            while not self._closed:
                # Returns early when the context is left.
                self._condition.wait(tick)
                now = time.monotonic()
                if now - last_check > 2 * tick:
                    # This thread did not run either: the whole process was stopped.
                    began, name = self._last
                    self._last = (began + (now - last_check - tick), name)
                last_check = now
                idle = now - self._last[0]
                if idle >= self._seconds:
                    self._abort(idle)

    def _abort(self, idle: float) -> None:
        _, name = self._last
        line = (
            f"watchdog: nothing has moved for {idle:.0f} s since {name!r}; "
            f"stacks: {self._report}"
        )
        with contextlib.suppress(OSError), open_no_follow(self._report, "w") as file:
            print(line, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        print(line, file=sys.stderr, flush=True)
        # A core dump would write all parameters to disk.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()
