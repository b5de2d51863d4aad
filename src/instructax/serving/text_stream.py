"""The text of a sample whose tokens come in pieces: what of it can be shown, and where a
stop string ends it."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from instructax.data.tokenizer import Tokenizer

Finish = Literal["stop", "length"]
BROKEN = "\ufffd"  # in place of bytes that are no character, or not yet


class TextStream:
    """Turns tokens into text, piece by piece; the pieces joined are `text`, and neither
    depends on how tokens came.

    Held back until more is known: bytes that do not make a character yet, and what could be
    the beginning of a stop string. The first stop string ends the text and is not part of
    it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._shown = 0
        self.text = ""
        self.finish: Finish | None = (
            None  # why it is over, once it is: the end token or a stop string, or the limit
        )
        self.tokens = (
            0  # that were drawn for it, the end token and those of the stop string included
        )

    def add(self, tokens: np.ndarray, *, over: bool, ended: bool) -> str:
        """Takes the next tokens i32[n] and returns the text that can now be shown.

        `over`: no more will come; `ended`: the last of them is the token that ends a text,
        which has no text itself.
        """
        if self.finish is not None:
            return ""
        before = len(self._ids)
        self._ids += tokens[: len(tokens) - ended].tolist()
        self.tokens += len(tokens)
        whole = self._tokenizer.decode(self._ids)
        cut = self._stop_in(whole)
        if cut is not None:
            self.tokens = next(
                n for n in range(before + 1, len(self._ids) + 1) if self._stops_within(n)
            )
            return self._show(whole[:cut], "stop")
        if over:
            return self._show(whole, "stop" if ended else "length")
        whole = whole.rstrip(BROKEN)
        return self._show(whole[: len(whole) - self._beginning(whole)], None)

    def _stops_within(self, count: int) -> bool:
        return self._stop_in(self._tokenizer.decode(self._ids[:count])) is not None

    def _stop_in(self, text: str) -> int | None:
        """Where the first stop string in `text` begins."""
        return min(
            (place for stop in self._stops if (place := text.find(stop)) >= 0), default=None
        )

    def _beginning(self, text: str) -> int:
        """Characters at the end of `text` that could become a stop string."""
        lengths = (
            n
            for stop in self._stops
            for n in range(len(stop) - 1, 0, -1)
            if text.endswith(stop[:n])
        )
        return max(lengths, default=0)

    def _show(self, text: str, finish: Finish | None) -> str:
        piece, self.text, self.finish = text[self._shown :], text, finish
        self._shown = max(self._shown, len(text))
        return piece
