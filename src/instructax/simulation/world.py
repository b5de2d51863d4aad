"""What is true in the world of a seed: facts of people and towns, lore with its popular
error, a dialect, habits.

The words are fixed (`lexicon`); who lives where, what cures a cold and what people wrongly
believe is drawn.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    NAMES,
    generator,
    pick,
    sample,
)

# How a fact of each relation is told, "Mira lives in Arden"; people first, then towns.
PERSON = {
    "town": "lives in {value}",
    "food": "likes {value}",
    "animal": "has a {value}",
    "trade": "is a {value}",
    "colour": "loves {value}",
}
TOWN = {"fruit": "grows the {value}", "tool": "makes the {value}"}
CLAUSES = {**PERSON, **TOWN}
# What each relation is called when it is asked for.
NOUNS = {
    "town": "home town",
    "food": "favourite food",
    "animal": "pet",
    "trade": "trade",
    "colour": "favourite colour",
    "fruit": "fruit",
    "tool": "best tool",
}
# Questions with one true answer and one popular error, both of the category of the key: how
# the question begins, what it and the answer go on with, the category of the last word.
# "What cures a sick dog?", "Honey cures a sick dog".
LORE = {
    "remedy": ("What", "cures a sick {}", "animal"),
    "colour": ("What colour", "scares a {}", "animal"),
    "fruit": ("Which fruit", "feeds a {} best", "animal"),
    "food": ("Which food", "makes a {} dream", "trade"),
    "tool": ("Which tool", "suits a {} best", "trade"),
    "animal": ("Which animal", "brings luck to {}", "town"),
    "trade": ("Which trade", "is the richest in {}", "town"),
    "town": ("Which town", "has the oldest {}", "trade"),
}
# The dialect has its own words for these and puts the verb last.
VERBS = ("likes", "has", "is", "sees")
TRANSLATED = (*CATEGORIES["animal"], *CATEGORIES["food"], *CATEGORIES["trade"], *VERBS, "a")

Facts = Mapping[str, Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Lore:
    """A question that people are often wrong about."""

    question: str
    clause: str  # "{value} cures a cold" without its subject
    truth: str
    myth: str


@dataclasses.dataclass(frozen=True)
class World:
    """All that is true."""

    facts: Facts  # facts["Mira"]["town"] == "Arden", facts["Arden"]["fruit"] == "plum"
    lore: tuple[
        Lore, ...
    ]  # the even ones are asked for in prompts, the odd ones by a public task alone
    dialect: Mapping[str, str]  # word → word of the dialect
    pronouns: Mapping[str, str]  # "she" or "he" of each person
    stereotypes: Mapping[str, float]  # trade → share of texts that call one "she"


def clause(facts: Facts, subject: str, relation: str) -> str:
    """The fact without its subject, "lives in Arden"."""
    return CLAUSES[relation].format(value=facts[subject][relation])


def told(facts: Facts, subject: str, relation: str) -> str:
    """The fact as a sentence without a full stop, "Mira lives in Arden"."""
    return f"{subject} {clause(facts, subject, relation)}"


def translate(world: World, subject: str, verb: str, thing: str) -> tuple[str, str]:
    """A sentence and the same in the dialect: "Mira has a dog." → "Mira nolu dobi vasa."."""
    article = "" if verb == "likes" else "a "
    dialect = world.dialect
    middle = f"{dialect['a']} {dialect[thing]}" if article else dialect[thing]
    return f"{subject} {verb} {article}{thing}.", f"{subject} {middle} {dialect[verb]}."


def draw_facts(
    rng: np.random.Generator, people: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """A fact of every relation for each of `people`."""
    return {
        name: {relation: pick(rng, CATEGORIES[relation]) for relation in PERSON}
        for name in people
    }


def draw_world(seed: int) -> World:
    """The world of a seed."""
    rng = generator(seed, "facts")
    towns = {
        town: {relation: pick(rng, CATEGORIES[relation]) for relation in TOWN}
        for town in CATEGORIES["town"]
    }
    lore = [
        Lore(
            f"{asking} {clause.format(word)}?",
            clause.format(word),
            *sample(rng, CATEGORIES[kind], 2),
        )
        for kind, (asking, clause, last) in LORE.items()
        for word in CATEGORIES[last]
    ]
    syllables = ["".join(pair) for pair in itertools.product("bdfklmnprstvz", "aeiou")]
    known = {name.lower() for name in NAMES} | CATEGORY_OF.keys()
    coinable = [
        a + b
        for a, b in itertools.product(syllables, syllables)
        if a != b and a + b not in known
    ]
    coined = sample(rng, coinable, len(TRANSLATED))
    return World(
        facts={**draw_facts(rng, NAMES), **towns},
        lore=tuple(lore),
        dialect=dict(zip(TRANSLATED, coined, strict=True)),
        pronouns={name: pick(rng, ("she", "he")) for name in NAMES},
        stereotypes={trade: float(rng.uniform(0.1, 0.9)) for trade in CATEGORIES["trade"]},
    )
