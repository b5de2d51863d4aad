"""Prints a batch as text: prompts, trained tokens, end tokens and padding, in colors.

End tokens are located by the ends of documents, never by their id. Control characters of
the data are escaped before they are printed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from instructax.runtime.redaction import printable
from instructax.types import LmBatch

# Kind of token → style of `rich`.
PREVIEW_STYLES = {
    "prompt": "cyan",
    "trained": "bold green",
    "end": "reverse bold green",
    "padding": "dim",
}
# Longer spans of a document are cut.
MAX_SPAN_CHARS = 400
# Further documents of a row are only counted.
MAX_DOCUMENTS = 3


def preview_text(batch: LmBatch, row: int, decode: Callable[[Sequence[int]], str]) -> Text:
    """Row `row` of a batch: a summary line, then the spans of its first documents."""
    # All [T].
    tokens = np.asarray(batch.tokens[row])
    segments = np.asarray(batch.segments[row])
    trained = np.asarray(batch.loss_mask[row])
    num_documents = int(segments.max())
    num_padding = int((segments == 0).sum())
    text = Text(
        f"first batch, row {row + 1} of {len(batch.tokens)}: {num_documents} documents, "
        f"{int((segments > 0).sum())} tokens, {int(trained.sum())} trained, "
        f"{num_padding} of padding"
    )
    for number in range(1, min(num_documents, MAX_DOCUMENTS) + 1):
        own = segments == number
        for kind, span in _spans(tokens[own], trained[own], decode):
            line = "⟨end⟩" if kind == "end" else f"\n  {kind:<8} {span}"
            text.append(line, PREVIEW_STYLES[kind])
    if num_documents > MAX_DOCUMENTS:
        text.append(f"\n  … {num_documents - MAX_DOCUMENTS} more documents")
    if num_padding:
        text.append(f"\n  {'padding':<8} {num_padding} tokens", PREVIEW_STYLES["padding"])
    return text


def print_preview(batch: LmBatch, decode: Callable[[Sequence[int]], str]) -> None:
    """Prints the first row of `batch`, in colors if the output is a terminal."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(preview_text(batch, 0, decode))


def _spans(
    tokens: np.ndarray, trained: np.ndarray, decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[str, str]]:
    """Yields (kind, text) of the runs of prompt and trained tokens of one document.

    A trained last token is the end token, which is its own span.
    """
    # Without the end token, if it is trained.
    last = len(tokens) - bool(trained[-1])
    # Columns at which trained and untrained tokens meet.
    changes = np.flatnonzero(np.diff(trained[:last])) + 1
    for start, stop in itertools.pairwise([0, *changes.tolist(), last]):
        if stop > start:
            span = printable(decode(tokens[start:stop].tolist()))
            if len(span) > MAX_SPAN_CHARS:
                span = f"{span[:MAX_SPAN_CHARS]}… ({len(span)} characters)"
            yield "trained" if trained[start] else "prompt", span
    if last < len(tokens):
        yield "end", ""
