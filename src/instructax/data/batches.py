"""Which rows make batch i, and the arrays of those rows.

Batch i is a function of (seed, i): the stream of samples is one random permutation of the
rows after another, and batch i is its i-th piece. There is no state to save, and each
process reads only the rows of its slice.
"""

import fractions
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from instructax.config import ConfigError
from instructax.data.document_packing import segments_and_positions
from instructax.types import Comparisons, LmBatch, Prompts

NO_ROW = -1  # in place of a row id: this row of the batch is empty, all its masks are False


class Source(Protocol):
    """Rows on disk with random access, such as a data source of tensorflow-datasets."""

    def __len__(self) -> int: ...

    def __getitems__(
        self, record_keys: Sequence[int], /
    ) -> Sequence[Mapping[str, Any]]: ...


@functools.lru_cache(maxsize=8)
def row_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order i64[size] in which `epoch` visits the rows 0 .. size - 1;
    read-only.

    It sorts 64 raw bits per row from Philox under the key (seed, epoch): numpy promises
    these bits for all versions, which it does not for `permutation`.
    """
    if seed < 0:
        raise ValueError(
            f"seed {seed} is negative: the order of the rows needs a seed of 0 or more"
        )
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def stream_row_ids(start: int, stop: int, size: int, seed: int) -> np.ndarray:
    """Returns the row ids i64[stop − start] at places `start` .. `stop` − 1 of the stream;
    every epoch has each of the `size` rows once. Raises ValueError if there is no row, or
    no such place.
    """
    if size < 1 or not 0 <= start < stop:
        raise ConfigError(
            f"no places {start} .. {stop - 1} in a stream of {size} rows: need rows and 0 <= start < stop"
        )
    first, last = start // size, (stop - 1) // size
    orders = [row_order(seed, epoch, size) for epoch in range(first, last + 1)]
    return np.concatenate(orders)[start - first * size : stop - first * size]


def batch_row_ids(index: int, batch_size: int, size: int, seed: int) -> np.ndarray:
    """Returns the row ids i64[batch_size] of batch `index`. Raises ValueError as
    `stream_row_ids` does."""
    return stream_row_ids(index * batch_size, (index + 1) * batch_size, size, seed)


def process_slice(values: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
    """Returns the part of a batch's `values` [B, ...] that one process reads: entries p·B/n
    up to (p + 1)·B/n.

    Raises ValueError if the processes cannot share the batch equally.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process {process_index} is not one of {process_count}: allowed are 0 .. {process_count - 1}"
        )
    if len(values) % process_count:
        raise ConfigError(
            f"a batch of {len(values)} rows cannot be shared by {process_count} processes: change batch_size"
        )
    share = len(values) // process_count
    return values[process_index * share : (process_index + 1) * share]


