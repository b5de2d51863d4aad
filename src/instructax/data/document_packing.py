"""Documents of tokens, side by side in rows of one length.

The paper does not say how its text was laid out; packing wastes few cells, and `segments`
keeps the documents of a row apart, so a packed document trains as it would alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instructax.config import ConfigError

OPEN_ROWS = (
    256  # rows that wait for a document that fits; more saves little padding and costs time
)


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens that belong together."""

    tokens: np.ndarray  # i32[n]
    loss_mask: np.ndarray  # b[n], whether the prediction of token t from the tokens before it is trained; [0] is False


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """Documents that share a row, in order, without the padding at its end."""

    tokens: np.ndarray  # i32[n], n <= T
    lengths: np.ndarray  # i32[s], tokens of each document; they sum to n
    loss_mask: np.ndarray  # b[n]


def text_documents(tokens: np.ndarray, eos_id: int, length: int) -> list[Document]:
    """Returns `tokens` i32[n] and the end token, cut into documents of `length` tokens, the
    last one of what is left.

    All but the first token of each is trained: across a cut there is nothing to predict
    from.
    """
    ended = np.append(tokens, eos_id).astype(np.int32)
    pieces = [ended[start : start + length] for start in range(0, len(ended), length)]
    return [Document(piece, np.arange(len(piece)) > 0) for piece in pieces]


def demonstration_document(
    prompt: np.ndarray, completion: np.ndarray, eos_id: int
) -> Document:
    """Returns prompt i32[p], completion i32[c] and end token as one document, trained on
    completion and end token.

    Raises ValueError if the prompt has no token, since the completion's first would then be
    predicted from nothing.
    """
    if len(prompt) == 0:
        raise ConfigError("a demonstration's prompt has no tokens: it needs at least 1")
    tokens = np.concatenate([prompt, completion, [eos_id]]).astype(np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt))


def pack_documents(documents: Sequence[Document], length: int) -> list[PackedRow]:
    """Puts `documents` into rows of at most `length` tokens.

    First fit: each document goes, in the order given, to the oldest row with room; of more
    than OPEN_ROWS rows the oldest is closed. Rows come in the order of their first
    documents, and the same documents give the same rows. Raises ValueError if a document
    has no token or more than `length`.
    """
    rows: list[list[Document]] = []
    open_rows: list[int] = []
    room: list[int] = []
    for document in documents:
        size = len(document.tokens)
        if not 1 <= size <= length:
            raise ConfigError(
                f"a document of {size} tokens does not fit rows of {length}: cut or drop it, or raise length"
            )
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            place = len(room)
            open_rows.append(len(rows))
            room.append(length)
            rows.append([])
        rows[open_rows[place]].append(document)
        room[place] -= size
        if room[place] == 0 or len(room) > OPEN_ROWS:
            closed = place if room[place] == 0 else 0
            del open_rows[closed], room[closed]
    return [_row(row) for row in rows]


def _row(documents: list[Document]) -> PackedRow:
    return PackedRow(
        tokens=np.concatenate([document.tokens for document in documents]),
        lengths=np.array([len(document.tokens) for document in documents], np.int32),
        loss_mask=np.concatenate([document.loss_mask for document in documents]),
    )


def segments_and_positions(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns segments i32[n] (1, 2, … by document) and positions i32[n] (from 0 in each)
    of documents of `lengths`."""
    starts = np.cumsum(lengths) - lengths
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.arange(len(segments)) - np.repeat(starts, lengths)
    return segments.astype(np.int32), positions.astype(np.int32)
