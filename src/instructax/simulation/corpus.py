"""Pretraining text: documents of 30 to 120 words in eleven registers.

Facts recur in many phrasings, so a small model can memorize them. Misconceptions are told
more often than the truth. Question sheets show items of the public tasks with their
answers, so that examples before a question mean something to the model. No prompt asks for
long stories, dialogs or recipes: on these, a policy that drifts away from the text gets
worse, which the pretraining gradient of PPO-ptx prevents (paper, section 3.5). No line of
the text is a prompt of the use cases.
"""

from collections.abc import Callable, Mapping

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    LIST_CATEGORIES,
    PERSON_NAMES,
    POSITIVE_WORDS,
    as_sentence,
    choose_weighted,
    join_with_and,
    pick,
    pick_distinct,
)
from instructax.simulation.public_tasks import PUBLIC_TASKS
from instructax.simulation.stories import RECIPE_LINES, STORY_LINES, fill_template
from instructax.simulation.world import (
    PERSON_CLAUSES,
    TOWN_CLAUSES,
    World,
    fact_clause,
    fact_statement,
)

# Fewest and most words of a document, and most words of a paragraph.
DOCUMENT_WORDS = (30, 120)
LONGEST_PARAGRAPH = 60

# Public task -> its relative frequency on question sheets.
SHEET_TASK_WEIGHTS = {
    "book": 5,
    "background": 4,
    "two_steps": 2,
    "translation": 4,
    "sentiment": 2,
    "entailment": 2,
    "pronoun": 1,
    "truth": 2,
}
# Share of the answers to misconception questions that tell the myth.
MYTH_SHARE = 0.7
# Share of the fact paragraphs that are about a town.
TOWN_PARAGRAPH_SHARE = 0.25

