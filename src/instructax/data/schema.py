"""Records of people's texts and judgements, read from JSON lines and checked line by line.

One JSON object per line, `.jsonl` or `.jsonl.gz`, in UTF-8. Fields by kind of record; those
in brackets may be null or absent:

    Demonstration  id, prompt, format, completion, [source], [labeler], [meta]
    Comparison     id, prompt, completions, ranks, [pairs], [labeler], [source], [meta]
    Prompt         id, prompt, format, [kind], [user], [source], [meta]
    Text           id, text, [source], [meta]

A prompt is complete: whatever marks the start of the response, such as a last "Assistant:",
is part of it. `meta` is an object for notes of the data's authors and is not kept. Any
other field is an error, so that misspelled fields are noticed.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from instructax.config import ConfigError
from instructax.runtime.files import refuse_constant

# A small gzip file can expand to one endless line; reading stops here.
MAX_LINE_BYTES = 64 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Longer values are shortened in error messages.
_MAX_SHOWN_CHARS = 60


class DataError(ConfigError):
    """A line that cannot be used; reads `file:line: field: reason (value)`."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and the completion that a labeler wrote (paper, section 3.2)."""

    id: str
    prompt: str
    # "plain", or "dialog" for turns "\n\nHuman: …\n\nAssistant:" with the last one open.
    format: str
    completion: str
    source: str | None
    labeler: str | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """K completions of a prompt, ranked by a labeler (paper, section 3.5)."""

    id: str
    prompt: str
    completions: tuple[str, ...]
    # 1 is best, equal numbers tie; None if the pairs fit no order. Files count from 1,
    # the arrays of `types.Comparisons` from 0.
    ranks: tuple[int, ...] | None
    # (i, j, w): w = 1 if i is better, -1 if j is better, 0 if they tie.
    pairs: tuple[tuple[int, int, int], ...]
    labeler: str | None
    source: str | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt without a completion, for PPO."""

    id: str
    prompt: str
    format: str
    # The use case (paper, table 1).
    kind: str | None
    # Who sent it.
    user: str | None
    source: str | None


@dataclasses.dataclass(frozen=True)
class Text:
    """A document for pretraining."""

    id: str
    text: str
    source: str | None


DataRecord = Demonstration | Comparison | Prompt | Text
_RecordT = TypeVar("_RecordT", Demonstration, Comparison, Prompt, Text)


def read_jsonl(files: Sequence[Path], cls: type[_RecordT]) -> Iterator[_RecordT]:
    """Yields the records of `files`, skipping blank lines.

    The files form one data set, in which an id may occur only once. Raises DataError at the
    first bad line, and for a file that cannot be read.
    """
    # Id → file and line of its record.
    places: dict[str, str] = {}
    for file in files:
        for number, line in _lines(file):
            try:
                record = _parse_record(line, cls)
                if record.id in places:
                    raise _Fault("id", f"already used at {places[record.id]}", record.id)
            except _Fault as fault:
                raise DataError(f"{file}:{number}: {fault}") from None
            places[record.id] = f"{file}:{number}"
            yield record


class _Fault(Exception):
    """What is wrong with a line: its text is `field: reason (value)`."""

    def __init__(self, field: str, reason: str, value: Any):
        # ASCII, so that nothing in a data file can control the terminal.
        shown = ascii(value)
        if len(shown) > _MAX_SHOWN_CHARS:
            shown = shown[:_MAX_SHOWN_CHARS] + "..."
        super().__init__(f"{field}: {reason} ({shown})")


def _open(file: Path) -> IO[bytes]:
    if str(file).endswith(".gz"):
        return cast(IO[bytes], gzip.open(file, "rb"))
    return open(file, "rb")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of the non-blank lines, without a byte order mark."""
    number = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{file}:{number}: line: longer than {MAX_LINE_BYTES} bytes: "
                        "split the text"
                    )
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                content = line.strip(b" \t\r\n")
                if content:
                    yield number, content
    except EOFError:
        raise DataError(
            f"{file}:{number + 1}: file: gzip data ends too early ({file})"
        ) from None
    except (zlib.error, OSError) as error:
        # Without a number if the file could not even be opened.
        place = f"{file}:{number + 1}: file" if number else f"{file}"
        raise DataError(f"{place}: cannot be read ({error})") from None


