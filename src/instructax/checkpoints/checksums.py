"""What a saved step holds, written beside it: `<step>.sha256.json` with the hash and the
size of every file.

The record is written twice: before the step, without files, with what must not be lost if
the process is killed before the step is hashed; and after it.
"""

import concurrent.futures
import hashlib
import json
from pathlib import Path
from typing import Any

from instructax.config import ConfigError

FORMAT = (
    1  # of a record and the step beside it; raised when an older program could misread them
)

FIELDS: dict[str, Any] = {
    "best_metric": str,
    "metric": (float, int, type(None)),
    "unevaluated": (dict, type(None)),
    "files": (dict, type(None)),
    "bytes": dict,
}  # and the types that each may have


class NewerFormatError(ConfigError):
    """A step that a newer version of this program has written."""


def record_path(step: Path) -> Path:
    """Where the record of the step in the folder `step` stands."""
    return step.with_name(f"{step.name}.sha256.json")


def read_record(step: Path) -> dict[str, Any] | None:
    """The record of a step; None if there is none. Of one that cannot be read `files` is {}
    and `unreadable` says why.

    Raises FromTheFuture.
    """
    path = record_path(step)
    if not path.exists():
        return None
    neutral = {
        "best_metric": "",
        "metric": None,
        "unevaluated": None,
        "files": None,
        "bytes": {},
    }
    try:
        record = {**neutral, **json.loads(path.read_text())}
        form = int(record.get("format", 1))
        wrong = [
            name for name, kinds in FIELDS.items() if not isinstance(record[name], kinds)
        ]
        if wrong and form <= FORMAT:
            raise TypeError(f"{', '.join(wrong)} of another type")
    except (ValueError, TypeError, OverflowError, RecursionError, OSError) as error:
        return {**neutral, "files": {}, "unreadable": str(error)}
    if form > FORMAT:
        raise NewerFormatError(
            f"{step} has format {form}, and this version reads {FORMAT}: update instructax"
        )
    return record


def digests(step: Path) -> dict[str, dict[str, Any]]:
    """`files`, relative name → sha256, and `bytes`, relative name → size, of every file
    under `step`."""

    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    files = sorted(file for file in step.rglob("*") if file.is_file())
    names = [str(file.relative_to(step)) for file in files]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        hashes = dict(zip(names, threads.map(digest, files), strict=True))
    return {
        "files": hashes,
        "bytes": {
            name: file.stat().st_size for name, file in zip(names, files, strict=True)
        },
    }


def has_checksums(step: Path) -> bool:
    """Whether the step was hashed after it was written."""
    record = read_record(step)
    return record is not None and bool(record["files"])


def find_damage(step: Path) -> list[str]:
    """One line for each file that is missing, of another size or differs from its sha256,
    by name; [] if there is no record to compare with. Raises FromTheFuture."""
    record = read_record(step)
    if record is None or record["files"] is None:
        return []
    if "unreadable" in record:
        return [f"{record_path(step)} cannot be read ({record['unreadable']})"]
    found = digests(step)
    return [
        line
        for name in record["files"]
        if (line := _damage(step / name, name, record, found))
    ]


def _damage(
    file: Path, name: str, record: dict[str, Any], found: dict[str, dict[str, Any]]
) -> str:
    if name not in found["files"]:
        return f"{file} is missing"
    have, wanted = found["bytes"][name], record["bytes"].get(name)
    if wanted not in (None, have):  # records of older versions have no sizes
        return f"{file} has {have} bytes instead of {wanted}"
    return (
        ""
        if found["files"][name] == record["files"][name]
        else f"{file} differs from its sha256"
    )


def unlisted_files(step: Path) -> list[str]:
    """One line for each file of a step that its record does not know: nothing reads it, but
    somebody put it there."""
    record = read_record(step)
    known = record["files"] if record is not None else None
    if known is None:
        return []
    files = sorted(
        str(file.relative_to(step)) for file in step.rglob("*") if file.is_file()
    )
    return [
        f"{step / name} is not among the files that were saved"
        for name in files
        if name not in known
    ]
