"""Being asked to stop: the first Ctrl-C or SIGTERM is noted, and answered between two
pieces of work.

A compiled program cannot be left before its end; what runs several, or one of them many
times, calls `check_stop_requested` between them.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, ClassVar

from instructax.runtime.distributed import any_host

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 1.0  # seconds that a second signal waits for the interpreter, which may be inside a compiled program


class StopRequested(Exception):
    """This process, or one that it works with, has been asked to stop."""


class GracefulShutdown:
    """While entered, the first SIGINT or SIGTERM sets `stop_requested`; a second one ends the
    program at once.

    A second one raises KeyboardInterrupt; where Python cannot raise it, because a compiled
    program runs, the process ends `GRACE` seconds later with the code 128 + signal.
    """

    current: ClassVar["GracefulShutdown | None"] = None

    def __enter__(self) -> "GracefulShutdown":
        self.stop_requested = False
        self._outer, GracefulShutdown.current = GracefulShutdown.current, self
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Python's own handlers wait for the interpreter; what stands in this pipe was
        # written when the signal came.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._woken = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._read,), daemon=True).start()
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True

    def _watch(self, pipe: int) -> None:
        received = b""
        while more := os.read(pipe, 64):
            received += bytes(number for number in more if number in SIGNALS)
            if len(received) > 1:
                time.sleep(GRACE)
                if GracefulShutdown.current is self:
                    os._exit(128 + received[-1])
        os.close(pipe)

    def __exit__(self, *_: Any) -> None:
        GracefulShutdown.current = self._outer
        signal.set_wakeup_fd(self._woken)
        os.close(self._write)
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def check_stop_requested() -> None:
    """Raises StopRequested if this or another process was asked to stop, within an
    `GracefulShutdown`; all processes must call."""
    if GracefulShutdown.current is not None and any_host(
        GracefulShutdown.current.stop_requested
    ):
        raise StopRequested
