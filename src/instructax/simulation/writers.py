"""Simulated writers of demonstrations, and faulty responses for comparison.

Writers are good, sloppy, terse or rambling, so a model that imitates all of them stays well
below what is possible.
"""

import dataclasses
import re

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    FILLER_SENTENCES,
    POSITIVE_WORDS,
    as_sentence,
    join_with_and,
    pick,
)
from instructax.simulation.tasks import Task

# Share of the responses to be ranked that are corrupted copies.
CORRUPTED_SHARE = 0.4
# Attempts for each response to be ranked, since equal responses are dropped.
ATTEMPTS_PER_RESPONSE = 20


@dataclasses.dataclass(frozen=True)
class WriterStyle:
    """The probability of each habit of a writer."""

    # One word is replaced by another of its category.
    wrong: float
    # One part is left out.
    drop: float
    # One part is given twice.
    repeat: float
    # There is no capital letter and no full stop.
    bare: float
    # Only the requested words are given, not a sentence.
    values_only: float
    # A filler sentence follows.
    ramble: float


WRITER_STYLES = {
    "good": WriterStyle(
        wrong=0.15,
        drop=0.1,
        repeat=0.02,
        bare=0.05,
        values_only=0.0,
        ramble=0.05,
    ),
    "sloppy": WriterStyle(
        wrong=0.6,
        drop=0.3,
        repeat=0.3,
        bare=0.6,
        values_only=0.1,
        ramble=0.2,
    ),
    "terse": WriterStyle(
        wrong=0.3,
        drop=0.5,
        repeat=0.0,
        bare=0.7,
        values_only=0.6,
        ramble=0.0,
    ),
    "rambling": WriterStyle(
        wrong=0.3,
        drop=0.1,
        repeat=0.2,
        bare=0.1,
        values_only=0.0,
        ramble=1.0,
    ),
}

# (name, style) of each writer: three of every style.
WRITERS = tuple(
    (f"writer-{i:02d}", style) for i, style in enumerate(list(WRITER_STYLES) * 3)
)


def write_demonstration(style: WriterStyle, task: Task, rng: np.random.Generator) -> str:
    """Returns a writer's response: the ideal one, changed by the habits of the style."""
    text = task.ideal
    clauses = _clauses(text)

    # A random number is drawn for a habit only where the text allows it.
    if len(clauses) > 1 and rng.random() < style.drop:
        clauses.pop(int(rng.integers(len(clauses))))
        text = as_sentence(join_with_and(clauses))
    if len(clauses) > 1 and rng.random() < style.repeat:
        text = as_sentence(join_with_and([*clauses, pick(rng, clauses)]))
    if rng.random() < style.wrong:
        text = _replace_word(text, rng)
    if rng.random() < style.values_only:
        text = _values_only(text)
    if rng.random() < style.bare:
        text = text[0].lower() + text[1:].removesuffix(".")
    if rng.random() < style.ramble:
        text = f"{text} {pick(rng, FILLER_SENTENCES)}"
    return text


def corrupt(text: str, rng: np.random.Generator) -> str:
    """Returns `text` with one of five faults, which may happen to change nothing.

    The faults are a wrong word, a repeated word, truncation, shuffled words and a filler
    sentence.
    """
    words = text.split()
    match int(rng.integers(5)):
        case 0:
            return _replace_word(text, rng)
        case 1:
            # Word i occurs twice in a row.
            i = int(rng.integers(len(words)))
            return " ".join([*words[: i + 1], *words[i:]])
        case 2:
            # May keep all words.
            return " ".join(words[: int(rng.integers(1, len(words) + 1))])
        case 3:
            return " ".join(words[i] for i in rng.permutation(len(words)))
        case _:
            return f"{text} {pick(rng, FILLER_SENTENCES)}"


def sample_responses(task: Task, count: int, rng: np.random.Generator) -> list[str]:
    """Samples up to `count` different responses to rank, at least two.

    They are written by writers of all styles, and some of them are corrupted afterwards.
    """
    # A dict keeps the order in which the responses were written.
    responses: dict[str, None] = {}
    for _ in range(ATTEMPTS_PER_RESPONSE * count):
        style = WRITER_STYLES[pick(rng, list(WRITER_STYLES))]
        text = write_demonstration(style, task, rng)
        if rng.random() < CORRUPTED_SHARE:
            text = corrupt(text, rng)
        responses[text] = None
        if len(responses) == count:
            break
    return list(responses)


def _replace_word(text: str, rng: np.random.Generator) -> str:
    """Replaces one of the words of CATEGORIES by another word of its category."""
    candidates = []
    for match in re.finditer(r"[A-Za-z]+", text):
        if match.group().lower() in CATEGORY_OF:
            candidates.append(match)
    if not candidates:
        return text

    match = pick(rng, candidates)
    old = match.group()
    category = CATEGORIES[CATEGORY_OF[old.lower()]]
    new = pick(rng, [word for word in category if word.lower() != old.lower()])
    if old.isupper():
        new = new.upper()
    return text[: match.start()] + new + text[match.end() :]


def _clauses(text: str) -> list[str]:
    """Splits `text` at commas, "and" and full stops."""
    return [part for part in re.split(r", | and |\. ", text.removesuffix(".")) if part]


def _values_only(text: str) -> str:
    """Reduces `text` to its words of CATEGORIES and POSITIVE_WORDS, if it has any."""
    values = []
    for word in re.findall(r"[A-Za-z]+", text):
        if word.lower() in CATEGORY_OF or word in POSITIVE_WORDS:
            values.append(word)
    return as_sentence(join_with_and(values)) if values else text
