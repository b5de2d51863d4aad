"""Which rows make batch i, and the arrays of those rows.

Batch i is a function of (seed, i): the stream of samples is one random permutation of the rows after another, and batch
i is its i-th piece. There is no state to save, and each process reads only the rows of its slice.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from instructax.data.packing import lay_out
from instructax.types import Comparisons, LmBatch, Prompts

NO_ROW = -1  # in place of a row id: this row of the batch is empty, all its masks are False


class Source(Protocol):
    """Rows on disk with random access, such as a data source of tensorflow-datasets."""

    def __len__(self) -> int: ...

    def __getitems__(self, record_keys: Sequence[int], /) -> Sequence[Mapping[str, Any]]: ...


@functools.lru_cache(maxsize=8)
def row_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order i64[size] in which `epoch` visits the rows 0 .. size - 1; read-only.

    It sorts 64 raw bits per row from Philox under the key (seed, epoch): numpy promises these bits for all versions,
    which it does not for `permutation`.
    """
    if seed < 0:
        raise ValueError(f"seed {seed} is negative: the order of the rows needs a seed of 0 or more")
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def samples_of_batch(index: int, batch_size: int, size: int, seed: int) -> np.ndarray:
    """Returns the samples i64[batch_size] of batch `index` from `size` rows: sample = epoch · size + row.

    A sample occurs once in the whole stream, also where a batch runs across the end of an epoch: fold it, rather than
    the row, into a random key. Raises ValueError if there is no row or a negative index.
    """
    if size < 1 or batch_size < 1 or index < 0:
        raise ValueError(
            f"no batch {index} of {batch_size} from {size} rows: need rows, a batch size and an index >= 0"
        )
    places = np.arange(index * batch_size, (index + 1) * batch_size)
    epochs = np.arange(places[0] // size, places[-1] // size + 1)
    orders = [row_order(seed, int(epoch), size) + epoch * size for epoch in epochs]
    return np.concatenate(orders)[places - epochs[0] * size]


def rows_of_batch(index: int, batch_size: int, size: int, seed: int) -> np.ndarray:
    """Returns the row ids i64[batch_size] of `samples_of_batch`; every epoch has each row once."""
    return samples_of_batch(index, batch_size, size, seed) % size


def process_slice(values: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
    """Returns the part of a batch's `values` [B, ...] that one process reads: entries p·B/n up to (p + 1)·B/n.

    Raises ValueError if the processes cannot share the batch equally.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} is not one of {process_count}: allowed are 0 .. {process_count - 1}")
    if len(values) % process_count:
        raise ValueError(
            f"a batch of {len(values)} rows cannot be shared by {process_count} processes: change batch_size"
        )
    share = len(values) // process_count
    return values[process_index * share : (process_index + 1) * share]


def evaluation_rows(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields all rows once and in order, i64[batch_size] at a time; NO_ROW fills the last, so that no shape changes."""
    for start in range(0, size, batch_size):
        rows = np.arange(start, start + batch_size)
        yield np.where(rows < size, rows, NO_ROW)


def lm_batch(source: Source, rows: np.ndarray, length: int) -> LmBatch:
    """Returns the packed rows `rows` [B] of `source` as an LmBatch of B × `length` (T), numpy arrays."""
    shape = (len(rows), length)
    tokens, segments, positions = (_zeros(shape, np.int32) for _ in range(3))
    loss_mask = _zeros(shape, bool)
    for i, row in _fetch(source, rows):
        n = _fits(len(row["tokens"]), length, "length")
        tokens[i, :n] = row["tokens"]
        segments[i, :n], positions[i, :n] = lay_out(row["lengths"])
        loss_mask[i, :n] = row["loss_mask"]
    return LmBatch(tokens=tokens, segments=segments, positions=positions, loss_mask=loss_mask)


def prompt_batch(source: Source, rows: np.ndarray, length: int) -> Prompts:
    """Returns the prompts `rows` [B] of `source`, padded on the left to `length` (P), numpy arrays."""
    fetched = _fetch(source, rows)
    return _left_padded([(i, row["tokens"]) for i, row in fetched], len(rows), length)


def comparison_batch(
    source: Source, rows: np.ndarray, *, prompt_tokens: int, answers: int, response_tokens: int
) -> Comparisons:
    """Returns the comparisons `rows` [B] of `source`, padded to P = `prompt_tokens` on the left, K = `answers` and
    R = `response_tokens` on the right, numpy arrays. Responses end with the end token. Raises ValueError if one does
    not fit.
    """
    fetched = _fetch(source, rows)
    shape = (len(rows), answers, response_tokens)
    responses, mask = _zeros(shape, np.int32), _zeros(shape, bool)
    ranks, valid = _zeros(shape[:2], np.int32), _zeros(shape[:2], bool)
    labeler = _zeros(shape[:1], np.int32) - 1
    for i, row in fetched:
        k = _fits(len(row["lengths"]), answers, "answers")
        _fits(max(row["lengths"]), response_tokens, "response_tokens")
        mask[i, :k] = np.arange(response_tokens) < row["lengths"][:, None]
        responses[i][mask[i]] = row["responses"]
        ranks[i, :k], valid[i, :k] = row["ranks"], True
        labeler[i] = row["labeler"]
    prompts = _left_padded([(i, row["prompt"]) for i, row in fetched], len(rows), prompt_tokens)
    return Comparisons(prompts=prompts, responses=responses, mask=mask, ranks=ranks, valid=valid, labeler=labeler)


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
    """Returns this process's slice of batch `index` of demonstrations with a share of pretraining text.

    Of the `batch_size` rows the last round(text_fraction · batch_size) come from `text`, the others from
    `demonstrations` (paper, appendix C.3: 10 % for the policy that PPO starts from). Each source has its own stream,
    which advances by its own number of rows a batch. Raises ValueError if a fraction above 0 and below 1 leaves one
    source without a row.
    """
    text_rows = round(text_fraction * batch_size)
    if not 0 <= text_fraction <= 1 or (text_rows in (0, batch_size)) != (text_fraction in (0, 1)):
        raise ValueError(
            f"text_fraction {text_fraction} of a batch of {batch_size} makes {text_rows} rows of text: it must be in "
            "0 .. 1, and give both sources a row if it is between; change text_fraction or batch_size"
        )
    own_rows = batch_size - text_rows
    slots = process_slice(np.arange(batch_size), process_index, process_count)
    parts = []
    for source, rows, mine in (
        (demonstrations, own_rows, slots[slots < own_rows]),
        (text, text_rows, slots[slots >= own_rows] - own_rows),
    ):
        if len(mine):
            parts.append(lm_batch(source, rows_of_batch(index, rows, len(source), seed)[mine], length))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _fetch(source: Source, rows: np.ndarray) -> list[tuple[int, Mapping[str, Any]]]:
    """Returns (place in the batch, row) for the rows that are not NO_ROW, all read at once."""
    places = [i for i, row in enumerate(rows) if row != NO_ROW]
    return list(zip(places, source.__getitems__([int(rows[i]) for i in places]), strict=True))


def _left_padded(prompts: Sequence[tuple[int, np.ndarray]], batch_size: int, length: int) -> Prompts:
    tokens = _zeros((batch_size, length), np.int32)
    mask = _zeros((batch_size, length), bool)
    for i, prompt in prompts:
        start = length - _fits(len(prompt), length, "the prompts' length")
        tokens[i, start:] = prompt
        mask[i, start:] = True
    return Prompts(tokens=tokens, mask=mask)


def _fits(size: int, room: int, name: str) -> int:
    if size > room:
        raise ValueError(f"a row of {size} does not fit {name} = {room}: use the value the data was prepared with")
    return size


def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a numpy array; typed as Any since `types` names the jax arrays that it becomes on a device."""
    return np.zeros(shape, dtype)
