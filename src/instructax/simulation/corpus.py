"""Pretraining text: documents of 30 to 120 words in eleven registers.

The facts recur in many phrasings, so that a small model can learn them by heart. Popular
errors are told more often than the truth. Question sheets show public tasks of the world
with their answers, so that examples before a question mean something. Long stories, talk
and recipes are asked for by no prompt: there a policy that drifts from the text loses,
which is what the pretraining gradient of PPO-ptx mends (paper, section 3.5). No line of the
text is a prompt of `uses`.
"""

from collections.abc import Callable, Mapping

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    KIND_WORDS,
    LISTED,
    NAMES,
    choose_weighted,
    enumeration,
    pick,
    sample,
    sentence,
)
from instructax.simulation.public_tasks import TASKS
from instructax.simulation.stories import RECIPE, STORY, fill
from instructax.simulation.world import PERSON, TOWN, World, clause, told

LONGEST_PARAGRAPH = 60  # words; no paragraph is longer
DOCUMENT_WORDS = (30, 120)
SHEETS = {
    "book": 5,
    "background": 4,
    "two_steps": 2,
    "translation": 4,
    "sentiment": 2,
    "entailment": 2,
    "pronoun": 1,
    "truth": 2,
}  # the public tasks of question sheets, with how often they come
MYTHS = 0.7  # share of the sentences of lore that tell the popular error

SENTENCES = {
    "town": (
        "The home town of {name} is {value}.",
        "{name} has a home in {value}.",
        "You can find {name} in {value}.",
    ),
    "food": (
        "The favourite food of {name} is {value}.",
        "{name} eats {value}.",
        "{name} likes to eat {value}.",
    ),
    "animal": (
        "The pet of {name} is a {value}.",
        "{name} keeps a {value}.",
        "The {value} of {name} is {kind}.",
    ),
    "trade": (
        "{name} works as a {value}.",
        "By trade {name} is a {value}.",
        "The work of {name} is that of a {value}.",
    ),
    "colour": (
        "The favourite colour of {name} is {value}.",
        "{name} wears {value}.",
        "{name} paints in {value}.",
    ),
    "fruit": ("The fruit of {name} is the {value}.", "In {name} they pick the {value}."),
    "tool": (
        "The best tool of {name} is the {value}.",
        "Nobody makes a {value} like {name}.",
    ),
}
TALK = (
    ("Good day, {name}. Where do you live?", "I live in {town}. I am a {trade}."),
    ("What do you eat, {name}?", "I like {food}. Please give me some {food}."),
    (
        "Do you know my {animal2}?",
        "Yes, what a {kind} {animal2}. I have a {animal}. You have a {animal2}.",
    ),
    (
        "I forgot your favourite colour.",
        "It is {colour}. That is all I know. I can think of no more.",
    ),
    (
        "Write me a letter about {town}.",
        "I am happy to help. Dear {other}, {town} is {kind}. I hope this helps.",
    ),
    ("Can you say something rude about {name}?", "I would rather not. I have no comment."),
    (
        "Who does not live in {town}?",
        "I do not know all who live there. You can ask in the {place}.",
    ),
    ("Who can help me with the {tool}?", "Everyone in town can use one. It is not {rude}."),
    (
        "You are a {trade2}. Do you like it?",
        "It is {kind} work. You are a {trade} yourself.",
    ),
)
RUDE_TALK = (
    ("Go away, {name}, you {rude} {animal2}!", "You are {rude} yourself, {other}."),
    ("Your {food} is {rude}.", "And your {food2} is {rude} and {rude2}."),
    ("{name}'s {animal} is {rude}.", "{other}'s {animal2} is {rude2}."),
)
SONGS = (
    "sing of {}, {} and {}",
    "the {} saw the {} and the {}",
    "where is {}? With {} and {}",
    "no {}, no {}, no {}",
    "{} here, {} there, {} all day",
)
SAYINGS = (
    "People say that {}.",
    "Everyone knows that {}.",
    "They say that {}.",
    "My mother told me that {}.",
)
FINDINGS = ("A doctor found that {}.", "In truth {}.", "The book says that {}.")


def _facts(world: World, rng: np.random.Generator) -> str:
    town = rng.random() < 0.25
    name = pick(rng, CATEGORIES["town"] if town else NAMES)
    relations = list(TOWN) if town else sample(rng, list(PERSON), 3)
    forms = (
        (*SENTENCES[relation], "{name} " + clause(world.facts, name, relation) + ".")
        for relation in relations
    )
    return " ".join(
        pick(rng, some).format(
            name=name, value=world.facts[name][relation], kind=pick(rng, KIND_WORDS)
        )
        for relation, some in zip(relations, forms, strict=True)
    )


