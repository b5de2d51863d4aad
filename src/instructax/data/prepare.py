"""Prepares data for training: from files of records to cached rows of token ids.

The rows depend only on the bytes of the files, the tokenizer, the limits, the prompt format
and `ROWS_VERSION`. Their hash names the folder, so the same call reuses the rows and any
change prepares them again. The paper also filters by length (appendix C) without details;
here a demonstration that does not fit is dropped, never cut, and a comparison loses only
the completions that do not fit. All records of one call are in memory while they are
prepared.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructax.data import document_packing, filters
from instructax.data.limits import DataLimits
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat
from instructax.data.recipe import Filter, Recipe, TokenIds, run_recipe
from instructax.data.schema import Comparison, DataError, Demonstration, Prompt, Text
from instructax.data.storage import ComparisonRows, PackedRows, PreparedData, PromptRows
from instructax.data.tokenizer import Tokenizer


def prepare_text(
    files: Sequence[Path], tokenizer: Tokenizer, limits: DataLimits, data_dir: Path
) -> PreparedData:
    """Prepares pretraining text as packed rows of T tokens, for `batches.lm_batch`.

    Args:
      files: JSON lines of `Text` records.
      tokenizer: encodes the texts.
      limits: filters, lengths and splits.
      data_dir: where prepared rows are cached.

    Raises:
      DataError: a file or line cannot be used.
      ConfigError: a split has no rows.
    """
    length = limits.sequence_tokens

    def rows(
        records: list[Text], ids: TokenIds, labelers: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        documents = []
        for record in records:
            # A long text becomes several documents.
            documents += document_packing.text_documents(
                ids[record.text], tokenizer.eos_id, length
            )
        return _packed_rows(documents, length)

    recipe = Recipe(
        kind="text",
        record=Text,
        builder=PackedRows,
        filters=[],
        length_filters=lambda ids: [],
        rows=rows,
        row_tokens=length,
    )
    return run_recipe(recipe, files, tokenizer, limits, data_dir, PLAIN_FORMAT)


def prepare_demonstrations(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    data_dir: Path,
    prompt_format: PromptFormat,
) -> PreparedData:
    """Prepares demonstrations as packed rows of T tokens, for `batches.lm_batch`.

    Arguments and exceptions are those of `prepare_text`; `prompt_format` formats prompts
    and completions before they are tokenized.
    """
    length = limits.sequence_tokens

    # Each limit leaves room for the end token.
    def length_filters(ids: TokenIds) -> Sequence[Filter]:
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
                lambda record: len(ids[record.prompt]) + len(ids[record.completion]),
            ),
        ]

    def rows(
        records: list[Demonstration], ids: TokenIds, labelers: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        eos_id = tokenizer.eos_id
        documents = [_demonstration_document(record, ids, eos_id) for record in records]
        return _packed_rows(documents, length)

    recipe = Recipe(
        kind="demonstrations",
        record=Demonstration,
        builder=PackedRows,
        filters=_prefix_filters(limits),
        length_filters=length_filters,
        rows=rows,
        row_tokens=length,
    )
    return run_recipe(recipe, files, tokenizer, limits, data_dir, prompt_format)


def prepare_prompts(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    data_dir: Path,
    prompt_format: PromptFormat,
) -> PreparedData:
    """Prepares prompts for `batches.prompt_batch` with P = `limits.prompt_tokens`.

    Arguments and exceptions are those of `prepare_demonstrations`.
    """
    # Duplicates first, so that they do not count against their user.
    record_filters = _prefix_filters(limits)
    per_user = limits.prompts_per_user
    if per_user is not None:
        record_filters.append(
            ("prompts_per_user", lambda records: filters.cap_per_user(records, per_user))
        )

    def rows(
        records: list[Prompt], ids: TokenIds, labelers: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        return [{"tokens": ids[record.prompt]} for record in records]

    recipe = Recipe(
        kind="prompts",
        record=Prompt,
        builder=PromptRows,
        filters=record_filters,
        length_filters=lambda ids: [_prompt_filter(limits, ids)],
        rows=rows,
        row_tokens=limits.prompt_tokens,
    )
    return run_recipe(recipe, files, tokenizer, limits, data_dir, prompt_format)


def prepare_comparisons(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    limits: DataLimits,
    data_dir: Path,
    prompt_format: PromptFormat,
) -> PreparedData:
    """Prepares comparisons for `batches.comparison_batch` with P, K, R of `limits`.

    Duplicate prompts stay, because several labelers may judge the same prompt. Arguments
    and exceptions are those of `prepare_demonstrations`.
    """

    # The order matters: a comparison can become tied or small enough by losing completions.
    def length_filters(ids: TokenIds) -> Sequence[Filter]:
        return [
            _prompt_filter(limits, ids),
            (
                "response_tokens",
                # One token less, for the end token.
                lambda records: filters.drop_long_completions(
                    records, limits.response_tokens - 1, lambda text: len(ids[text])
                ),
            ),
            (
                "completions",
                lambda records: filters.drop_many_completions(records, limits.completions),
            ),
            ("tied", filters.drop_tied),
        ]

    def rows(
        records: list[Comparison], ids: TokenIds, labelers: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        eos_id = tokenizer.eos_id
        return [_comparison_row(record, ids, labelers, eos_id) for record in records]

    recipe = Recipe(
        kind="comparisons",
        record=Comparison,
        builder=ComparisonRows,
        filters=[("unranked", filters.drop_unranked)],
        length_filters=length_filters,
        rows=rows,
        row_tokens=limits.comparison_tokens,
    )
    return run_recipe(recipe, files, tokenizer, limits, data_dir, prompt_format)


def _demonstration_document(record: Demonstration, ids: TokenIds, eos_id: int) -> Any:
    """The tokens of a demonstration, of which the completion and its end are trained."""
    completion = ids[record.completion]
    _check_single_end_token(record, completion, eos_id)
    return document_packing.demonstration_document(ids[record.prompt], completion, eos_id)


def _check_single_end_token(
    record: Demonstration, completion: np.ndarray, eos_id: int
) -> None:
    """Raises DataError if a completion already contains the end token.

    Encoding never produces it from ordinary text, but where the tokenizer uses one token
    for both, an unknown character becomes the end token.
    """
    # The policy would learn to stop there, and never see the rest.
    if np.any(completion == eos_id):
        raise DataError(
            f"demonstration {record.id!r}: completion: its tokens contain the end token "
            f"{eos_id} before their end, as an unknown character does if the tokenizer has "
            "one token for both: name another as eos_token, or change the completion"
        )


def _prefix_filters(limits: DataLimits) -> list[Filter]:
    length = limits.prefix_characters
    if length is None:
        return []
    return [
        ("prefix_characters", lambda records: filters.drop_shared_prefix(records, length))
    ]


def _prompt_filter(limits: DataLimits, ids: TokenIds) -> Filter:
    return _length_filter(
        "prompt_tokens", limits.prompt_tokens, lambda record: len(ids[record.prompt])
    )


def _length_filter(rule: str, limit: int, count_tokens: Callable[[Any], int]) -> Filter:
    return rule, lambda records: filters.drop_long(records, limit, count_tokens)


def _packed_rows(
    documents: Sequence[document_packing.Document], length: int
) -> list[dict[str, Any]]:
    # The fields of a PackedRow are the features of `PackedRows`.
    return [vars(row) for row in document_packing.pack_documents(documents, length)]


def _comparison_row(
    record: Comparison, ids: TokenIds, labelers: Mapping[str, int], eos_id: int
) -> dict[str, Any]:
    # Each response gets its end token here, as the policy has to learn it.
    responses = []
    for completion in record.completions:
        responses.append(np.append(ids[completion], eos_id).astype(np.int32))
    return {
        "prompt": ids[record.prompt],
        # Ragged rows are stored flat, with the length of each response.
        "responses": np.concatenate(responses),
        "lengths": np.array([len(response) for response in responses], np.int32),
        "ranks": np.array(filters.dense_ranks(record.ranks or ()), np.int32),
        # -1 for an unknown labeler.
        "labeler": labelers.get(record.labeler or "", -1),
    }
