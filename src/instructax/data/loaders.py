"""What each process reads: its share of the training and validation batches, as NumPy
arrays."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructax.config import check_fractions, require
from instructax.data.batches import (
    Source,
    comparison_batch,
    evaluation_rows,
    lm_batch,
    mixed_lm_batch,
    process_slice,
)
from instructax.data.limits import DataLimits
from instructax.data.prepare import prepare_demonstrations, prepare_text
from instructax.data.prompt_format import PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.types import Comparisons, LmBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmDataConfig:
    """Config of packed demonstrations and text."""

    demonstrations: tuple[str, ...]
    text: tuple[str, ...]
    # Fraction of text among the rows of a batch. 1: pretraining; 0: demonstrations only;
    # 0.1: the policy that PPO starts from (paper, C.3).
    text_fraction: float
    # Whether to format prompts with the parent's chat template.
    chat: bool
    limits: DataLimits
    # Where prepared rows are cached.
    folder: str

    def __post_init__(self):
        check_fractions(self, "text_fraction")


def read_lm_data(
    config: LmDataConfig, tokenizer: Tokenizer, prompt_format: PromptFormat
) -> dict[str, PreparedData]:
    """The packed rows of each source that has files: "demonstrations", "text"."""
    need_demonstrations = config.text_fraction < 1
    need_text = config.text_fraction > 0
    require(
        bool(config.demonstrations) == need_demonstrations
        and (bool(config.text) or not need_text),
        f"config.data.text_fraction = {config.text_fraction} does not fit "
        f"{len(config.demonstrations)} files of config.data.demonstrations and "
        f"{len(config.text)} of config.data.text: 1 is text only, 0 demonstrations only",
    )
    # Sources with the same files and settings share their prepared rows.
    folder = Path(config.folder)
    data = {}
    if config.demonstrations:
        data["demonstrations"] = prepare_demonstrations(
            list(map(Path, config.demonstrations)),
            tokenizer,
            config.limits,
            folder,
            prompt_format=prompt_format,
        )
    if config.text:
        data["text"] = prepare_text(
            list(map(Path, config.text)), tokenizer, config.limits, folder
        )
    return data


def lm_reader(
    data: Mapping[str, PreparedData],
    split: str,
    *,
    text_fraction: float,
    sequence_tokens: int,
    batch_size: int,
    seed: int,
) -> Callable[[int], LmBatch]:
    """A function from a step to this process's share of its packed batch.

    Args:
      data: packed rows of "demonstrations" and "text", from `read_lm_data`; a source
        without files is left out.
      split: name of the split to read.
      text_fraction: fraction of text among the rows of a batch.
      sequence_tokens: width of a row.
      batch_size: rows of a batch, over all processes.
      seed: seed of the order of the rows.
    """
    # A source without files is never read: its fraction is 0.
    nothing: Any = ()
    demonstrations = nothing
    if "demonstrations" in data:
        demonstrations = data["demonstrations"].sources[split]
    text = nothing
    if "text" in data:
        text = data["text"].sources[split]

    def read(step: int) -> LmBatch:
        return mixed_lm_batch(
            demonstrations,
            text,
            step,
            batch_size=batch_size,
            text_fraction=text_fraction,
            length=sequence_tokens,
            seed=seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    return read


def validation_rows(source: Source, batch_size: int, limit: int) -> Iterator[np.ndarray]:
    """This process's share of the row ids of at most `limit` validation batches."""
    # Every process takes its slice of every batch, so all do the same number of steps.
    for rows in itertools.islice(evaluation_rows(len(source), batch_size), limit):
        yield process_slice(rows, jax.process_index(), jax.process_count())


def validation_batches(
    source: Source, batch_size: int, limit: int, length: int
) -> Iterator[LmBatch]:
    """This process's share of at most `limit` validation batches of packed rows [B, T =
    `length`]."""
    for rows in validation_rows(source, batch_size, limit):
        yield lm_batch(source, rows, length)


def read_comparisons(source: Source, rows: Any, limits: DataLimits) -> Comparisons:
    """The comparisons `rows` of `source`, padded to `limits`."""
    return comparison_batch(
        source,
        rows,
        prompt_tokens=limits.prompt_tokens,
        completions=limits.completions,
        response_tokens=limits.response_tokens,
    )
