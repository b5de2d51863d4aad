"""What a run is at, in a file: for those who look at it from outside, and after it was
killed."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from instructax.runtime.files import open_no_follow

LENGTH = 128  # bytes of the file; it is written in place by one call, so a reader finds one beat or the next


class Heartbeat:
    """Keeps the last beat in the file `path`: one line of JSON with pid, phase and Unix
    time."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_no_follow(path, "wb")

    def beat(self, name: str) -> None:
        """Notes that work called `name` begins or ends now."""
        line = json.dumps(
            {"pid": os.getpid(), "phase": name, "unix": round(time.time(), 3)}
        )
        with contextlib.suppress(
            OSError
        ):  # a full disk is the business of what must be written
            os.pwrite(self._file.fileno(), f"{line:<{LENGTH - 1}}\n".encode(), 0)

    def close(self) -> None:
        """No more beats."""
        self._file.close()


def last_beat(path: Path) -> dict[str, Any]:
    """The last beat in a file; {} if there was none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # absent, or opened just now
        return {}
