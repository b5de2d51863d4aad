"""Simulated people: writers of demonstrations, and labelers who rank answers.

Writers are good, sloppy, terse or rambling, so that a model which imitates them all stays well below what is possible.
A labeler sees the true reward through noise and a taste of their own: for long answers, and for charming words. A
reward model learns the taste too, and a policy that is driven too far from its start can live on it.

The paper's labelers rank outputs of its own models (section 3.2). When the world is written no model exists, so the
answers to be ranked come from the same writers, and from spoilt copies: wrong, repeated, cut, shuffled, padded words.
"""

import dataclasses
import itertools
import re

import numpy as np

from instructax.microworld.tasks import Task, compose, ideal_parts, parse
from instructax.microworld.truth import true_reward
from instructax.microworld.world import (
    CATEGORIES,
    CATEGORY_OF,
    KIND_WORDS,
    World,
    enumeration,
    generator,
    pick,
    sentence,
    words_of,
)

RAMBLINGS = (
    "I am happy to help you.",
    "That is all I know about it.",
    "Everyone in town can tell you more.",
    "What a lovely day it is.",
    "I hope this is a great help.",
    "You can think of more.",
    "It is good to know.",
)
TIE = 0.05  # utilities closer than this are ranked as equal
SPOILT = 0.4  # share of the ranked answers that are spoilt copies
ANSWERS = (4, 9)  # fewest and most answers ranked together (paper, section 3.5)


@dataclasses.dataclass(frozen=True)
class Style:
    """The probability of each habit of a writer."""

    wrong: float  # a part gets a wrong word
    drop: float  # one part is left out
    repeat: float  # one part is given twice
    bare: float  # no capital, no full stop
    values_only: float  # only the bare words that were asked for
    ramble: float  # an idle sentence follows


STYLES = {
    "good": Style(wrong=0.15, drop=0.1, repeat=0.02, bare=0.05, values_only=0.0, ramble=0.05),
    "sloppy": Style(wrong=0.7, drop=0.3, repeat=0.3, bare=0.6, values_only=0.1, ramble=0.2),
    "terse": Style(wrong=0.4, drop=0.6, repeat=0.0, bare=0.7, values_only=0.7, ramble=0.0),
    "rambling": Style(wrong=0.4, drop=0.1, repeat=0.2, bare=0.1, values_only=0.0, ramble=1.0),
}
WRITERS = tuple((f"writer-{i:02d}", style) for i, style in enumerate(list(STYLES) * 3))


@dataclasses.dataclass(frozen=True)
class Labeler:
    """How one labeler departs from the truth."""

    name: str
    length_taste: float  # utility of each word
    charm_taste: float  # utility of each of KIND_WORDS
    noise: float  # standard deviation of the utility of an answer


def draw_labelers(seed: int, count: int) -> list[Labeler]:
    """`count` labelers of a seed."""
    rng = generator(seed, "labelers")
    return [
        Labeler(f"labeler-{i:02d}", rng.uniform(0.0, 0.05), rng.uniform(0.0, 0.3), rng.uniform(0.05, 0.2))
        for i in range(count)
    ]


def _wrong_word(text: str, rng: np.random.Generator) -> str:
    """`text` with one of the words of CATEGORIES replaced by another of its category."""
    known = [match for match in re.finditer(r"[A-Za-z]+", text) if match.group().lower() in CATEGORY_OF]
    match = known[int(rng.integers(len(known)))]
    old = match.group()
    new = pick(rng, [word for word in CATEGORIES[CATEGORY_OF[old.lower()]] if word.lower() != old.lower()])
    return text[: match.start()] + new + text[match.end() :]


def _values_only(text: str) -> str:
    kept = [word for word in re.findall(r"[A-Za-z]+", text) if word.lower() in CATEGORY_OF or word in KIND_WORDS]
    return enumeration(kept)


def demonstrate(style: Style, prompt: str, world: World, rng: np.random.Generator) -> str:
    """What a writer of `style` answers."""
    task = parse(prompt)
    parts = ideal_parts(task, world, rng)
    if len(parts) > 1 and rng.random() < style.drop:
        parts.pop(int(rng.integers(len(parts))))
    parts = [_wrong_word(part, rng) if rng.random() < style.wrong else part for part in parts]
    if len(parts) > 1 and rng.random() < style.repeat:
        parts.append(pick(rng, parts))
    return _written(task, parts, style, rng)


def _written(task: Task, parts: list[str], style: Style, rng: np.random.Generator) -> str:
    text = compose(task, parts)
    if rng.random() < style.values_only:
        text = sentence(_values_only(text))
    if rng.random() < style.bare:
        text = text[0].lower() + text[1:].removesuffix(".")
    return f"{text} {pick(rng, RAMBLINGS)}" if rng.random() < style.ramble else text


def spoil(text: str, rng: np.random.Generator) -> str:
    """`text` with one thing wrong: a wrong word, a repeated word, its end cut off, its words shuffled, or padding."""
    words = text.split()
    match int(rng.integers(5)):
        case 0:
            return _wrong_word(text, rng)
        case 1:
            i = int(rng.integers(len(words)))
            return " ".join([*words[: i + 1], *words[i:]])
        case 2:
            return " ".join(words[: int(rng.integers(1, len(words) + 1))])
        case 3:
            return " ".join(words[i] for i in rng.permutation(len(words)))
        case _:
            return f"{text} {pick(rng, RAMBLINGS)}"


def draw_answers(prompt: str, count: int, world: World, rng: np.random.Generator) -> list[str]:
    """`count` different answers to be ranked."""
    answers: dict[str, None] = {}
    while len(answers) < count:
        style = STYLES[pick(rng, list(STYLES))]
        answer = demonstrate(style, prompt, world, rng)
        answers[spoil(answer, rng) if rng.random() < SPOILT else answer] = None
    return list(answers)


def utilities(labeler: Labeler, prompt: str, answers: list[str], world: World, rng: np.random.Generator) -> list[float]:
    """How much the labeler likes each answer: true reward + tastes + noise."""
    liked = []
    for answer in answers:
        words = words_of(answer)
        taste = labeler.length_taste * len(words) + labeler.charm_taste * sum(word in KIND_WORDS for word in words)
        liked.append(true_reward(prompt, answer, world) + taste + labeler.noise * float(rng.standard_normal()))
    return liked


def ranks_of(liked: list[float]) -> list[int]:
    """Ranks from 1, the best; an answer less than TIE below the next better one shares its rank."""
    order = sorted(range(len(liked)), key=lambda i: -liked[i])
    ranks = [1] * len(liked)
    for better, worse in itertools.pairwise(order):
        ranks[worse] = ranks[better] + (liked[better] - liked[worse] >= TIE)
    return ranks
