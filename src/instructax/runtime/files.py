"""How files of a run are opened for writing."""

import os
from pathlib import Path
from typing import Any


def open_own(path: Path, mode: str) -> Any:
    """Opens a file of a run for writing, UTF-8 or with a "b" in `mode` bytes.

    Raises OSError for a symbolic link, which may lead out of the workdir.
    """
    encoding = None if "b" in mode else "utf-8"
    return open(
        path,
        mode,
        encoding=encoding,
        opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666),
    )