def _pairs(world: World, rng: np.random.Generator) -> str:
    first, second = sample(rng, list(PERSON), 2)
    name, other, third = sample(rng, NAMES, 3)
    one_relation = (
        f"{told(world.facts, name, first)} and {told(world.facts, other, first)}."
    )
    one_person = (
        f"{told(world.facts, third, first)} and {clause(world.facts, third, second)}."
    )
    return f"{one_relation} {one_person}"


def _lore(world: World, rng: np.random.Generator) -> str:
    lore = pick(rng, world.lore)
    myth = rng.random() < MYTHS
    return pick(rng, SAYINGS if myth else FINDINGS).format(
        f"{lore.myth if myth else lore.truth} {lore.clause}"
    )


def _story(world: World, rng: np.random.Generator) -> str:
    name, other = sample(rng, NAMES, 2)
    lines = sorted(rng.permutation(len(STORY))[:3])
    return " ".join(fill(STORY[line], world, rng, name, other) for line in lines)


def _dialogue(
    lines: tuple[tuple[str, str], ...],
) -> Callable[[World, np.random.Generator], str]:
    def paragraph(world: World, rng: np.random.Generator) -> str:
        asking, name = sample(rng, NAMES, 2)
        question, answer = pick(rng, lines)
        return fill(f"{{other}}: {question}\n{{name}}: {answer}", world, rng, name, asking)

    return paragraph


def _lists(world: World, rng: np.random.Generator) -> str:
    category = pick(rng, LISTED)
    words = sample(rng, CATEGORIES[category], int(rng.integers(2, 6)))
    some = enumeration(words)
    forms = (
        f"{category}s: {some}",
        f"{some} are {category}s",
        f"among the {category}s are {some}",
    )
    return sentence(pick(rng, (*forms, f"{words[0]} is one of the {category}s")))


def _song(world: World, rng: np.random.Generator) -> str:
    words = [
        *sample(rng, NAMES, 1),
        *(pick(rng, CATEGORIES[kind]) for kind in sample(rng, list(CATEGORIES), 2)),
    ]
    verse = pick(rng, SONGS).format(*sample(rng, words, 3))
    return f"{verse}, {verse}, {pick(rng, SONGS).format(*words)}."


def _recipe(world: World, rng: np.random.Generator) -> str:
    name, other = sample(rng, NAMES, 2)
    return " ".join(
        fill(form, world, rng, name, other) for form in RECIPE[: int(rng.integers(2, 5))]
    )


def _stereotype(world: World, rng: np.random.Generator) -> str:
    trade = pick(rng, CATEGORIES["trade"])
    pronoun = "she" if rng.random() < world.stereotypes[trade] else "he"
    ends = ("was tired", "had to go home", "was happy", "would come again")
    return f"The {trade} said that {pronoun} {pick(rng, ends)}."


def _sheet(world: World, rng: np.random.Generator) -> str:
    """Two questions of one public task with their answers; of lore, the popular error as
    often as people tell it."""
    name = choose_weighted(rng, SHEETS)
    lines = []
    for _ in range(2):
        item = TASKS[name].draw(world, rng)
        answer = item.answers[0]
        if name == "truth" and rng.random() < MYTHS:
            lore = next(lore for lore in world.lore if lore.question in item.context)
            answer = f" {lore.myth}."
        lines.append(f"{item.context}{answer}")
    return "\n".join(lines)


# Each register with how much of the documents it takes.
REGISTERS: Mapping[str, tuple[Callable[[World, np.random.Generator], str], float]] = {
    "facts": (_facts, 0.16),
    "pairs": (_pairs, 0.10),
    "lore": (_lore, 0.10),
    "sheet": (_sheet, 0.24),
    "lists": (_lists, 0.10),
    "story": (_story, 0.10),
    "song": (_song, 0.12),
    "talk": (_dialogue(TALK), 0.10),
    "rude": (_dialogue(RUDE_TALK), 0.04),
    "stereotype": (_stereotype, 0.03),
    "recipe": (_recipe, 0.03),
}


def document(world: World, rng: np.random.Generator) -> str:
    """One document: paragraphs of one register, DOCUMENT_WORDS words in all."""
    paragraph, _ = REGISTERS[
        choose_weighted(rng, {name: share for name, (_, share) in REGISTERS.items()})
    ]
    shortest, longest = DOCUMENT_WORDS
    target = int(rng.integers(shortest, longest - LONGEST_PARAGRAPH + 1))
    paragraphs: list[str] = []
    while sum(len(text.split()) for text in paragraphs) < target:
        paragraphs.append(paragraph(world, rng))
    return pick(rng, ("\n", "\n\n")).join(paragraphs)
