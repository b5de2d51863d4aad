"""Which rows make batch i, and the padded arrays of those rows.

Batch i is a function of (seed, i): the sample stream is one random permutation of all rows
after another, and batch i is its i-th slice. There is no state to save, and each process
reads only its own share of the rows.
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

# A row id for an empty row: all its masks are False.
NO_ROW = -1


class Source(Protocol):
    """Rows on disk with random access, such as a data source of tensorflow-datasets."""

    def __len__(self) -> int: ...

    def __getitems__(
        self, record_keys: Sequence[int], /
    ) -> Sequence[Mapping[str, Any]]: ...


@functools.lru_cache(maxsize=8)
def row_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order i64[size] in which `epoch` visits rows 0 .. size - 1; read-only.

    Sorts 64 raw bits per row from Philox with the key (seed, epoch). NumPy guarantees these
    bits for all versions, but not those of `permutation`.
    """
    if seed < 0:
        raise ValueError(
            f"seed {seed} is negative: the order of the rows needs a seed of 0 or more"
        )
    # One 64-bit word per row; sorting the words gives the permutation.
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(bits, kind="stable")
    # The cache hands the same array to every caller.
    order.flags.writeable = False
    return order


def stream_row_ids(start: int, stop: int, size: int, seed: int) -> np.ndarray:
    """Row ids i64[stop - start] at places `start` .. `stop` - 1 of the sample stream, in
    which every epoch has each of the `size` rows once.

    Raises ConfigError if there are no rows or no such places.
    """
    if size < 1 or not 0 <= start < stop:
        raise ConfigError(
            f"no places {start} .. {stop - 1} in a stream of {size} rows: "
            "need rows and 0 <= start < stop"
        )
    first_epoch = start // size
    last_epoch = (stop - 1) // size
    # The stream restricted to the epochs that these places touch.
    orders = [row_order(seed, epoch, size) for epoch in range(first_epoch, last_epoch + 1)]
    offset = first_epoch * size
    return np.concatenate(orders)[start - offset : stop - offset]


def batch_row_ids(index: int, batch_size: int, size: int, seed: int) -> np.ndarray:
    """Row ids i64[batch_size] of batch `index`. Raises ConfigError as `stream_row_ids`
    does."""
    return stream_row_ids(index * batch_size, (index + 1) * batch_size, size, seed)


