"""Writes the files of a run: never through a symbolic link, and JSON files atomically.

JSON has no NaN and no infinities: non-finite numbers are written as null.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructax.config import ConfigError


def open_no_follow(path: Path, mode: str) -> Any:
    """Opens a file of a run for writing, as UTF-8 text unless `mode` contains "b".

    Raises OSError if `path` is a symbolic link, which could lead out of the workdir.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    encoding = None if "b" in mode else "utf-8"
    return open(path, mode, encoding=encoding, opener=opener)


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Replaces the content of `path` by `lines`.

    Whenever the process dies, `path` holds either its old content or all of the new.
    """
    # Renaming is atomic only within a file system, so the temporary file is a neighbor.
    temporary = path.with_name(path.name + ".tmp")
    with open_no_follow(temporary, "w") as file:
        file.writelines(lines)
        # The new content must be on disk before the rename, or a crash could leave an empty
        # file.
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def to_jsonable(value: Any) -> Any:
    """Converts `value` to JSON types.

    Tuples and arrays become (nested) lists, NaN and infinities None. Values of other types
    are returned as they are, and `json.dumps` rejects them.
    """
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    # Also scalars of NumPy, which `json` does not know.
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return to_jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` atomically, converted by `to_jsonable`.

    Raises TypeError for a value that JSON cannot express; `path` then stays as it was.
    """
    # Before the file is opened: a value that cannot be converted must not touch it.
    text = json.dumps(to_jsonable(value), indent=2, allow_nan=False)
    write_atomically(path, [text + "\n"])


def refuse_constant(constant: str) -> None:
    """For `parse_constant` of `json.loads`: refuses NaN and Infinity, which Python's `json`
    accepts. Raises ValueError."""
    raise ValueError(f"{constant} is not a JSON number: a number must be finite")


def read_json_lines(path: Path) -> list[Any]:
    """Returns the value on each line of a JSONL file that a run wrote.

    Raises ConfigError with the line number if a line is not valid JSON.
    """
    # Logs have a few thousand lines: they are read at once.
    values = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            message = f"{path}, line {number}, is not valid JSON: run the stage again"
            raise ConfigError(message) from None
    return values


def rewind(path: Path, start_step: int) -> None:
    """Keeps the lines of a JSONL log up to `start_step`; none if `start_step` is 0.

    Lines that are not JSON objects with a step are dropped, such as the half line of a
    killed run.
    """
    if not path.exists():
        return
    with path.open(errors="replace") as old:
        # Generators: a log can be larger than memory.
        whole_lines = (line for line in old if line.endswith("\n"))
        kept = (
            line for line in whole_lines if start_step > 0 and _step_of(line) <= start_step
        )
        write_atomically(path, kept)


def _step_of(line: str) -> float:
    """The step of a log line; infinity if the line has none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.inf