def _parse_record(line: bytes, cls: type[_RecordT]) -> _RecordT:
    """Returns the record on `line`, or raises _Fault."""
    values = _parse_object(line)
    # The fields of the dataclass define the format.
    fields = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in fields and name != "meta":
            raise _Fault(
                name,
                f"not a field of {cls.__name__}, which has {', '.join(fields)}, meta",
                values[name],
            )
    if not isinstance(values.get("meta", {}), dict | None):
        raise _Fault("meta", "not an object", values["meta"])
    for name in fields:
        if name not in values and name not in _OPTIONAL:
            raise _Fault(name, "missing among the fields of this line", sorted(values))
    record = cls(**{name: _CHECKS[name](name, values.get(name)) for name in fields})
    if isinstance(record, Comparison):
        _check_ranks_and_pairs(record)
    return record


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(
            line.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise _Fault(
            "line", f"not UTF-8 at byte {error.start}", line[error.start : error.start + 8]
        ) from None
    except RecursionError:
        raise _Fault("line", "JSON is nested too deeply", line[:40]) from None
    except ValueError as error:
        # Malformed JSON, or a number with thousands of digits.
        raise _Fault("line", f"not JSON: {error}", line[:40]) from None
    if not isinstance(values, dict):
        raise _Fault("line", "not a JSON object", values)
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses keys that occur twice, of which `json` would keep the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _Fault(repeated, "given twice", names)
    return values


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _Fault(name, "must be a string", value)
    if not value.strip():
        raise _Fault(name, "empty", value)
    try:
        # JSON can write surrogates that UTF-8 cannot encode.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Fault(
            name, f"lone surrogate at character {error.start}", value[error.start]
        ) from None
    return value


def _optional_text(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _format(name: str, value: Any) -> str:
    if value not in ("plain", "dialog"):
        raise _Fault(name, 'must be "plain" or "dialog"', value)
    return value


def _completions(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Fault(name, "must be a list of strings", value)
    if len(value) < 2:
        raise _Fault(
            name, f"a comparison needs at least 2 completions, not {len(value)}", value
        )
    # An error names the completion by its index.
    return tuple(_text(f"{name}[{i}]", completion) for i, completion in enumerate(value))


def _ranks(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    reason = "must be null or a list of integers, 1 for the best"
    if not isinstance(value, list):
        raise _Fault(name, reason, value)
    for rank in value:
        # `type`, because True is an instance of int.
        if type(rank) is not int or rank < 1:
            raise _Fault(name, reason, value)
    return tuple(value)


def _pairs(name: str, value: Any) -> tuple[tuple[int, int, int], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _Fault(name, "must be a list of [i, j, w]", value)
    pairs = []
    for pair in value:
        is_triple = isinstance(pair, list) and len(pair) == 3
        if not is_triple or not all(type(number) is int for number in pair):
            raise _Fault(name, "must be a list of [i, j, w], three integers", pair)
        pairs.append(tuple(pair))
    return tuple(pairs)


def _check_ranks_and_pairs(comparison: Comparison) -> None:
    """Raises _Fault if ranks and pairs do not fit the completions or each other."""
    count = len(comparison.completions)
    ranks = comparison.ranks
    if ranks is None and not comparison.pairs:
        raise _Fault("ranks", "null, and there are no pairs either", ranks)
    if ranks is not None and len(ranks) != count:
        raise _Fault("ranks", f"{len(ranks)} ranks for {count} completions", list(ranks))
    for i, j, w in comparison.pairs:
        in_range = 0 <= i < count and 0 <= j < count and i != j
        if not in_range or w not in (-1, 0, 1):
            raise _Fault(
                "pairs",
                f"needs i and j in 0 .. {count - 1}, i != j, and w in -1, 0, 1",
                [i, j, w],
            )
        # The sign of (rank of j - rank of i): a lower rank is better.
        if ranks is not None and w != (ranks[j] > ranks[i]) - (ranks[j] < ranks[i]):
            raise _Fault("pairs", f"contradicts ranks {list(ranks)}", [i, j, w])


# A field name means the same in every kind of record.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "id": _text,
    "prompt": _text,
    "text": _text,
    "format": _format,
    "completion": _text,
    "completions": _completions,
    "ranks": _ranks,
    "pairs": _pairs,
    "labeler": _optional_text,
    "user": _optional_text,
    "kind": _optional_text,
    "source": _optional_text,
}
_OPTIONAL = frozenset({"pairs", "labeler", "user", "kind", "source"})