def process_slice(values: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
    """The part of a batch's `values` [B, ...] that belongs to one process: B / n
    consecutive entries.

    Raises ConfigError if the processes cannot share the batch equally.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process {process_index} is not one of {process_count}: "
            f"allowed are 0 .. {process_count - 1}"
        )
    if len(values) % process_count:
        raise ConfigError(
            f"a batch of {len(values)} rows cannot be shared by {process_count} processes: "
            "change batch_size"
        )
    # Consecutive rows: the devices of a process hold consecutive rows of the batch.
    share = len(values) // process_count
    return values[process_index * share : (process_index + 1) * share]


def evaluation_rows(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields all row ids once, i64[batch_size] at a time; NO_ROW fills up the last batch,
    so that all have one shape.

    The order is random but always the same, so that the first batches alone already sample
    every file and source.
    """
    # A fixed seed: every evaluation of every run reads the same rows first.
    order = row_order(0, 0, size)
    for start in range(0, size, batch_size):
        rows = order[start : start + batch_size]
        yield np.pad(rows, (0, batch_size - len(rows)), constant_values=NO_ROW)


def lm_batch(source: Source, rows: np.ndarray, length: int) -> LmBatch:
    """Reads the packed rows `rows` [B] of `source` as NumPy arrays, padded to T =
    `length`."""
    # Padding is token 0 in segment 0, and its loss mask is False.
    shape = (len(rows), length)
    tokens = _zeros(shape, np.int32)
    segments = _zeros(shape, np.int32)
    positions = _zeros(shape, np.int32)
    loss_mask = _zeros(shape, bool)
    for i, row in _fetch(source, rows):
        n = _check_fits(len(row["tokens"]), length, "length")
        tokens[i, :n] = row["tokens"]
        segments[i, :n], positions[i, :n] = segments_and_positions(row["lengths"])
        loss_mask[i, :n] = row["loss_mask"]
    return LmBatch(
        tokens=tokens, segments=segments, positions=positions, loss_mask=loss_mask
    )


def prompt_batch(source: Source, rows: np.ndarray, length: int) -> Prompts:
    """Reads the prompts `rows` [B] of `source`, left-padded to P = `length`: NumPy
    arrays."""
    prompts = [(i, row["tokens"]) for i, row in _fetch(source, rows)]
    return left_pad(prompts, len(rows), length)


def comparison_batch(
    source: Source,
    rows: np.ndarray,
    *,
    prompt_tokens: int,
    completions: int,
    response_tokens: int,
) -> Comparisons:
    """Reads the comparisons `rows` [B] of `source` as padded NumPy arrays.

    Responses end with the end token. Raises ConfigError if a comparison does not fit.

    Args:
      source: the stored comparisons.
      rows: i64[B], row ids; NO_ROW gives an empty comparison.
      prompt_tokens: P; prompts are padded on the left.
      completions: K.
      response_tokens: R; responses are padded on the right.
    """
    fetched = _fetch(source, rows)
    prompts = left_pad([(i, row["prompt"]) for i, row in fetched], len(rows), prompt_tokens)
    # Padding is token 0, rank 0 and mask False; an unknown labeler is -1.
    responses = _zeros((len(rows), completions, response_tokens), np.int32)
    mask = _zeros((len(rows), completions, response_tokens), bool)
    ranks = _zeros((len(rows), completions), np.int32)
    valid = _zeros((len(rows), completions), bool)
    labeler = _zeros((len(rows),), np.int32) - 1

    for i, row in fetched:
        k = _check_fits(len(row["lengths"]), completions, "completions")
        _check_fits(max(row["lengths"]), response_tokens, "response_tokens")
        # [k, R]; the stored responses are concatenated in this order.
        mask[i, :k] = np.arange(response_tokens) < row["lengths"][:, None]
        responses[i][mask[i]] = row["responses"]
        ranks[i, :k] = row["ranks"]
        valid[i, :k] = True
        labeler[i] = row["labeler"]

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
    """Reads this process's slice of batch `index`, mixed from demonstrations and
    pretraining text (paper, appendix C.3: 10% text for the policy that PPO starts from).

    Of all rows up to the end of any batch, floor(`text_fraction` × rows) come from `text`.
    So a batch too small for a whole row of text gets one every few batches. Within a batch
    text comes last, and each source has its own stream.

    Args:
      demonstrations, text: packed rows; unused if the fraction is 1 or 0.
      batch_size: rows of the whole batch, over all processes.
      text_fraction: fraction of rows that come from `text`, from 0 to 1.
      length: T.
      seed: of both streams.
      process_index, process_count: this process, and how many share the batch.
    """
    # Where this batch starts and stops in the mixed stream and in the stream of text.
    start = index * batch_size
    stop = (index + 1) * batch_size
    text_start = _text_rows(start, text_fraction)
    text_stop = _text_rows(stop, text_fraction)

    # The first places of the batch hold demonstrations, the others text.
    places = process_slice(np.arange(batch_size), process_index, process_count)
    num_demonstrations = batch_size - (text_stop - text_start)
    demonstration_places = places[places < num_demonstrations]
    text_places = places[places >= num_demonstrations] - num_demonstrations

    parts = []
    if len(demonstration_places):
        rows = stream_row_ids(
            start - text_start, stop - text_stop, len(demonstrations), seed
        )
        parts.append(lm_batch(demonstrations, rows[demonstration_places], length))
    if len(text_places):
        rows = stream_row_ids(text_start, text_stop, len(text), seed)
        parts.append(lm_batch(text, rows[text_places], length))
    # [rows of demonstrations, T] and [rows of text, T] → [B / processes, T]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _text_rows(rows: int, text_fraction: float) -> int:
    """How many of the first `rows` rows of a mixed stream are text."""
    # The decimal number as it was written: ten times 0.1 is exactly 1.
    return math.floor(fractions.Fraction(str(text_fraction)) * rows)


def left_pad(
    prompts: Sequence[tuple[int, np.ndarray]], batch_size: int, length: int
) -> Prompts:
    """Left-pads prompts.

    Args:
      prompts: (row in the batch, tokens i32[n]) pairs; rows without one are empty.
      batch_size: B.
      length: P. Raises ConfigError if a prompt is longer.

    Returns:
      Prompts [B, P] of NumPy arrays.
    """
    tokens = _zeros((batch_size, length), np.int32)
    mask = _zeros((batch_size, length), bool)
    for i, prompt in prompts:
        # Right-aligned: a response then starts at column P in every row.
        start = length - _check_fits(len(prompt), length, "the prompts' length")
        tokens[i, start:] = prompt
        mask[i, start:] = True
    return Prompts(tokens=tokens, mask=mask)


def _fetch(source: Source, rows: np.ndarray) -> list[tuple[int, Mapping[str, Any]]]:
    """Reads all rows that are not NO_ROW at once, as (place in the batch, row) pairs."""
    # One call for all rows: the source can read them together.
    places = [i for i, row in enumerate(rows) if row != NO_ROW]
    fetched = source.__getitems__([int(rows[i]) for i in places])
    return list(zip(places, fetched, strict=True))


def _check_fits(size: int, room: int, name: str) -> int:
    """Returns `size`, or raises ConfigError if it is above `room`."""
    if size > room:
        raise ConfigError(
            f"a row of {size} does not fit {name} = {room}: "
            "use the value the data was prepared with"
        )
    return size


def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """A NumPy array. It is typed as Any because `instructax.types` declares the JAX arrays
    that it becomes on a device."""
    return np.zeros(shape, dtype)
