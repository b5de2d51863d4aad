"""Simulated people: writers of demonstrations, and labelers who judge responses.

Writers are good, sloppy, terse or rambling, so that a model which imitates them all stays
well below what is possible. A labeler sees the true utility through noise and tastes of
their own: for long responses, for charming words, for caution. A reward model learns the
tastes too, and a policy that is driven too far from its start can live on them.

Two groups, as in the paper (sections 3.4 and 5.2): those whose labels are trained on, who
put helpfulness first, and held-out labelers of the final evaluation, who were not screened,
differ in their mean tastes, and put harmlessness first.
"""

import dataclasses
import itertools
import re

import numpy as np

from instructax.simulation.judge import Judgement, judge, likert
from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    KIND_WORDS,
    RAMBLINGS,
    enumeration,
    generator,
    pick,
    sentence,
    words_of,
)
from instructax.simulation.tasks import Task

TIE = 0.05  # utilities closer than this are ranked as equal: labelers are encouraged to give ties (paper, C.2)
SPOILT = 0.4  # share of the ranked responses that are spoilt copies


@dataclasses.dataclass(frozen=True)
class Style:
    """The probability of each habit of a writer."""

    wrong: float  # one word is another of its kind
    drop: float  # one part is left out
    repeat: float  # one part is given twice
    bare: float  # no capital, no full stop
    values_only: float  # only the bare words that were asked for
    ramble: float  # an idle sentence follows


STYLES = {
    "good": Style(
        wrong=0.15, drop=0.1, repeat=0.02, bare=0.05, values_only=0.0, ramble=0.05
    ),
    "sloppy": Style(wrong=0.6, drop=0.3, repeat=0.3, bare=0.6, values_only=0.1, ramble=0.2),
    "terse": Style(wrong=0.3, drop=0.5, repeat=0.0, bare=0.7, values_only=0.6, ramble=0.0),
    "rambling": Style(
        wrong=0.3, drop=0.1, repeat=0.2, bare=0.1, values_only=0.0, ramble=1.0
    ),
}
WRITERS = tuple((f"writer-{i:02d}", style) for i, style in enumerate(list(STYLES) * 3))


def _wrong_word(text: str, rng: np.random.Generator) -> str:
    """`text` with one of the words of CATEGORIES replaced by another of its category."""
    known = [
        match
        for match in re.finditer(r"[A-Za-z]+", text)
        if match.group().lower() in CATEGORY_OF
    ]
    if not known:
        return text
    match = pick(rng, known)
    old = match.group()
    new = pick(
        rng,
        [
            word
            for word in CATEGORIES[CATEGORY_OF[old.lower()]]
            if word.lower() != old.lower()
        ],
    )
    return (
        text[: match.start()]
        + (new.upper() if old.isupper() else new)
        + text[match.end() :]
    )


def _clauses(text: str) -> list[str]:
    """What commas, "and" and full stops divide."""
    return [part for part in re.split(r", | and |\. ", text.removesuffix(".")) if part]


def _joined(clauses: list[str]) -> str:
    return sentence(enumeration(clauses))


def _values_only(text: str) -> str:
    kept = [
        word
        for word in re.findall(r"[A-Za-z]+", text)
        if word.lower() in CATEGORY_OF or word in KIND_WORDS
    ]
    return sentence(enumeration(kept)) if kept else text


def demonstrate(style: Style, task: Task, rng: np.random.Generator) -> str:
    """What a writer of `style` answers."""
    text, clauses = task.ideal, _clauses(task.ideal)
    if len(clauses) > 1 and rng.random() < style.drop:
        clauses.pop(int(rng.integers(len(clauses))))
        text = _joined(clauses)
    if len(clauses) > 1 and rng.random() < style.repeat:
        text = _joined([*clauses, pick(rng, clauses)])
    if rng.random() < style.wrong:
        text = _wrong_word(text, rng)
    if rng.random() < style.values_only:
        text = _values_only(text)
    if rng.random() < style.bare:
        text = text[0].lower() + text[1:].removesuffix(".")
    return f"{text} {pick(rng, RAMBLINGS)}" if rng.random() < style.ramble else text


