"""Graceful shutdown: the first Ctrl-C or SIGTERM is handled between two programs.

A compiled program cannot be left before its end. Code that runs several of them, or one of
them many times, calls `check_stop_requested` in between.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, ClassVar

from instructax.runtime.distributed import any_host

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Seconds that a second signal waits for Python, which may be inside a compiled program.
GRACE_SECONDS = 1.0


class StopRequested(Exception):
    """This process, or another one of the run, has been asked to stop."""


class GracefulShutdown:
    """Context manager: the first SIGINT or SIGTERM sets `stop_requested`.

    A second one raises KeyboardInterrupt. Where Python cannot raise it, because a compiled
    program is running, the process ends `GRACE_SECONDS` later with the code 128 + signal.
    """

    # The innermost active context, for `check_stop_requested`.
    current: ClassVar["GracefulShutdown | None"] = None

    def __enter__(self) -> "GracefulShutdown":
        self.stop_requested = False
        self._outer = GracefulShutdown.current
        GracefulShutdown.current = self
        self._previous_handlers = {}
        for number in SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._handle)

        # Python's handlers only run between bytecodes. The interpreter writes the signal's
        # number to this pipe at once, so a thread can act while a compiled program runs.
        read_end, self._write_end = os.pipe()
        # A signal handler must never block on a full pipe.
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read_end,), daemon=True).start()
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A second signal.
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True

    def _watch(self, pipe: int) -> None:
        """Ends the process after a second signal; returns when the pipe is closed."""
        received = b""
        while data := os.read(pipe, 64):
            # Signals with other handlers write to the pipe too.
            received += bytes(number for number in data if number in SIGNALS)
            if len(received) > 1:
                time.sleep(GRACE_SECONDS)
                # Still inside the context: Python has not raised KeyboardInterrupt.
                if GracefulShutdown.current is self:
                    os._exit(128 + received[-1])
        os.close(pipe)

    def __exit__(self, *_: Any) -> None:
        # First, so that the watching thread does not end a process that is already
        # stopping.
        GracefulShutdown.current = self._outer
        signal.set_wakeup_fd(self._previous_fd)
        # The thread's read then returns nothing, and it ends.
        os.close(self._write_end)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)


def check_stop_requested() -> None:
    """Raises StopRequested if this or another process has been asked to stop.

    Does nothing outside a `GracefulShutdown`. Collective: all processes must call it.
    """
    shutdown = GracefulShutdown.current
    # Signals reach processes at different times: agree before anyone leaves.
    if shutdown is not None and any_host(shutdown.stop_requested):
        raise StopRequested
