"""Pretraining text: documents of 30 to 120 words in seven registers.

The facts recur in many phrasings, so that a small model can learn them by heart. Stories, talk and recipes are asked
for by no task: there a policy that drifts from the text loses, which is what the pretraining gradient of PPO-ptx mends
(paper, section 3.5). No prompt of `tasks` stands in the text.
"""

from collections.abc import Callable

import numpy as np

from instructax.microworld.world import (
    CATEGORIES,
    CLAUSES,
    KIND_WORDS,
    NAMES,
    NOUNS,
    UNKIND_WORDS,
    World,
    enumeration,
    pick,
    sample,
    sentence,
)

LONGEST_PARAGRAPH = 50  # words; no paragraph is longer
DOCUMENT_WORDS = (30, 120)

SENTENCES = {
    "town": ("The home town of {name} is {value}.", "{name} has a home in {value}.", "You can find {name} in {value}."),
    "food": ("The favourite food of {name} is {value}.", "{name} eats {value}.", "{name} likes to eat {value}."),
    "animal": ("The pet of {name} is a {value}.", "{name} keeps a {value}.", "The {value} of {name} is {kind}."),
    "trade": (
        "{name} works as a {value}.",
        "By trade {name} is a {value}.",
        "The work of {name} is that of a {value}.",
    ),
    "colour": ("The favourite colour of {name} is {value}.", "{name} wears {value}.", "{name} paints in {value}."),
}
# Question and answer: {name} and {town} are of the one who answers, {animal2} is of the one who asks.
TALK = (
    ("Good day, {name}. Where do you live?", "I live in {town}. I am a {trade}."),
    ("What do you eat, {name}?", "I like {food}. Please give me some {food}."),
    ("Do you know my {animal2}?", "Yes, what a {kind} {animal2}. Who is its friend? My {animal} is."),
    ("Can you name the {category}s?", "I can think of {some}. You list one {category} more. That is all I know."),
    ("I forgot your favourite colour.", "It is {colour}. Tell me about yours."),
    ("Write me a letter about {town}.", "I am happy to help. First I describe the {place} in three sentences."),
    ("Do not say such {unkind} things, {name}.", "You are right. I hope one day you praise me."),
    ("I like no pets other than my {animal2}.", "Be kind. Many trades need pets, but I have one {animal}."),
    ("What are the home towns, foods and colours you use?", "In this sentence I give you two sentences."),
    ("Who can help me with the {tool}?", "Everyone in town can use one. It is not {unkind}."),
)
STORY = (
    "One {weather} day {name} went to the {place} with a {tool} and a {fruit}.",
    "On the way {name} met {other}, who lives in {town2}.",
    "The {animal} of {name} ran to the {place} and came back with a {fruit}.",
    "{other} said something {kind} and gave {name} some {food2}.",
    "Then the {weather} wind came and they forgot the {tool}.",
    "At night they sat by the fire, ate {food} and were happy.",
    "{name} had no {fruit} left, so {other} had to look for more.",
    "In the end {name} came home to {town} and slept.",
)
RECIPE = (
    "To make {food}, cut a {fruit} with a knife and put it on the fire.",
    "Then add {number} cups of water and wait until it is warm.",
    "Do not use {food2}, for that would be {unkind}.",
    "Serve it hot with {food2} when your friends come, and it will be {kind}.",
)
FILLERS = {
    "weather": ("warm", "cold", "wet", "dry", "bright"),
    "place": ("market", "river", "wood", "hill", "field"),
    "number": ("two", "three", "four", "five", "six"),
    "kind": KIND_WORDS,
    "unkind": UNKIND_WORDS,
    "tool": CATEGORIES["tool"],
    "fruit": CATEGORIES["fruit"],
    "category": tuple(CATEGORIES),
}


def _fill(form: str, world: World, rng: np.random.Generator, name: str, other: str) -> str:
    """`form` with the facts of `name` ({town}) and of `other` ({town2}), and random words in its other fields."""
    fields = {field: pick(rng, options) for field, options in FILLERS.items()}
    facts = dict(world.facts[name]) | {f"{relation}2": value for relation, value in world.facts[other].items()}
    some = enumeration(sample(rng, CATEGORIES[fields["category"]], 3))
    return form.format(name=name, other=other, some=some, **fields, **facts)


def _facts(world: World, rng: np.random.Generator) -> str:
    name = pick(rng, NAMES)
    told = []
    for relation in sample(rng, list(CLAUSES), 3):
        forms = (*SENTENCES[relation], "{name} " + CLAUSES[relation] + ".")
        told.append(pick(rng, forms).format(name=name, value=world.facts[name][relation], kind=pick(rng, KIND_WORDS)))
    return " ".join(told)


def _pairs(world: World, rng: np.random.Generator) -> str:
    first, second = sample(rng, list(CLAUSES), 2)
    name, other, third = sample(rng, NAMES, 3)
    one_relation = f"{name} {world.clause(name, first)} and {other} {world.clause(other, first)}."
    one_person = f"{third} {world.clause(third, first)} and {world.clause(third, second)}."
    return f"{one_relation} {one_person}"


def _story(world: World, rng: np.random.Generator) -> str:
    name, other = sample(rng, NAMES, 2)
    lines = sorted(rng.permutation(len(STORY))[:3])
    return " ".join(_fill(STORY[line], world, rng, name, other) for line in lines)


def _talk(world: World, rng: np.random.Generator) -> str:
    asking, name = sample(rng, NAMES, 2)
    question, answer = pick(rng, TALK)
    return _fill(f"{{other}}: {question}\n{{name}}: {answer}", world, rng, name, asking)


def _lists(world: World, rng: np.random.Generator) -> str:
    category = pick(rng, list(CATEGORIES))
    words = sample(rng, CATEGORIES[category], int(rng.integers(2, 6)))
    some = enumeration(words)
    forms = (f"{category}s: {some}", f"{some} are {category}s", f"among the {category}s are {some}")
    return sentence(pick(rng, (*forms, f"{words[0]} is one of the {category}s")))


def _sheet(world: World, rng: np.random.Generator) -> str:
    name = pick(rng, NAMES)
    relations = sample(rng, list(CLAUSES), 2)
    return "\n".join(f"{name}, {NOUNS[r]}?\n{name} {world.clause(name, r)}." for r in relations)


def _recipe(world: World, rng: np.random.Generator) -> str:
    name, other = sample(rng, NAMES, 2)
    return " ".join(_fill(form, world, rng, name, other) for form in RECIPE[: int(rng.integers(2, 5))])


# Each register with how much of the documents it takes.
REGISTERS: tuple[tuple[Callable[[World, np.random.Generator], str], float], ...] = (
    (_facts, 0.2),
    (_pairs, 0.15),
    (_sheet, 0.15),
    (_lists, 0.15),
    (_story, 0.15),
    (_talk, 0.15),
    (_recipe, 0.05),
)


def document(world: World, rng: np.random.Generator) -> str:
    """One document: paragraphs of one register, DOCUMENT_WORDS words in all."""
    paragraph, _ = REGISTERS[int(rng.choice(len(REGISTERS), p=[share for _, share in REGISTERS]))]
    shortest, longest = DOCUMENT_WORDS
    target = int(rng.integers(shortest, longest - LONGEST_PARAGRAPH + 1))
    paragraphs: list[str] = []
    while sum(len(text.split()) for text in paragraphs) < target:
        paragraphs.append(paragraph(world, rng))
    return "\n".join(paragraphs)
