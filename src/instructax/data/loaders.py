"""What each process reads: its share of batch i of a stream, or of held-out rows in order,
as numpy arrays."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
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
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.types import Comparisons, LmBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmData:
    """Files of packed rows; the share of text counts rows of a batch."""

    demonstrations: tuple[str, ...]
    text: tuple[str, ...]
    text_fraction: float  # 1: pretraining, 0: demonstrations alone, 0.1: the PPO initialisation (paper, C.3)
    chat: bool  # whether prompts are worded by the parent's chat template
    limits: DataLimits
    folder: str  # where prepared rows are kept

    def __post_init__(self):
        check_fractions(self, "text_fraction")


def read_lm_data(
    config: LmData, tokenizer: Tokenizer, prompt_format: PromptFormat = PLAIN_FORMAT
) -> dict[str, PreparedData]:
    """The packed rows of each source that has files: "demonstrations", "text"."""
    require(
        bool(config.demonstrations) == (config.text_fraction < 1)
        and (bool(config.text) or config.text_fraction == 0),
        f"config.data.text_fraction = {config.text_fraction} does not fit {len(config.demonstrations)} files of "
        f"config.data.demonstrations and {len(config.text)} of config.data.text: 1 is text alone, 0 demonstrations",
    )
    prepare = {
        "demonstrations": partial(prepare_demonstrations, prompt_format=prompt_format),
        "text": prepare_text,
    }
    files = {"demonstrations": config.demonstrations, "text": config.text}
    return {
        name: prepare[name](
            [Path(path) for path in paths], tokenizer, config.limits, Path(config.folder)
        )
        for name, paths in files.items()
        if paths
    }


def lm_reader(
    config: LmData,
    data: Mapping[str, PreparedData],
    split: str,
    *,
    batch_size: int,
    seed: int,
) -> Callable[[int], LmBatch]:
    """Batch `step` of packed rows: this process's share of it, as numpy arrays."""
    nothing: Any = ()
    sources = {
        name: data[name].sources[split] if name in data else nothing
        for name in ("demonstrations", "text")
    }

    def read(step: int) -> LmBatch:
        return mixed_lm_batch(
            sources["demonstrations"],
            sources["text"],
            step,
            batch_size=batch_size,
            text_fraction=config.text_fraction,
            length=config.limits.sequence_tokens,
            seed=seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    return read


def validation_rows(source: Source, batch_size: int, limit: int) -> Iterator[np.ndarray]:
    """Row ids of at most `limit` batches of held-out rows, this process's share of each."""
    for rows in itertools.islice(evaluation_rows(len(source), batch_size), limit):
        yield process_slice(rows, jax.process_index(), jax.process_count())


def validation_batches(
    source: Source, batch_size: int, limit: int, length: int
) -> Iterator[LmBatch]:
    """At most `limit` batches of held-out packed rows, this process's share of each."""
    for rows in validation_rows(source, batch_size, limit):
        yield lm_batch(source, rows, length)


def read_comparisons(source: Source, rows: Any, limits: DataLimits) -> Comparisons:
    """Comparisons `rows` of `source`, padded to the limits, as numpy arrays."""
    return comparison_batch(
        source,
        rows,
        prompt_tokens=limits.prompt_tokens,
        completions=limits.completions,
        response_tokens=limits.response_tokens,
    )
