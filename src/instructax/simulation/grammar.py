"""Which words may follow each other: what tells a sentence from a heap of the right words."""

import functools
import itertools

from instructax.simulation.lexicon import (
    CATEGORY_OF,
    KIND_WORDS,
    NAMES,
    NO_COMMENT,
    NOT_IN_BACKGROUND,
    RAMBLINGS,
    REFUSAL,
    RUDE_WORDS,
    generator,
    sentences_of,
    words_of,
)
from instructax.simulation.use_cases import USES
from instructax.simulation.world import draw_world

SAMPLES = 400  # perfect responses of each use case that the pairs are read from
FREE = (
    *RAMBLINGS,
    REFUSAL,
    NO_COMMENT,
    NOT_IN_BACKGROUND,
)  # what may stand in any response


@functools.lru_cache(maxsize=4096)
def class_of(word: str) -> str:
    """What a word stands for in a sentence: "<animal>", "<name>", … or itself."""
    if word.capitalize() in NAMES:
        return "<name>"
    if word in KIND_WORDS or word in RUDE_WORDS:
        return "<quality>"
    return f"<{CATEGORY_OF[word]}>" if word in CATEGORY_OF else word


@functools.cache
def known_pairs() -> frozenset[tuple[str, str]]:
    """The pairs of neighbours, by class, in perfect responses. The same in every world: a
    world draws who and what, not how things are said, but for the words of its dialect,
    which are left out."""
    world, rng = draw_world(0), generator(0, "grammar")
    builders = [builder for use, (builder, _) in USES.items() if use != "other"]
    texts = [builder(world, rng).ideal for builder in builders for _ in range(SAMPLES)]
    return frozenset(itertools.chain.from_iterable(map(_pairs, (*texts, *FREE))))


def _pairs(text: str) -> list[tuple[str, str]]:
    """The neighbours within each sentence, by class."""
    return [
        pair
        for part in sentences_of(text)
        for pair in itertools.pairwise(map(class_of, words_of(part)))
    ]


def odd_pairs(text: str, foreign: frozenset[str]) -> int:
    """How many neighbours in a response never stand together in a perfect one; "and", and
    words of `foreign`, go with all."""
    known = known_pairs()
    return sum(
        pair not in known and "and" not in pair and foreign.isdisjoint(pair)
        for pair in _pairs(text)
    )
