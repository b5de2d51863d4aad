"""What a batch trains on, for the eye: prompts, what is trained, end tokens and padding, in
colours on a terminal.

Ends are where documents end, not where an id stands; what is written of a text can drive no
terminal.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from instructax.runtime.redaction import printable
from instructax.types import LmBatch

STYLES = {
    "prompt": "cyan",
    "trained": "bold green",
    "end": "reverse bold green",
    "padding": "dim",
}
CHARACTERS = 400  # of a part of a document
DOCUMENTS = 3  # of a row


def preview_text(batch: LmBatch, row: int, decode: Callable[[Sequence[int]], str]) -> Text:
    """Row `row` of a batch: a line that sums it up, and its first documents part by part."""
    segments, trained = np.asarray(batch.segments[row]), np.asarray(batch.loss_mask[row])
    count, cells = int(segments.max()), int((segments == 0).sum())
    text = Text(
        f"first batch, row {row + 1} of {len(batch.tokens)}: {count} texts, {int((segments > 0).sum())} tokens, "
        f"{int(trained.sum())} trained, {cells} of padding"
    )
    tokens = np.asarray(batch.tokens[row])
    for number in range(1, min(count, DOCUMENTS) + 1):
        own = segments == number
        for kind, part in _parts(tokens[own], trained[own], decode):
            text.append("⟨end⟩" if kind == "end" else f"\n  {kind:<8} {part}", STYLES[kind])
    if count > DOCUMENTS:
        text.append(f"\n  … {count - DOCUMENTS} more texts")
    return (
        text.append(f"\n  {'padding':<8} {cells} cells", STYLES["padding"])
        if cells
        else text
    )


def _parts(
    tokens: np.ndarray, trained: np.ndarray, decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[str, str]]:
    """(kind, text) of the runs of tokens of one kind; the end token is the last one of a
    document, if it is trained."""
    last = len(tokens) - bool(trained[-1])
    borders = [0, *(np.flatnonzero(np.diff(trained[:last])) + 1).tolist(), last]
    for start, stop in itertools.pairwise(borders):
        if stop > start:
            shown = printable(decode(tokens[start:stop].tolist()))
            cut = (
                shown
                if len(shown) <= CHARACTERS
                else f"{shown[:CHARACTERS]}… ({len(shown)} characters)"
            )
            yield "trained" if trained[start] else "prompt", cut
    if last < len(tokens):
        yield "end", ""


def print_preview(batch: LmBatch, decode: Callable[[Sequence[int]], str]) -> None:
    """Prints the first row of `batch` in colours on a terminal, plainly elsewhere."""
    Console(soft_wrap=True, highlight=False).print(preview_text(batch, 0, decode))
