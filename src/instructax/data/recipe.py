"""The pipeline from files of records to cached rows: read, filter, split, tokenize, pack.

A `Recipe` says what is special about one kind of record; `run_recipe` does the rest.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import ConfigError
from instructax.data import filters
from instructax.data.limits import DataLimits
from instructax.data.prompt_format import PromptFormat, add_separator
from instructax.data.schema import Comparison, DataError, Demonstration, Text, read_jsonl
from instructax.data.storage import (
    PreparationReport,
    PreparedData,
    RowsBySplit,
    read_rows,
    write_rows,
)
from instructax.data.tokenizer import Tokenizer

# Increase with any change to what the same records become on disk.
ROWS_VERSION = 2

# Text → its token ids.
TokenIds = Mapping[str, np.ndarray]
# A rule's name, and the function that keeps the records that pass it.
Filter = tuple[str, Callable[[list[Any]], list[Any]]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one kind of record becomes rows."""

    kind: str
    record: type[Any]
    builder: type[Any]
    # Applied in this order before the split.
    filters: Sequence[Filter]
    # Applied after the split, when texts have token ids.
    length_filters: Callable[[TokenIds], Sequence[Filter]]
    # (records, token ids, labeler → index) → rows.
    rows: Callable[[list[Any], TokenIds, Mapping[str, int]], list[dict[str, Any]]]
    # Tokens of one row in a batch, padding included.
    row_tokens: int


def run_recipe(
    recipe: Recipe,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    data_dir: Path,
    prompt_format: PromptFormat,
) -> PreparedData:
    """Opens the rows of `recipe` for these inputs, preparing them if no process has done so
    yet."""
    # The hash names the folder, so changed inputs never meet old rows.
    content_hash = _content_hash(recipe.kind, files, tokenizer, limits, prompt_format)
    folder = data_dir / f"{recipe.kind}-{content_hash[:16]}"
    if not folder.exists():
        rows, report = _prepare(
            recipe, files, tokenizer, limits, prompt_format, content_hash
        )
        write_rows(recipe.builder, folder, rows, report)
    return read_rows(recipe.builder, folder)


def _content_hash(
    kind: str,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    prompt_format: PromptFormat,
) -> str:
    """SHA-256, in hex, of everything that decides the rows."""
    file_hashes = []
    for file in files:
        try:
            with open(file, "rb") as stream:
                file_hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error})") from None
    # The order and the types of this list are part of the hash.
    inputs = [ROWS_VERSION, kind, tokenizer.hash, dataclasses.asdict(limits), file_hashes]
    # Earlier versions split these tokens, so the same tokenizer gave other rows.
    if tokenizer.added_text_tokens():
        inputs.append("added tokens are text")
    # Plain text adds nothing, which keeps the hashes from before formats existed.
    if prompt_format.hash:
        inputs.append(prompt_format.hash)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _prepare(
    recipe: Recipe,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    prompt_format: PromptFormat,
    content_hash: str,
) -> tuple[RowsBySplit, PreparationReport]:
    """Returns the rows of every split, and the report."""
    records = _read_records(recipe, files)
    # Before any filter: the index of a labeler depends on the files alone.
    labelers = _labeler_indices(records)
    dropped: dict[str, int] = {}

    # Filters on text, over all splits.
    record_filters = list(recipe.filters)
    if prompt_format.reserved:
        reserved: Filter = (
            "reserved",
            lambda records: filters.drop_containing(records, prompt_format.reserved),
        )
        record_filters.insert(0, reserved)
    splits = _split(_apply(record_filters, records, dropped), limits)
    if limits.filter_pii:
        splits["train"] = _apply([("pii", filters.drop_pii)], splits["train"], dropped)

    # Format and tokenize, then filter on lengths.
    kept: dict[str, int] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, members in splits.items():
        formatted = [_format_record(record, prompt_format) for record in members]
        token_ids = _tokenize(formatted, tokenizer, prompt_format)
        short = _apply(recipe.length_filters(token_ids), formatted, dropped)
        kept[split] = len(short)
        rows[split] = recipe.rows(short, token_ids, labelers)

    # Only now, so that the message can list what all splits dropped.
    for split, members in splits.items():
        if not rows[split]:
            raise ConfigError(
                f"split {split!r} of {recipe.kind} is empty: of {len(records)} records in "
                f"{len(files)} files, {len(members)} reached it before the limits on "
                f"tokens; dropped by rule, in all splits: {dropped}; change "
                "config.data.limits.splits or the limit that drops them, or give more data"
            )
    return rows, _report(recipe, content_hash, len(records), dropped, kept, rows, labelers)