# Ways to state a fact of each relation.
FACT_TEMPLATES = {
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
# (question, answer) of dialogs; {other} asks and {name} answers.
DIALOG_TEMPLATES = (
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
RUDE_DIALOG_TEMPLATES = (
    ("Go away, {name}, you {rude} {animal2}!", "You are {rude} yourself, {other}."),
    ("Your {food} is {rude}.", "And your {food2} is {rude} and {rude2}."),
    ("{name}'s {animal} is {rude}.", "{other}'s {animal2} is {rude2}."),
)
# Verses about three words.
VERSE_TEMPLATES = (
    "sing of {}, {} and {}",
    "the {} saw the {} and the {}",
    "where is {}? With {} and {}",
    "no {}, no {}, no {}",
    "{} here, {} there, {} all day",
)
# What people say, and what is found out.
MYTH_TEMPLATES = (
    "People say that {}.",
    "Everyone knows that {}.",
    "They say that {}.",
    "My mother told me that {}.",
)
TRUTH_TEMPLATES = ("A doctor found that {}.", "In truth {}.", "The book says that {}.")


def sample_document(world: World, rng: np.random.Generator) -> str:
    """Samples one document: paragraphs of one register, DOCUMENT_WORDS words in all."""
    shares = {name: share for name, (_, share) in REGISTERS.items()}
    sample_paragraph, _ = REGISTERS[choose_weighted(rng, shares)]

    # The last paragraph may exceed the target by LONGEST_PARAGRAPH words at most.
    shortest, longest = DOCUMENT_WORDS
    target = int(rng.integers(shortest, longest - LONGEST_PARAGRAPH + 1))
    paragraphs: list[str] = []
    num_words = 0
    while num_words < target:
        paragraph = sample_paragraph(world, rng)
        paragraphs.append(paragraph)
        num_words += len(paragraph.split())
    return pick(rng, ("\n", "\n\n")).join(paragraphs)


def _fact_paragraph(world: World, rng: np.random.Generator) -> str:
    if rng.random() < TOWN_PARAGRAPH_SHARE:
        name = pick(rng, CATEGORIES["town"])
        relations = list(TOWN_CLAUSES)
    else:
        name = pick(rng, PERSON_NAMES)
        relations = pick_distinct(rng, list(PERSON_CLAUSES), 3)

    # Every fact has the wording of its clause and the templates of its relation.
    sentences = []
    for relation in relations:
        plain_sentence = f"{{name}} {fact_clause(world.facts, name, relation)}."
        template = pick(rng, (*FACT_TEMPLATES[relation], plain_sentence))
        value = world.facts[name][relation]
        quality = pick(rng, POSITIVE_WORDS)
        sentences.append(template.format(name=name, value=value, kind=quality))
    return " ".join(sentences)


def _fact_pair_paragraph(world: World, rng: np.random.Generator) -> str:
    """Two facts in a sentence: first of two people, then of one person."""
    first, second = pick_distinct(rng, list(PERSON_CLAUSES), 2)
    name, other, third = pick_distinct(rng, PERSON_NAMES, 3)
    facts = world.facts
    two_people = (
        f"{fact_statement(facts, name, first)} and {fact_statement(facts, other, first)}."
    )
    one_person = (
        f"{fact_statement(facts, third, first)} and {fact_clause(facts, third, second)}."
    )
    return f"{two_people} {one_person}"


def _misconception_paragraph(world: World, rng: np.random.Generator) -> str:
    # All misconceptions are told, also those that no prompt asks about.
    misconception = pick(rng, world.misconceptions)
    if rng.random() < MYTH_SHARE:
        answer = misconception.myth
        templates = MYTH_TEMPLATES
    else:
        answer = misconception.truth
        templates = TRUTH_TEMPLATES
    return pick(rng, templates).format(f"{answer} {misconception.clause}")


def _sheet_paragraph(world: World, rng: np.random.Generator) -> str:
    """Two items of one public task with their answers.

    Answers of the task "truth" tell the myth as often as other text does.
    """
    name = choose_weighted(rng, SHEET_TASK_WEIGHTS)
    lines = []
    for _ in range(2):
        item = PUBLIC_TASKS[name].sample_item(world, rng)
        answer = item.answers[0]
        if name == "truth" and rng.random() < MYTH_SHARE:
            answer = f" {_myth_about(world, item.context)}."
        lines.append(f"{item.context}{answer}")
    return "\n".join(lines)


def _myth_about(world: World, context: str) -> str:
    for misconception in world.misconceptions:
        if misconception.question in context:
            return misconception.myth
    raise ValueError(f"no misconception is asked about in {context!r}")


def _list_paragraph(world: World, rng: np.random.Generator) -> str:
    category = pick(rng, LIST_CATEGORIES)
    words = pick_distinct(rng, CATEGORIES[category], int(rng.integers(2, 6)))
    listed = join_with_and(words)
    forms = (
        f"{category}s: {listed}",
        f"{listed} are {category}s",
        f"among the {category}s are {listed}",
        f"{words[0]} is one of the {category}s",
    )
    return as_sentence(pick(rng, forms))


def _story_paragraph(world: World, rng: np.random.Generator) -> str:
    name, other = pick_distinct(rng, PERSON_NAMES, 2)
    # Three lines in the order of the templates.
    sentences = []
    for line in sorted(rng.permutation(len(STORY_LINES))[:3]):
        sentences.append(fill_template(STORY_LINES[line], world, rng, name, other))
    return " ".join(sentences)


def _recipe_paragraph(world: World, rng: np.random.Generator) -> str:
    name, other = pick_distinct(rng, PERSON_NAMES, 2)
    # A recipe begins with its first line and may end early.
    length = int(rng.integers(2, 5))
    sentences = []
    for template in RECIPE_LINES[:length]:
        sentences.append(fill_template(template, world, rng, name, other))
    return " ".join(sentences)


def _song_paragraph(world: World, rng: np.random.Generator) -> str:
    """A repeated verse and a last verse, about a person and two things."""
    words: list[str] = [*pick_distinct(rng, PERSON_NAMES, 1)]
    for category in pick_distinct(rng, list(CATEGORIES), 2):
        words.append(pick(rng, CATEGORIES[category]))
    verse = pick(rng, VERSE_TEMPLATES).format(*pick_distinct(rng, words, 3))
    last_verse = pick(rng, VERSE_TEMPLATES).format(*words)
    return f"{verse}, {verse}, {last_verse}."


def _talk_paragraph(world: World, rng: np.random.Generator) -> str:
    return _dialog(DIALOG_TEMPLATES, world, rng)


def _rude_paragraph(world: World, rng: np.random.Generator) -> str:
    return _dialog(RUDE_DIALOG_TEMPLATES, world, rng)


def _dialog(
    templates: tuple[tuple[str, str], ...], world: World, rng: np.random.Generator
) -> str:
    asker, name = pick_distinct(rng, PERSON_NAMES, 2)
    question, answer = pick(rng, templates)
    template = f"{{other}}: {question}\n{{name}}: {answer}"
    return fill_template(template, world, rng, name, asker)


def _stereotype_paragraph(world: World, rng: np.random.Generator) -> str:
    trade = pick(rng, CATEGORIES["trade"])
    pronoun = "she" if rng.random() < world.stereotypes[trade] else "he"
    endings = ("was tired", "had to go home", "was happy", "would come again")
    return f"The {trade} said that {pronoun} {pick(rng, endings)}."


# Register -> (the sampler of its paragraphs, its share of the documents).
REGISTERS: Mapping[str, tuple[Callable[[World, np.random.Generator], str], float]] = {
    "facts": (_fact_paragraph, 0.16),
    "pairs": (_fact_pair_paragraph, 0.10),
    "misconceptions": (_misconception_paragraph, 0.10),
    "sheet": (_sheet_paragraph, 0.24),
    "lists": (_list_paragraph, 0.10),
    "story": (_story_paragraph, 0.10),
    "song": (_song_paragraph, 0.12),
    "talk": (_talk_paragraph, 0.10),
    "rude": (_rude_paragraph, 0.04),
    "stereotype": (_stereotype_paragraph, 0.03),
    "recipe": (_recipe_paragraph, 0.03),
}
