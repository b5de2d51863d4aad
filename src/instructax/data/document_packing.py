"""Packs tokenized documents side by side into rows of one length.

The paper does not describe its packing. Here packing leaves little padding, and segments
keep the documents of a row apart, so a packed document trains exactly as it would alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instructax.config import ConfigError

# Rows that wait for a document that fits. More would save little padding and cost time.
OPEN_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens that attend to one another."""

    tokens: np.ndarray  # i32[n]
    # Whether the prediction of token t is trained; [0] is False.
    loss_mask: np.ndarray  # b[n]


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """Documents that share a row, in order, without the padding at the end."""

    tokens: np.ndarray  # i32[n], n <= T
    # Tokens of each document; they sum to n.
    lengths: np.ndarray  # i32[s]
    loss_mask: np.ndarray  # b[n]


def text_documents(tokens: np.ndarray, eos_id: int, length: int) -> list[Document]:
    """Appends the end token to a text and cuts it into documents of at most `length`.

    All tokens but the first of each document are trained: across a cut there is no context
    to predict from.

    Args:
      tokens: i32[n], the text without its end token.
      eos_id: the end token.
      length: tokens per document; the last one holds the rest.
    """
    # The end token may land in a document of its own.
    ended = np.append(tokens, eos_id).astype(np.int32)
    documents = []
    for start in range(0, len(ended), length):
        piece = ended[start : start + length]
        documents.append(Document(piece, np.arange(len(piece)) > 0))
    return documents


def demonstration_document(
    prompt: np.ndarray, completion: np.ndarray, eos_id: int
) -> Document:
    """Joins prompt i32[p], completion i32[c] and the end token; completion and end token
    are trained.

    Raises ConfigError for an empty prompt, because the first token of the completion would
    then be predicted from nothing.
    """
    if len(prompt) == 0:
        raise ConfigError("a demonstration's prompt has no tokens: it needs at least 1")
    # [p + c + 1]
    tokens = np.concatenate([prompt, completion, [eos_id]]).astype(np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt))


def pack_documents(documents: Sequence[Document], length: int) -> list[PackedRow]:
    """Packs `documents` into rows of at most `length` tokens by first fit.

    Each document goes, in the given order, into the oldest open row with room. When more
    than OPEN_ROWS rows are open, the oldest is closed. Rows are in the order of their first
    documents, and the same documents always give the same rows. Raises ConfigError if a
    document is empty or longer than `length`.
    """
    rows: list[list[Document]] = []
    # Of each open row: its index in `rows`, and the tokens that still fit.
    open_rows: list[int] = []
    room: list[int] = []
    for document in documents:
        size = len(document.tokens)
        if not 1 <= size <= length:
            raise ConfigError(
                f"a document of {size} tokens does not fit rows of {length}: "
                "cut or drop it, or raise length"
            )
        # First fit: the oldest open row with enough room.
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            place = len(room)
            open_rows.append(len(rows))
            room.append(length)
            rows.append([])
        rows[open_rows[place]].append(document)
        room[place] -= size

        # Close the row if it is full, else the oldest one if too many are open.
        if room[place] == 0:
            del open_rows[place], room[place]
        elif len(room) > OPEN_ROWS:
            del open_rows[0], room[0]
    return [_packed_row(row) for row in rows]


def _packed_row(documents: list[Document]) -> PackedRow:
    tokens = []
    lengths = []
    loss_masks = []
    for document in documents:
        tokens.append(document.tokens)
        lengths.append(len(document.tokens))
        loss_masks.append(document.loss_mask)
    return PackedRow(
        tokens=np.concatenate(tokens),
        lengths=np.array(lengths, np.int32),
        loss_mask=np.concatenate(loss_masks),
    )


def segments_and_positions(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the tokens of documents of `lengths`.

    Returns:
      segments i32[n], 1, 2, … by document, and positions i32[n], from 0 in each document.
    """
    # The first column of each document.
    starts = np.cumsum(lengths) - lengths
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.arange(len(segments)) - np.repeat(starts, lengths)
    return segments.astype(np.int32), positions.astype(np.int32)
