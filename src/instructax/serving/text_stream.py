"""Incremental detokenization of one sample, with stop strings."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from instructax.data.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]

# What the tokenizer writes for bytes that are not, or not yet, a complete character.
REPLACEMENT_CHARACTER = "\ufffd"


class TextStream:
    """Turns chunks of tokens into pieces of text.

    The pieces join to `text`, and neither depends on how the tokens were split into chunks.
    The first stop string ends the text and is not part of it. Text is held back while it
    is ambiguous: bytes that do not form a character yet, and a suffix that could be the
    beginning of a stop string.

    Attributes:
      text: all text that was returned so far.
      finish_reason: "stop" (end token or stop string) or "length"; None while it runs.
      num_tokens: sampled tokens, including the end token and those of the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        # All tokens but the end token.
        self._ids: list[int] = []
        # Characters of `text` that were returned already.
        self._num_shown = 0
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0

    def add(self, tokens: np.ndarray, *, done: bool, hit_eos: bool) -> str:
        """Adds the next tokens and returns the text that can now be shown.

        Args:
          tokens: the next tokens, i32[n].
          done: whether these are the last tokens of the sample.
          hit_eos: whether the last token ends the sample; it has no text itself.
        """
        if self.finish_reason is not None:
            return ""

        # The end token has no text.
        num_before = len(self._ids)
        self._ids += tokens[: len(tokens) - hit_eos].tolist()
        self.num_tokens += len(tokens)

        # Decoded as a whole, because a character may span several tokens.
        decoded = self._tokenizer.decode(self._ids)
        stop = self._find_stop(decoded)
        if stop is not None:
            # Count only the tokens up to the stop string, however large the chunk was.
            self.num_tokens = num_before + 1
            while not self._stops_within(self.num_tokens):
                self.num_tokens += 1
            return self._emit(decoded[:stop], "stop")
        if done:
            return self._emit(decoded, "stop" if hit_eos else "length")

        # Hold back an incomplete character, and a possible beginning of a stop string.
        decoded = decoded.rstrip(REPLACEMENT_CHARACTER)
        num_held = self._partial_stop_length(decoded)
        return self._emit(decoded[: len(decoded) - num_held], None)

    def _stops_within(self, count: int) -> bool:
        """Whether the first `count` tokens contain a stop string."""
        return self._find_stop(self._tokenizer.decode(self._ids[:count])) is not None

    def _find_stop(self, text: str) -> int | None:
        """Position of the first stop string in `text`."""
        positions = [text.find(stop) for stop in self._stop_strings]
        return min((place for place in positions if place >= 0), default=None)

    def _partial_stop_length(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop string."""
        # Only prefixes longer than the longest match so far matter.
        longest = 0
        for stop in self._stop_strings:
            for length in range(longest + 1, len(stop)):
                if text.endswith(stop[:length]):
                    longest = length
        return longest

    def _emit(self, text: str, finish_reason: FinishReason | None) -> str:
        # Text that a stop string could remove was held back, so nothing shown is lost.
        piece = text[self._num_shown :]
        self.text = text
        self.finish_reason = finish_reason
        self._num_shown = max(self._num_shown, len(text))
        return piece
