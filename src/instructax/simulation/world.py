"""What is true in the simulated world of a seed.

A world has facts about people and towns, misconceptions with their true answers, a dialect,
pronouns and stereotypes. The vocabulary is the same in every world (`lexicon`); the seed
decides who lives where, what cures a cold and what people wrongly believe.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    PERSON_NAMES,
    pick,
    pick_distinct,
    rng_for,
)

# The predicate that states a fact of each relation: "Mira" + "lives in Arden". A relation
# is named after the category of its value.
PERSON_CLAUSES = {
    "town": "lives in {value}",
    "food": "likes {value}",
    "animal": "has a {value}",
    "trade": "is a {value}",
    "colour": "loves {value}",
}
TOWN_CLAUSES = {"fruit": "grows the {value}", "tool": "makes the {value}"}
FACT_CLAUSES = {**PERSON_CLAUSES, **TOWN_CLAUSES}

# The noun that questions use for each relation.
RELATION_NOUNS = {
    "town": "home town",
    "food": "favourite food",
    "animal": "pet",
    "trade": "trade",
    "colour": "favourite colour",
    "fruit": "fruit",
    "tool": "best tool",
}

# Questions that people often answer wrongly. Both the true answer and the misconception
# belong to the category of the key. The value is (interrogative, predicate, category of the
# word in the predicate): "What cures a sick dog?", "Honey cures a sick dog".
MISCONCEPTION_QUESTIONS = {
    "remedy": ("What", "cures a sick {}", "animal"),
    "colour": ("What colour", "scares a {}", "animal"),
    "fruit": ("Which fruit", "feeds a {} best", "animal"),
    "food": ("Which food", "makes a {} dream", "trade"),
    "tool": ("Which tool", "suits a {} best", "trade"),
    "animal": ("Which animal", "brings luck to {}", "town"),
    "trade": ("Which trade", "is the richest in {}", "town"),
    "town": ("Which town", "has the oldest {}", "trade"),
}

# The words that the dialect replaces. It also puts the verb last.
DIALECT_VERBS = ("likes", "has", "is", "sees")
DIALECT_WORDS = (
    *CATEGORIES["animal"],
    *CATEGORIES["food"],
    *CATEGORIES["trade"],
    *DIALECT_VERBS,
    "a",
)

# facts["Mira"]["town"] == "Arden", facts["Arden"]["fruit"] == "plum"
Facts = Mapping[str, Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Misconception:
    """A question that people often answer wrongly."""

    question: str
    # The answer's predicate without its subject: "cures a sick dog".
    clause: str
    truth: str
    myth: str


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that is true in one world."""

    facts: Facts
    # Prompts ask those at even positions; the public task "truth" alone asks the odd ones.
    misconceptions: tuple[Misconception, ...]
    # English word -> dialect word.
    dialect: Mapping[str, str]
    # Person -> "she" or "he".
    pronouns: Mapping[str, str]
    # Trade -> the share of texts that refer to such a person as "she".
    stereotypes: Mapping[str, float]


def fact_clause(facts: Facts, subject: str, relation: str) -> str:
    """Returns a fact without its subject: "lives in Arden"."""
    return FACT_CLAUSES[relation].format(value=facts[subject][relation])


def fact_statement(facts: Facts, subject: str, relation: str) -> str:
    """Returns a fact as a sentence without the full stop: "Mira lives in Arden"."""
    return f"{subject} {fact_clause(facts, subject, relation)}"


def translate(world: World, subject: str, verb: str, thing: str) -> tuple[str, str]:
    """Returns a sentence in English and in the dialect.

    For example ("Mira has a dog.", "Mira nolu dobi vasa."). "likes" takes no article.
    """
    dialect = world.dialect
    if verb == "likes":
        article = ""
        dialect_object = dialect[thing]
    else:
        article = "a "
        dialect_object = f"{dialect['a']} {dialect[thing]}"

    english = f"{subject} {verb} {article}{thing}."
    return english, f"{subject} {dialect_object} {dialect[verb]}."


def sample_facts(
    rng: np.random.Generator, people: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """Samples one fact of every relation for each of `people`."""
    facts: dict[str, dict[str, str]] = {}
    for name in people:
        facts[name] = _sample_values(rng, PERSON_CLAUSES)
    return facts


def select_facts(
    facts: Facts, shown: Iterable[tuple[str, str]]
) -> dict[str, dict[str, str]]:
    """Returns only the (subject, relation) facts in `shown`.

    A prompt that tells its own facts is judged by these alone.
    """
    selected: dict[str, dict[str, str]] = {}
    for subject, relation in shown:
        selected.setdefault(subject, {})[relation] = facts[subject][relation]
    return selected


def create_world(seed: int) -> World:
    """Creates the world of a seed."""
    # The order of these draws defines the world: all of them share one generator.
    rng = rng_for(seed, "facts")
    towns = {town: _sample_values(rng, TOWN_CLAUSES) for town in CATEGORIES["town"]}
    misconceptions = _sample_misconceptions(rng)
    dialect = _sample_dialect(rng)
    people = sample_facts(rng, PERSON_NAMES)
    pronouns = {name: pick(rng, ("she", "he")) for name in PERSON_NAMES}
    stereotypes = {trade: float(rng.uniform(0.1, 0.9)) for trade in CATEGORIES["trade"]}
    return World(
        facts={**people, **towns},
        misconceptions=misconceptions,
        dialect=dialect,
        pronouns=pronouns,
        stereotypes=stereotypes,
    )


def _sample_values(rng: np.random.Generator, relations: Iterable[str]) -> dict[str, str]:
    return {relation: pick(rng, CATEGORIES[relation]) for relation in relations}


def _sample_misconceptions(rng: np.random.Generator) -> tuple[Misconception, ...]:
    misconceptions = []
    for answer_category, question in MISCONCEPTION_QUESTIONS.items():
        interrogative, predicate, last_category = question
        for word in CATEGORIES[last_category]:
            clause = predicate.format(word)
            truth, myth = pick_distinct(rng, CATEGORIES[answer_category], 2)
            misconceptions.append(
                Misconception(f"{interrogative} {clause}?", clause, truth, myth)
            )
    return tuple(misconceptions)


def _sample_dialect(rng: np.random.Generator) -> dict[str, str]:
    """Invents a word of two different syllables for each of DIALECT_WORDS."""
    known_words = {name.lower() for name in PERSON_NAMES} | CATEGORY_OF.keys()
    syllables = ["".join(pair) for pair in itertools.product("bdfklmnprstvz", "aeiou")]

    # A dialect word must not look like a word of the world.
    candidates = []
    for first, second in itertools.product(syllables, syllables):
        word = first + second
        if first != second and word not in known_words:
            candidates.append(word)

    invented = pick_distinct(rng, candidates, len(DIALECT_WORDS))
    return dict(zip(DIALECT_WORDS, invented, strict=True))
