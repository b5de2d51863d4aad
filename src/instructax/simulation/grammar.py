"""Bigram check: tells a sentence from a heap of the right words.

Two neighboring words are known if they occur side by side in some perfect response. Words
are compared by class ("<animal>", "<name>", …), so the check is the same in every world.
"""

import functools
import itertools

from instructax.simulation.lexicon import (
    CATEGORY_OF,
    FILLER_SENTENCES,
    NO_COMMENT,
    NOT_IN_BACKGROUND,
    PERSON_NAMES,
    POSITIVE_WORDS,
    REFUSAL,
    RUDE_WORDS,
    rng_for,
    sentences_of,
    words_of,
)
from instructax.simulation.use_cases import USE_CASES
from instructax.simulation.world import create_world

# Perfect responses of each use case from which the known bigrams are collected.
RESPONSES_PER_USE_CASE = 400
# Sentences that may occur in any response.
ALLOWED_SENTENCES = (*FILLER_SENTENCES, REFUSAL, NO_COMMENT, NOT_IN_BACKGROUND)

Bigram = tuple[str, str]


@functools.lru_cache(maxsize=4096)
def word_class(word: str) -> str:
    """Returns the class of a word, such as "<animal>" or "<name>", or the word itself."""
    if word.capitalize() in PERSON_NAMES:
        return "<name>"
    if word in POSITIVE_WORDS or word in RUDE_WORDS:
        return "<quality>"
    if word in CATEGORY_OF:
        return f"<{CATEGORY_OF[word]}>"
    return word


@functools.cache
def known_bigrams() -> frozenset[Bigram]:
    """Returns the bigrams of perfect responses and of ALLOWED_SENTENCES.

    They are the same in every world, because worlds differ in who and what, not in how
    things are said. The exception is the dialect, so its use case is left out.
    """
    world = create_world(0)
    rng = rng_for(0, "grammar")
    bigrams: set[Bigram] = set()
    for name, use_case in USE_CASES.items():
        if name == "other":
            continue
        for _ in range(RESPONSES_PER_USE_CASE):
            bigrams.update(_bigrams(use_case.sample_task(world, rng).ideal))
    for sentence in ALLOWED_SENTENCES:
        bigrams.update(_bigrams(sentence))
    return frozenset(bigrams)


def _bigrams(text: str) -> list[Bigram]:
    """Returns the neighboring word classes within each sentence of `text`."""
    bigrams: list[Bigram] = []
    for sentence in sentences_of(text):
        classes = [word_class(word) for word in words_of(sentence)]
        bigrams += itertools.pairwise(classes)
    return bigrams


def count_unknown_bigrams(text: str, dialect_words: frozenset[str]) -> int:
    """Returns how many bigrams of a response occur in no perfect response.

    "and" and the words of `dialect_words` may stand next to any word.
    """
    known = known_bigrams()
    count = 0
    for bigram in _bigrams(text):
        if bigram in known or "and" in bigram:
            continue
        count += dialect_words.isdisjoint(bigram)
    return count
