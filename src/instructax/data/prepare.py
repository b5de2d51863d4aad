"""From files of records to rows on disk: read, filter, split, tokenise, pack, write once.

The rows depend on the files' bytes, the tokenizer, the limits, the wording and
`ROWS_VERSION` alone; their hash names the folder, so the same call reuses it and any change
prepares anew. The paper filters by length too (appendix C) and says no more; here a
demonstration that does not fit is dropped, never cut, and of a comparison the completions
that do not fit are taken out. All records of one call are in memory while they are
prepared.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import ConfigError
from instructax.data import document_packing
from instructax.data import filters as hygiene
from instructax.data.limits import DataLimits
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat, add_separator
from instructax.data.schema import (
    Comparison,
    DataError,
    Demonstration,
    Prompt,
    Text,
    read_jsonl,
)
from instructax.data.storage import (
    ComparisonRows,
    PackedRows,
    PreparationReport,
    PreparedData,
    PromptRows,
    Rows,
    read_rows,
    write_rows,
)
from instructax.data.tokenizer import Tokenizer

ROWS_VERSION = 2  # raise it with any change to what the same records become on disk

Ids = Mapping[str, np.ndarray]  # the token ids of a text
Filter = tuple[
    str, Callable[[list[Any]], list[Any]]
]  # a rule, and what keeps the records that pass it


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How one kind of record becomes rows."""

    kind: str
    record: type[Any]
    builder: type[Any]
    filters: Sequence[Filter]  # in this order, before the split
    length_filters: Callable[[Ids], Sequence[Filter]]  # after it
    rows: Callable[
        [list[Any], Ids, Mapping[str, int]], list[dict[str, Any]]
    ]  # records, ids, labelers' indices
    cells: int  # of one row in a batch, padding included


