"""Texts on which tokenization rules of text metrics differ, for random and property
tests."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

# Articles, plain words, and periods that end a word or an abbreviation.
_PLAIN = "a an the The cat cats sat mat. on, of dog's U.S."
_NUMBERS = "3.5 1,000 7 07 5% $5 -2 2-1 1. .5 1e3 nan ½"
_PUNCTUATED = "well-known (so) \"yes\" end- x.y ,,. !? ' '' | &amp; &quot; &lt;b&gt;"
_NON_ASCII = "¿qué? naïve Ωmega ÉTÉ 日本 ﬁn İstanbul … – l’a <skipped> &amp;lt;"

PLAIN = _PLAIN.split()
WORDS = " ".join([_PLAIN, _NUMBERS, _PUNCTUATED, _NON_ASCII]).split()

texts = st.lists(st.sampled_from([*WORDS, "\n", "\t"]), max_size=7).map(" ".join) | st.text(
    max_size=20
)
several_texts = st.lists(texts, min_size=1, max_size=3)
examples = hypothesis.settings(max_examples=200, deadline=None)


def random_text(rng: np.random.Generator, max_words: int) -> str:
    """A text with few distinct words, so that n-grams repeat."""
    words = rng.choice([*PLAIN, *rng.choice(WORDS, 6)], size=rng.integers(0, max_words + 1))
    separators = [" ", " ", " ", "", "\n", "  "]
    return "".join(word + rng.choice(separators) for word in words)


def corrupt(rng: np.random.Generator, text: str) -> str:
    """`text` with about a quarter of its words removed and some repeated."""
    words = []
    for word in text.split(" "):
        words += [word] * rng.choice([0, 1, 1, 2])
    return " ".join(words)
