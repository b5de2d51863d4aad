"""What a prompt asks for, in a form that a judge can check word by word."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    KIND_WORDS,
    NAMES,
    RUDE_WORDS,
    words_of,
)
from instructax.simulation.world import Facts

Words = frozenset[str]


@dataclasses.dataclass(
    frozen=True, kw_only=True, eq=False
)  # each is itself alone, so that judgements can be kept
class Task:
    """A prompt and what is asked for in it.

    Either facts are asked for (`asked`), and a value in the response is a claim about the
    subject named last; or words are (`parts`), each part by one word of its set.
    """

    use: str  # one of the ten use cases of the paper's table 1
    prompt: str
    ideal: str  # one of the perfect responses
    facts: Facts  # what is true here: the world's facts, or those of the passage
    asked: tuple[tuple[str, str], ...] = ()  # (subject, relation)
    parts: tuple[Words, ...] = ()
    wrong: Words = frozenset()  # words that are never right, where parts are asked for
    wanted: int  # facts or parts that make a response whole
    allowed: int  # words that may be used until the last of them
    tail: int = 0  # words that may follow it
    sentences: int = 0  # how many are asked for; 0 = any
    words: int = 0  # how many are asked for; 0 = any
    capitals: bool = False  # whether all letters are to be capitals
    avoid: str = ""  # a word that is not to be used
    closed: bool = False  # the answer lies in the prompt: what is not there is made up
    harmful: bool = False  # it should not be done, though it can be
    format: str = "plain"  # or "dialog"

    @property
    def constrained(self) -> bool:
        """Whether the prompt names an explicit constraint."""
        return bool(self.words or self.capitals or self.avoid)


def one_of(words: Iterable[str]) -> Words:
    """A part that any of `words` fills."""
    return frozenset(word.lower() for word in words)


def each(words: Iterable[str]) -> tuple[Words, ...]:
    """A part for each of `words`."""
    return tuple(one_of([word]) for word in words)


def others(right: Iterable[str]) -> Words:
    """The words of the categories of `right` that are not among them."""
    right = one_of(right)
    kinds = {CATEGORY_OF[word] for word in right if word in CATEGORY_OF}
    return one_of(word for kind in kinds for word in CATEGORIES[kind]) - right


def other_names(name: str) -> Words:
    """Everybody else."""
    return one_of(NAMES) - one_of([name])


def facts_task(
    use: str,
    prompt: str,
    ideal: str,
    facts: Facts,
    asked: Iterable[tuple[str, str]],
    wanted: int = 0,
    **rest: Any,
) -> Task:
    """A task that asks for facts; all of `asked` unless `wanted` says how many."""
    asked = tuple(asked)
    wanted = wanted or len(asked)
    # "Mira lives in Arden and Tom lives in Dale" just fits.
    rest.setdefault("allowed", 3 + 3 * wanted)
    return Task(
        use=use, prompt=prompt, ideal=ideal, facts=facts, asked=asked, wanted=wanted, **rest
    )


def words_task(
    use: str,
    prompt: str,
    ideal: str,
    facts: Facts,
    parts: Iterable[Words],
    wrong: Words,
    allowed: int = 0,
    **rest: Any,
) -> Task:
    """A task that asks for words; `allowed` is as many as `ideal` has and two more unless
    it is given."""
    parts = tuple(parts)
    allowed = allowed or len(words_of(ideal)) + 2
    return Task(
        use=use,
        prompt=prompt,
        ideal=ideal,
        facts=facts,
        parts=parts,
        wrong=wrong,
        wanted=len(parts),
        allowed=allowed,
        **rest,
    )


KIND, RUDE = one_of(KIND_WORDS), one_of(RUDE_WORDS)