def prepare_text(
    files: Sequence[Path], tokenizer: Tokenizer, limits: DataLimits, data_dir: Path
) -> PreparedData:
    """Returns pretraining text as packed rows of T tokens, prepared or reused;
    `batches.lm_batch` reads them.

    Raises DataError for a file or line that cannot be used, and ValueError for a split that
    has no row.
    """
    length = limits.sequence_tokens

    def rows(
        records: list[Text], ids: Ids, labelers: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        texts = [
            document_packing.text_documents(ids[record.text], tokenizer.eos_id, length)
            for record in records
        ]
        return _packed([document for documents in texts for document in documents], length)

    recipe = _Recipe("text", Text, PackedRows, [], lambda ids: [], rows, length)
    return _prepare(recipe, files, tokenizer, limits, data_dir, PLAIN_FORMAT)


def prepare_demonstrations(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    data_dir: Path,
    prompt_format: PromptFormat = PLAIN_FORMAT,
) -> PreparedData:
    """Returns demonstrations as packed rows of T tokens, prepared or reused;
    `batches.lm_batch` reads them.

    Raises DataError for a file or line that cannot be used, and ValueError for a split that
    has no row.
    """
    length = limits.sequence_tokens

    def length_filters(ids: Ids) -> Sequence[Filter]:
        return [
            _prompt_filter(limits, ids),
            _length_filter(
                "completion_tokens",
                limits.response_tokens - 1,
                lambda record: len(ids[record.completion]),
            ),
            _length_filter(
                "sequence_tokens",
                length - 1,
                lambda r: len(ids[r.prompt]) + len(ids[r.completion]),
            ),
        ]

    def rows(
        records: list[Demonstration], ids: Ids, labelers: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        eos = tokenizer.eos_id
        for record in records:
            _check_end(record, ids[record.completion], eos)
        return _packed(
            [
                document_packing.demonstration_document(
                    ids[r.prompt], ids[r.completion], eos
                )
                for r in records
            ],
            length,
        )

    filters = _prefix_filters(limits)
    recipe = _Recipe(
        "demonstrations", Demonstration, PackedRows, filters, length_filters, rows, length
    )
    return _prepare(recipe, files, tokenizer, limits, data_dir, prompt_format)


def prepare_prompts(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    data_dir: Path,
    prompt_format: PromptFormat = PLAIN_FORMAT,
) -> PreparedData:
    """Returns prompts, prepared or reused; `batches.prompt_batch` reads them with P =
    `limits.prompt_tokens`.

    Raises DataError for a file or line that cannot be used, and ValueError for a split that
    has no row.
    """
    filters = _prefix_filters(limits)
    cap = limits.prompts_per_user
    if cap is not None:
        filters.append(
            ("prompts_per_user", lambda records: hygiene.cap_per_user(records, cap))
        )

    def rows(
        records: list[Prompt], ids: Ids, labelers: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        return [{"tokens": ids[record.prompt]} for record in records]

    recipe = _Recipe(
        "prompts",
        Prompt,
        PromptRows,
        filters,
        lambda ids: [_prompt_filter(limits, ids)],
        rows,
        limits.prompt_tokens,
    )
    return _prepare(recipe, files, tokenizer, limits, data_dir, prompt_format)


def prepare_comparisons(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    data_dir: Path,
    prompt_format: PromptFormat = PLAIN_FORMAT,
) -> PreparedData:
    """Returns comparisons, prepared or reused; `batches.comparison_batch` reads them with
    P, K, R of `limits`.

    Comparisons of one prompt all stay, since several labelers may judge it. Raises
    DataError for a file or line that cannot be used, and ValueError for a split that has no
    row.
    """
    room = limits.response_tokens - 1  # beside the end token

    def length_filters(ids: Ids) -> Sequence[Filter]:
        return [
            _prompt_filter(limits, ids),
            (
                "response_tokens",
                lambda kept: hygiene.drop_long_completions(
                    kept, room, lambda text: len(ids[text])
                ),
            ),
            (
                "completions",
                lambda kept: hygiene.drop_many_completions(kept, limits.completions),
            ),
            ("tied", hygiene.drop_tied),
        ]

    def rows(
        records: list[Comparison], ids: Ids, labelers: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        return [
            _comparison_row(record, ids, labelers, tokenizer.eos_id) for record in records
        ]

    cells = limits.comparison_tokens
    filters = [("unranked", hygiene.drop_unranked)]
    recipe = _Recipe(
        "comparisons", Comparison, ComparisonRows, filters, length_filters, rows, cells
    )
    return _prepare(recipe, files, tokenizer, limits, data_dir, prompt_format)


def _check_end(record: Demonstration, completion: np.ndarray, eos_id: int) -> None:
    """Raises DataError unless the end token that will be put behind a completion is the
    only one to be trained."""
    if np.any(completion == eos_id):
        raise DataError(
            f"demonstration {record.id!r}: completion: its tokens hold the end token {eos_id} before their end, as an "
            "unknown character does where the tokenizer has one token for both: name another as eos_token, or change it"
        )


def _prefix_filters(limits: DataLimits) -> list[Filter]:
    length = limits.prefix_characters
    return (
        []
        if length is None
        else [("prefix_characters", lambda kept: hygiene.drop_shared_prefix(kept, length))]
    )


def _prompt_filter(limits: DataLimits, ids: Ids) -> Filter:
    return _length_filter(
        "prompt_tokens", limits.prompt_tokens, lambda record: len(ids[record.prompt])
    )


def _length_filter(rule: str, limit: int, count_tokens: Callable[[Any], int]) -> Filter:
    return rule, lambda kept: hygiene.drop_long(kept, limit, count_tokens)


def _packed(
    documents: Sequence[document_packing.Document], length: int
) -> list[dict[str, Any]]:
    return [vars(row) for row in document_packing.pack_documents(documents, length)]


def _comparison_row(
    record: Comparison, ids: Ids, labelers: Mapping[str, int], eos_id: int
) -> dict[str, Any]:
    responses = [
        np.append(ids[completion], eos_id).astype(np.int32)
        for completion in record.completions
    ]
    return {
        "prompt": ids[record.prompt],
        "responses": np.concatenate(responses),
        "lengths": np.array([len(response) for response in responses], np.int32),
        "ranks": np.array(hygiene.dense_ranks(record.ranks or ()), np.int32),
        "labeler": labelers.get(record.labeler or "", -1),
    }


def _prepare(
    recipe: _Recipe,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    data_dir: Path,
    prompt_format: PromptFormat,
) -> PreparedData:
    """Opens the rows of `recipe` for these inputs, after making them if no process has done
    so."""
    content = _hash(recipe.kind, files, tokenizer, limits, prompt_format)
    folder = data_dir / f"{recipe.kind}-{content[:16]}"
    if not folder.exists():
        rows, report = _make(recipe, files, tokenizer, limits, prompt_format, content)
        write_rows(recipe.builder, folder, rows, report)
    return read_rows(recipe.builder, folder)


def _make(
    recipe: _Recipe,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    prompt_format: PromptFormat,
    content: str,
) -> tuple[Rows, PreparationReport]:
    """Returns the rows of every split, and the report; `content` is the hash of the other
    arguments."""
    if not files:
        raise ConfigError(f"no files of {recipe.kind}: give at least one")
    records = [_opened(record) for record in read_jsonl(files, recipe.record)]
    names = {str(record.labeler) for record in records if getattr(record, "labeler", None)}
    labelers = {name: index for index, name in enumerate(sorted(names))}
    if not records:
        raise ConfigError(
            f"no {recipe.kind} in {', '.join(map(str, files))}: each holds no line"
        )
    dropped: dict[str, int] = {}
    reserved = (
        [("reserved", lambda kept: hygiene.drop_containing(kept, prompt_format.reserved))]
        if prompt_format.reserved
        else []
    )
    splits = _splits(_filtered(records, [*reserved, *recipe.filters], dropped), limits)
    if limits.filter_pii:
        splits["train"] = _filtered(splits["train"], [("pii", hygiene.drop_pii)], dropped)
    kept, rows = {}, {}
    for split, members in splits.items():
        members = [_worded(record, prompt_format) for record in members]
        ids = _token_ids(members, tokenizer, prompt_format)
        kept[split] = _filtered(members, recipe.length_filters(ids), dropped)
        rows[split] = recipe.rows(kept[split], ids, labelers)
    for split, members in splits.items():
        if not rows[split]:
            raise ConfigError(
                f"split {split!r} of {recipe.kind} is empty: of {len(records)} records in {len(files)} files, "
                f"{len(members)} came to it before the limits on tokens; dropped by rule, in all splits: {dropped}; "
                "change Limits.splits or the limit that drops them, or give more data"
            )
    tokens = {split: sum(map(_count_tokens, rows[split])) for split in rows}
    report = PreparationReport(
        hash=content,
        records=len(records),
        dropped=dropped,
        kept={split: len(kept[split]) for split in rows},
        rows={split: len(rows[split]) for split in rows},
        tokens=tokens,
        longest={split: max(map(_count_tokens, rows[split])) for split in rows},
        padding={
            split: 1 - tokens[split] / (len(rows[split]) * recipe.cells) for split in rows
        },
        labelers=list(labelers),
    )
    return rows, report


def _opened(record: Any) -> Any:
    return (
        record
        if isinstance(record, Text)
        else dataclasses.replace(record, prompt=add_separator(record.prompt))
    )


def _worded(record: Any, prompt_format: PromptFormat) -> Any:
    if isinstance(record, Text):
        return record
    changes: dict[str, Any] = {"prompt": prompt_format.prompt(record.prompt)}
    if isinstance(record, Demonstration):
        changes["completion"] = prompt_format.answer(record.completion)
    if isinstance(record, Comparison):
        changes["completions"] = tuple(map(prompt_format.answer, record.completions))
    return dataclasses.replace(record, **changes)


def _splits(records: Sequence[Any], limits: DataLimits) -> dict[str, list[Any]]:
    splits: dict[str, list[Any]] = {name: [] for name, _ in limits.splits}
    for record in records:
        splits[
            hygiene.split_of(hygiene.split_key(record), limits.splits, limits.split_seed)
        ].append(record)
    return splits


def _hash(
    kind: str,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    prompt_format: PromptFormat,
) -> str:
    """Returns the sha256, in hex, of all that decides the rows."""
    contents = []
    for file in files:
        try:
            with open(file, "rb") as stream:
                contents.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error})") from None
    decisive = [ROWS_VERSION, kind, tokenizer.hash, dataclasses.asdict(limits), contents]
    decisive += [prompt_format.hash] if prompt_format.hash else []
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _filtered(
    records: list[Any], filters: Sequence[Filter], dropped: dict[str, int]
) -> list[Any]:
    """Returns the records that all filters keep, and adds to `dropped` what each rule took."""
    for rule, keep in filters:
        kept = keep(records)
        dropped[rule] = dropped.get(rule, 0) + len(records) - len(kept)
        records = kept
    return records


def _token_ids(
    records: Sequence[Any], tokenizer: Tokenizer, prompt_format: PromptFormat
) -> Ids:
    """Returns the ids of every text of `records`, each text encoded once."""
    texts = list(
        dict.fromkeys(text for record in records for text in hygiene.record_texts(record))
    )
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    if prompt_format.encode is None:
        return ids
    return ids | {
        record.prompt: prompt_format.encode(record.prompt)
        for record in records
        if not isinstance(record, Text)
    }


def _count_tokens(row: Mapping[str, Any]) -> int:
    return sum(len(row[name]) for name in ("tokens", "prompt", "responses") if name in row)