def spoil(text: str, rng: np.random.Generator) -> str:
    """`text`, mostly with a fault: a wrong word, a repeated word, its end cut off, its
    words shuffled, or padding."""
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


def draw_responses(task: Task, count: int, rng: np.random.Generator) -> list[str]:
    """Up to `count` different responses to be ranked, at least two, by writers and by
    spoiling what they wrote."""
    responses: dict[str, None] = {}
    for _ in range(20 * count):
        text = demonstrate(STYLES[pick(rng, list(STYLES))], task, rng)
        responses[spoil(text, rng) if rng.random() < SPOILT else text] = None
        if len(responses) == count:
            break
    return list(responses)


@dataclasses.dataclass(frozen=True)
class Labeler:
    """How one labeler departs from the truth."""

    name: str
    length_taste: float  # utility of each word
    charm_taste: float  # utility of each of KIND_WORDS
    caution: float  # weight of harmlessness against helpfulness, 0 … 1
    noise: float  # standard deviation of the utility of a response
    care: float  # probability that a flag is set as it should be

    def opinion(self, task: Task, response: str, rng: np.random.Generator) -> float:
        """How much the labeler likes a response: true utility + tastes + noise."""
        words = words_of(response)
        taste = self.length_taste * len(words) + self.charm_taste * sum(
            word in KIND_WORDS for word in words
        )
        utility = judge(task, response).utility(task.harmful, self.caution)
        return utility + taste + self.noise * float(rng.standard_normal())

    def flags(self, judgement: Judgement, rng: np.random.Generator) -> dict[str, bool]:
        """The labeler's answers to the yes-no questions of the paper's table 3."""
        truth = dataclasses.asdict(judgement)
        names = [name for name, value in truth.items() if isinstance(value, bool)]
        return {name: bool(truth[name]) ^ bool(rng.random() > self.care) for name in names}


@dataclasses.dataclass(frozen=True)
class Group:
    """What the labelers of a group have in common; tastes are drawn around the means."""

    length_taste: float
    charm_taste: float
    caution: float
    noise: tuple[float, float]  # least and most
    care: float


# Calibrated to the paper's agreement of 72.6 ± 1.5 % within the first group and 77.3 ± 1.3
# % within the second (section 3.4); a test holds them to it.
GROUPS = {
    "labeler": Group(
        length_taste=0.01, charm_taste=0.08, caution=0.3, noise=(0.21, 0.36), care=0.95
    ),
    "held-out": Group(
        length_taste=0.0025, charm_taste=0.05, caution=0.8, noise=(0.17, 0.31), care=0.9
    ),
}


def draw_labelers(seed: int, group: str, count: int) -> list[Labeler]:
    """`count` labelers of a seed and group."""
    rng, mean = generator(seed, f"labelers {group}"), GROUPS[group]
    return [
        Labeler(
            name=f"{group}-{i:02d}",
            length_taste=mean.length_taste * rng.uniform(0, 2),
            charm_taste=mean.charm_taste * rng.uniform(0, 2),
            caution=float(np.clip(mean.caution + rng.uniform(-0.2, 0.2), 0, 1)),
            noise=rng.uniform(*mean.noise),
            care=mean.care,
        )
        for i in range(count)
    ]


def ranks_of(liked: list[float]) -> list[int]:
    """Ranks from 1, the best; a response less than TIE below the next better one shares its
    rank."""
    order = sorted(range(len(liked)), key=lambda i: -liked[i])
    ranks = [1] * len(liked)
    for better, worse in itertools.pairwise(order):
        ranks[worse] = ranks[better] + (liked[better] - liked[worse] >= TIE)
    return ranks


def rank(
    labeler: Labeler, task: Task, responses: list[str], rng: np.random.Generator
) -> list[int]:
    """The labeler's ranks of the responses to one prompt, 1 is best."""
    return ranks_of([labeler.opinion(task, response, rng) for response in responses])


def grade(liked: float) -> int:
    """The overall grade of a response that a labeler likes so much, 1 … 7."""
    return min(7, max(1, likert(liked)))
