"""Records the current phase of a process in a file, for reports on hung or killed runs."""

import contextlib
import json
import os
import time
from pathlib import Path

from instructax.runtime.files import open_no_follow

# Size of the file in bytes. It is overwritten in place by one system call, so a reader
# never sees half a heartbeat.
LENGTH = 128


class Heartbeat:
    """Keeps the last event in a file: one line of JSON with pid, phase and Unix time."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered writes go through `os.pwrite`, see `beat`.
        self._file = open_no_follow(path, "wb")

    def beat(self, name: str) -> None:
        """Records that the work called `name` begins or ends now."""
        event = {"pid": os.getpid(), "phase": name, "unix": round(time.time(), 3)}
        # Padded to a fixed length: a shorter event must overwrite all of a longer one.
        line = f"{json.dumps(event):<{LENGTH - 1}}\n"
        # A full disk must not end the run here; whatever has to be written will report it.
        with contextlib.suppress(OSError):
            os.pwrite(self._file.fileno(), line.encode(), 0)

    def close(self) -> None:
        """Closes the file; the last event stays in it."""
        self._file.close()