def _read_records(recipe: Recipe, files: Sequence[Path]) -> list[Any]:
    if not files:
        raise ConfigError(f"no files of {recipe.kind}: give at least one")
    records = [_with_separator(record) for record in read_jsonl(files, recipe.record)]
    if not records:
        raise ConfigError(
            f"no {recipe.kind} in {', '.join(map(str, files))}: the files have no records"
        )
    return records


def _with_separator(record: Any) -> Any:
    # Pretraining text has no prompt.
    if isinstance(record, Text):
        return record
    return dataclasses.replace(record, prompt=add_separator(record.prompt))


def _labeler_indices(records: Sequence[Any]) -> dict[str, int]:
    """Labeler → index, in alphabetical order."""
    # Texts and prompts have no labeler.
    names = set()
    for record in records:
        if getattr(record, "labeler", None):
            names.add(str(record.labeler))
    return {name: index for index, name in enumerate(sorted(names))}


def _format_record(record: Any, prompt_format: PromptFormat) -> Any:
    if isinstance(record, Text):
        return record
    # Only the fields that a model reads or writes change.
    changes: dict[str, Any] = {"prompt": prompt_format.prompt(record.prompt)}
    if isinstance(record, Demonstration):
        changes["completion"] = prompt_format.answer(record.completion)
    if isinstance(record, Comparison):
        changes["completions"] = tuple(map(prompt_format.answer, record.completions))
    return dataclasses.replace(record, **changes)


def _split(records: Sequence[Any], limits: DataLimits) -> dict[str, list[Any]]:
    # Every split has an entry, even if it gets no record.
    splits: dict[str, list[Any]] = {name: [] for name, _ in limits.splits}
    for record in records:
        key = filters.split_key(record)
        splits[filters.split_of(key, limits.splits, limits.split_seed)].append(record)
    return splits


def _apply(
    rules: Sequence[Filter], records: list[Any], dropped: dict[str, int]
) -> list[Any]:
    """Returns the records that pass all rules, and adds to `dropped` what each rule
    drops."""
    for rule, keep in rules:
        kept = keep(records)
        # A rule runs once per split, and its counts add up.
        dropped[rule] = dropped.get(rule, 0) + len(records) - len(kept)
        records = kept
    return records


def _tokenize(
    records: Sequence[Any], tokenizer: Tokenizer, prompt_format: PromptFormat
) -> TokenIds:
    """The token ids of every text of `records`, each text encoded once."""
    # A dict keeps the order of the texts and drops duplicates.
    unique: dict[str, None] = {}
    for record in records:
        unique.update(dict.fromkeys(filters.record_texts(record)))
    texts = list(unique)
    # One batch for all texts: the tokenizer encodes it on all cores.
    token_ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    # Formatted prompts may contain special tokens, which ordinary encoding ignores.
    if prompt_format.encode is not None:
        for record in records:
            if not isinstance(record, Text):
                token_ids[record.prompt] = prompt_format.encode(record.prompt)
    return token_ids


def _report(
    recipe: Recipe,
    content_hash: str,
    num_records: int,
    dropped: dict[str, int],
    kept: dict[str, int],
    rows: dict[str, list[dict[str, Any]]],
    labelers: Mapping[str, int],
) -> PreparationReport:
    num_rows: dict[str, int] = {}
    tokens: dict[str, int] = {}
    longest: dict[str, int] = {}
    padding: dict[str, float] = {}
    for split, split_rows in rows.items():
        # Real tokens of each row.
        lengths = [_count_tokens(row) for row in split_rows]
        num_rows[split] = len(split_rows)
        tokens[split] = sum(lengths)
        longest[split] = max(lengths)
        padding[split] = 1 - tokens[split] / (num_rows[split] * recipe.row_tokens)
    return PreparationReport(
        hash=content_hash,
        records=num_records,
        dropped=dropped,
        kept=kept,
        rows=num_rows,
        tokens=tokens,
        longest=longest,
        padding=padding,
        labelers=list(labelers),
    )


def _count_tokens(row: Mapping[str, Any]) -> int:
    """Real tokens of a stored row of any kind."""
    count = 0
    for name in ("tokens", "prompt", "responses"):
        if name in row:
            count += len(row[name])
    return count