def evaluation_rows(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields all rows once, i64[batch_size] at a time; NO_ROW fills the last, so that no
    shape changes.

    The order is random but always the same: whoever reads the first rows alone reads of
    every file and source.
    """
    order = row_order(0, 0, size)
    for start in range(0, size, batch_size):
        rows = order[start : start + batch_size]
        yield np.pad(rows, (0, batch_size - len(rows)), constant_values=NO_ROW)


def lm_batch(source: Source, rows: np.ndarray, length: int) -> LmBatch:
    """Returns the packed rows `rows` [B] of `source` as an LmBatch of B × `length` (T),
    numpy arrays."""
    shape = (len(rows), length)
    tokens, segments, positions = (_zeros(shape, np.int32) for _ in range(3))
    loss_mask = _zeros(shape, bool)
    for i, row in _fetch(source, rows):
        n = _fits(len(row["tokens"]), length, "length")
        tokens[i, :n] = row["tokens"]
        segments[i, :n], positions[i, :n] = segments_and_positions(row["lengths"])
        loss_mask[i, :n] = row["loss_mask"]
    return LmBatch(
        tokens=tokens, segments=segments, positions=positions, loss_mask=loss_mask
    )


def prompt_batch(source: Source, rows: np.ndarray, length: int) -> Prompts:
    """Returns the prompts `rows` [B] of `source`, padded on the left to `length` (P), numpy
    arrays."""
    fetched = _fetch(source, rows)
    return left_pad([(i, row["tokens"]) for i, row in fetched], len(rows), length)


def comparison_batch(
    source: Source,
    rows: np.ndarray,
    *,
    prompt_tokens: int,
    completions: int,
    response_tokens: int,
) -> Comparisons:
    """Returns the comparisons `rows` [B] of `source`, padded to P = `prompt_tokens` on the
    left, K = `completions` and R = `response_tokens` on the right, numpy arrays. Responses
    end with the end token. Raises ValueError if one does not fit.
    """
    fetched = _fetch(source, rows)
    shape = (len(rows), completions, response_tokens)
    responses, mask = _zeros(shape, np.int32), _zeros(shape, bool)
    ranks, valid = _zeros(shape[:2], np.int32), _zeros(shape[:2], bool)
    labeler = _zeros(shape[:1], np.int32) - 1
    for i, row in fetched:
        k = _fits(len(row["lengths"]), completions, "completions")
        _fits(max(row["lengths"]), response_tokens, "response_tokens")
        mask[i, :k] = np.arange(response_tokens) < row["lengths"][:, None]
        responses[i][mask[i]] = row["responses"]
        ranks[i, :k], valid[i, :k] = row["ranks"], True
        labeler[i] = row["labeler"]
    prompts = left_pad([(i, row["prompt"]) for i, row in fetched], len(rows), prompt_tokens)
    return Comparisons(
        prompts=prompts,
        responses=responses,
        mask=mask,
        ranks=ranks,
        valid=valid,
        labeler=labeler,
    )


def mixed_lm_batch(
    demonstrations: Source,
    text: Source,
    index: int,
    *,
    batch_size: int,
    text_fraction: float,
    length: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> LmBatch:
    """Returns this process's slice of batch `index` of demonstrations with a share of
    pretraining text.

    Of all rows up to the end of any batch, the share `text_fraction`, rounded down, comes
    from `text`, the others from `demonstrations` (paper, appendix C.3: 10 % for the policy
    that PPO starts from): where a batch is too small for a whole row of text, every few
    batches have one. Text stands last in a batch; each source has its own stream. Raises
    ValueError unless the fraction is in 0 .. 1.
    """
    if not 0 <= text_fraction <= 1:
        raise ValueError(f"text_fraction {text_fraction} must be in 0 .. 1")
    share = fractions.Fraction(str(text_fraction))  # as it was typed: ten times 0.1 is 1
    places = np.array([index * batch_size, (index + 1) * batch_size])
    text_places = np.array([math.floor(share * int(place)) for place in places])
    slots = process_slice(np.arange(batch_size), process_index, process_count)
    own_rows = batch_size - (text_places[1] - text_places[0])
    parts = []
    for source, (start, stop), mine in (
        (demonstrations, places - text_places, slots[slots < own_rows]),
        (text, text_places, slots[slots >= own_rows] - own_rows),
    ):
        if len(mine):
            parts.append(
                lm_batch(
                    source,
                    stream_row_ids(int(start), int(stop), len(source), seed)[mine],
                    length,
                )
            )
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _fetch(source: Source, rows: np.ndarray) -> list[tuple[int, Mapping[str, Any]]]:
    """Returns (place in the batch, row) for the rows that are not NO_ROW, all read at once."""
    places = [i for i, row in enumerate(rows) if row != NO_ROW]
    return list(
        zip(places, source.__getitems__([int(rows[i]) for i in places]), strict=True)
    )


def left_pad(
    prompts: Sequence[tuple[int, np.ndarray]], batch_size: int, length: int
) -> Prompts:
    """Returns (row, tokens) pairs as Prompts of `batch_size` × `length` (P), numpy arrays;
    other rows are empty."""
    tokens = _zeros((batch_size, length), np.int32)
    mask = _zeros((batch_size, length), bool)
    for i, prompt in prompts:
        start = length - _fits(len(prompt), length, "the prompts' length")
        tokens[i, start:] = prompt
        mask[i, start:] = True
    return Prompts(tokens=tokens, mask=mask)


def _fits(size: int, room: int, name: str) -> int:
    if size > room:
        raise ConfigError(
            f"a row of {size} does not fit {name} = {room}: use the value the data was prepared with"
        )
    return size


def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a numpy array; typed as Any since `types` names the jax arrays that it
    becomes on a device."""
    return np.zeros(shape, dtype)
