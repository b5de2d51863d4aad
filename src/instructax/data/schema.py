"""Records of people's texts and judgements, read from JSON lines, every line checked.

One JSON object a line, `.jsonl` or `.jsonl.gz`, in UTF-8. Fields by kind of record, those
in brackets may be null or left out:

    Demonstration  id, prompt, format, completion, [source], [labeler], [meta]
    Comparison     id, prompt, completions, ranks, [pairs], [labeler], [source], [meta]
    Prompt         id, prompt, format, [kind], [user], [source], [meta]
    Text           id, text, [source], [meta]

A prompt is complete: what parts it from the response, such as a last "Assistant:", is part
of its text. `meta` is an object with whatever the data's authors noted; it is not kept. Any
other field is an error, so that a misspelt one is seen.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from instructax.config import ConfigError

MAX_LINE_BYTES = (
    64 * 2**20
)  # of the longest line: of one without an end, as a small gzip file may hold, no more is read


class DataError(ConfigError):
    """A line that cannot be used; reads `file:line: field: reason (value)`."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and the completion that a labeler wrote (paper, section 3.2)."""

    id: str
    prompt: str
    format: str  # "plain": the prompt is the text; "dialog": turns "\n\nHuman: …\n\nAssistant:", the last one open
    completion: str
    source: str | None
    labeler: str | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """K completions of a prompt, ranked by a labeler (paper, section 3.5)."""

    id: str
    prompt: str
    completions: tuple[str, ...]
    ranks: (
        tuple[int, ...] | None
    )  # 1 is best, equal numbers tie; None: the pairs fit no order
    pairs: tuple[
        tuple[int, int, int], ...
    ]  # (i, j, w): w = 1 i is better, -1 j is better, 0 tie
    labeler: str | None
    source: str | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt without a completion, for PPO."""

    id: str
    prompt: str
    format: str
    kind: str | None  # the use case (paper, table 1)
    user: str | None  # who sent it
    source: str | None


@dataclasses.dataclass(frozen=True)
class Text:
    """A document for pretraining."""

    id: str
    text: str
    source: str | None


DataRecord = Demonstration | Comparison | Prompt | Text
RecordT = TypeVar("RecordT", Demonstration, Comparison, Prompt, Text)


def read_jsonl(files: Sequence[Path], cls: type[RecordT]) -> Iterator[RecordT]:
    """Yields the records of `files`, which make one set: an id may occur once in all of
    them. Blank lines are skipped.

    Raises DataError at the first line that cannot be used, and for a file that cannot be
    read.
    """
    places: dict[str, str] = {}
    for file in files:
        for number, line in _lines(file):
            try:
                record = _record(line, cls)
                if record.id in places:
                    raise _Fault("id", f"already used at {places[record.id]}", record.id)
            except _Fault as fault:
                raise DataError(f"{file}:{number}: {fault}") from None
            places[record.id] = f"{file}:{number}"
            yield record


class _Fault(Exception):
    """What is wrong with a line: its text is `field: reason (value)`."""

    def __init__(self, field: str, reason: str, value: Any):
        shown = ascii(value)
        super().__init__(
            f"{field}: {reason} ({shown if len(shown) <= 60 else shown[:60] + '...'})"
        )


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) for the lines of `file` that are not blank, without byte
    order mark."""
    number = 0
    try:
        with (
            gzip.open(file, "rb")
            if str(file).endswith(".gz")
            else open(file, "rb") as stream
        ):
            for number, line in enumerate(
                iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1
            ):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{file}:{number}: line: longer than {MAX_LINE_BYTES} bytes: split the text"
                    )
                content = (
                    line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                ).strip(b" \t\r\n")
                if content:
                    yield number, content
    except EOFError:
        raise DataError(
            f"{file}:{number + 1}: file: gzip data ends too early ({file})"
        ) from None
    except (zlib.error, OSError) as error:
        place = f"{file}:{number + 1}: file" if number else f"{file}"
        raise DataError(f"{place}: cannot be read ({error})") from None


def _record(line: bytes, cls: type[RecordT]) -> RecordT:
    """Returns the record on `line`, or raises _Fault."""
    given = _json_object(line)
    fields = [field.name for field in dataclasses.fields(cls)]
    for name in given:
        if name not in fields and name != "meta":
            raise _Fault(
                name,
                f"not a field of {cls.__name__}, which has {', '.join(fields)}, meta",
                given[name],
            )
    if not isinstance(given.get("meta", {}), dict | None):
        raise _Fault("meta", "not an object", given["meta"])
    for name in fields:
        if name not in given and name not in _OPTIONAL:
            raise _Fault(name, "missing among the fields of this line", sorted(given))
    record = cls(**{name: _CHECKS[name](name, given.get(name)) for name in fields})
    if isinstance(record, Comparison):
        _check_judgement(record)
    return record


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        given = json.loads(
            line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_not_a_number
        )
    except UnicodeDecodeError as error:
        raise _Fault(
            "line", f"not UTF-8 at byte {error.start}", line[error.start : error.start + 8]
        ) from None
    except RecursionError:
        raise _Fault("line", "JSON is nested too deeply", line[:40]) from None
    except ValueError as error:  # malformed JSON, or a number with thousands of digits
        raise _Fault("line", f"not JSON: {error}", line[:40]) from None
    if not isinstance(given, dict):
        raise _Fault("line", "not a JSON object", given)
    return given


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Fault(
            next(name for name in names if names.count(name) > 1), "given twice", names
        )
    return given


def _not_a_number(constant: str):
    raise _Fault("line", "not JSON: a number must be finite", constant)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _Fault(name, "must be a string", value)
    if not value.strip():
        raise _Fault(name, "empty", value)
    try:
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
    return tuple(_text(f"{name}[{i}]", completion) for i, completion in enumerate(value))


def _ranks(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        type(rank) is int and rank >= 1 for rank in value
    ):
        raise _Fault(name, "must be null or a list of integers, 1 for the best", value)
    return tuple(value)


def _pairs(name: str, value: Any) -> tuple[tuple[int, int, int], ...]:
    if not isinstance(value, list | None):
        raise _Fault(name, "must be a list of [i, j, w]", value)
    for pair in value or ():
        if (
            not isinstance(pair, list)
            or len(pair) != 3
            or not all(type(number) is int for number in pair)
        ):
            raise _Fault(name, "must be a list of [i, j, w], three integers", pair)
    return tuple((i, j, w) for i, j, w in value or ())


def _check_judgement(comparison: Comparison) -> None:
    """Raises _Fault where ranks and pairs do not fit the completions."""
    completions = len(comparison.completions)
    if comparison.ranks is None and not comparison.pairs:
        raise _Fault("ranks", "null, and there are no pairs either", comparison.ranks)
    if comparison.ranks is not None and len(comparison.ranks) != completions:
        raise _Fault(
            "ranks",
            f"{len(comparison.ranks)} ranks for {completions} completions",
            list(comparison.ranks),
        )
    for pair in comparison.pairs:
        i, j, w = pair
        if not (
            0 <= i < completions and 0 <= j < completions and i != j and w in (-1, 0, 1)
        ):
            raise _Fault(
                "pairs",
                f"needs i and j in 0 .. {completions - 1}, i != j, and w in -1, 0, 1",
                list(pair),
            )
        ranks = comparison.ranks
        if ranks is not None and w != (ranks[j] > ranks[i]) - (ranks[j] < ranks[i]):
            raise _Fault("pairs", f"contradicts ranks {list(ranks)}", list(pair))


# One name means the same in every kind of record.
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
