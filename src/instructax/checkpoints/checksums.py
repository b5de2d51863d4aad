"""The record of a saved step: `<step>.sha256.json` with the hash and size of every file.

The record is written twice. Before the step it is written without hashes, so that a process
killed before hashing does not lose its other entries, and after the step with them.
"""

import concurrent.futures
import hashlib
import json
from pathlib import Path
from typing import Any

from instructax.config import ConfigError

# Format of a step and its record. Raise it when older programs could misread them; they
# refuse a higher number.
FORMAT = 1

# The entries of a record and their types.
RECORD_FIELDS: dict[str, Any] = {
    "best_metric": str,
    "best_mode": str,
    "metric": (float, int, type(None)),
    "unevaluated": (dict, type(None)),
    "files": (dict, type(None)),  # name → sha256; None if the step was not hashed
    "bytes": dict,  # name → size
}

# Values of entries that a record does not have, such as records of earlier versions.
DEFAULTS: dict[str, Any] = {
    "best_metric": "",
    "best_mode": "",
    "metric": None,
    "unevaluated": None,
    "files": None,
    "bytes": {},
}


class NewerFormatError(ConfigError):
    """A newer version of this program has written the step."""


def record_path(step: Path) -> Path:
    """The path of the record of the step in the folder `step`."""
    return step.with_name(f"{step.name}.sha256.json")


def read_record(step: Path) -> dict[str, Any] | None:
    """Reads the record of the step in the folder `step`; None if it has no record.

    If it cannot be read, `files` is {} and the additional entry `unreadable` says why.

    Raises:
      NewerFormatError: a newer version of this program has written the step.
    """
    path = record_path(step)
    if not path.exists():
        return None
    try:
        record = {**DEFAULTS, **json.loads(path.read_text())}
        # Records of the first version do not name their format.
        version = int(record.get("format", 1))
        wrong = [
            name
            for name in RECORD_FIELDS
            if not isinstance(record[name], RECORD_FIELDS[name])
        ]
        if wrong and version <= FORMAT:  # a newer format may have other types
            raise TypeError(f"{', '.join(wrong)} of another type")
    # Everything that damaged JSON can cause, deep nesting and huge numbers included.
    except (ValueError, TypeError, OverflowError, RecursionError, OSError) as error:
        return {**DEFAULTS, "files": {}, "unreadable": str(error)}
    if version > FORMAT:
        raise NewerFormatError(
            f"{step} has format {version}, and this version reads {FORMAT}: update "
            "instructax"
        )
    return record


def hash_files(step: Path) -> dict[str, dict[str, Any]]:
    """`files`, relative name → sha256, and `bytes`, relative name → size, under `step`."""

    def sha256(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    # Sorted, so that records of equal steps are equal files.
    paths = _files_under(step)
    # hashlib releases the interpreter lock, so threads use all cores.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        hashes = list(threads.map(sha256, paths.values()))
    return {
        "files": dict(zip(paths, hashes, strict=True)),
        "bytes": {name: path.stat().st_size for name, path in paths.items()},
    }


def _files_under(step: Path) -> dict[str, Path]:
    """Name relative to the folder `step` → path of each file in it, sorted by path."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    return {str(path.relative_to(step)): path for path in files}


def has_checksums(step: Path) -> bool:
    """Whether the step was hashed after it was written."""
    record = read_record(step)
    # An unreadable record has {} here, which counts as not hashed.
    return record is not None and bool(record["files"])


def find_damage(step: Path) -> list[str]:
    """Compares the files of a step with its record.

    Returns:
      One line for each file that is missing, or differs in size or sha256; [] if there is
      no record to compare with.

    Raises:
      NewerFormatError: a newer version of this program has written the step.
    """
    record = read_record(step)
    # Not an error: a process killed before hashing leaves such steps.
    if record is None or record["files"] is None:
        return []
    if "unreadable" in record:
        return [f"{record_path(step)} cannot be read ({record['unreadable']})"]
    # Hashes everything, also files that the record does not list; see `unlisted_files`.
    found = hash_files(step)
    lines = []
    for name in record["files"]:
        if line := _file_damage(step / name, name, record, found):
            lines.append(line)
    return lines


def _file_damage(
    file: Path, name: str, record: dict[str, Any], found: dict[str, dict[str, Any]]
) -> str:
    # The cheapest difference first: missing, size, content.
    if name not in found["files"]:
        return f"{file} is missing"
    size = found["bytes"][name]
    # Records of earlier versions have no sizes.
    expected = record["bytes"].get(name)
    if expected is not None and size != expected:
        return f"{file} has {size} bytes instead of {expected}"
    if found["files"][name] != record["files"][name]:
        return f"{file} differs from its sha256"
    return ""


def unlisted_files(step: Path) -> list[str]:
    """One line for each file of a step that its record does not list.

    Nothing reads such a file, so it is no damage, but someone has put it there.
    """
    record = read_record(step)
    if record is None or record["files"] is None:
        return []
    lines = []
    for name in _files_under(step):
        if name not in record["files"]:
            lines.append(f"{step / name} is not among the files that were saved")
    return lines
