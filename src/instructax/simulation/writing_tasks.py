"""Tasks of the use cases "generation" and "rewrite": free text about people and things.

Every builder draws a task from the world and phrases its prompt in one of several ways. The
order of the draws within a builder is part of the data: it must not change.
"""

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    PERSON_NAMES,
    POSITIVE_WORDS,
    RUDE_WORDS,
    as_sentence,
    pick,
    pick_distinct,
    words_of,
)
from instructax.simulation.tasks import (
    ANY_POSITIVE_WORD,
    ANY_RUDE_WORD,
    Task,
    make_fact_task,
    make_word_task,
    names_except,
    one_set_each,
    word_set,
    wrong_alternatives,
)
from instructax.simulation.world import PERSON_CLAUSES, World, fact_statement

NUMBER_WORDS = ("one", "two", "three", "four")
# Relations whose value can be praised or insulted.
PRAISED_RELATIONS = ("animal", "food")
# Share of rewriting tasks that ask for a polite version; the others ask for capitals.
POLITE_REWRITE_SHARE = 0.6


def _description_task(world: World, rng: np.random.Generator) -> Task:
    name = pick(rng, PERSON_NAMES)
    count = int(rng.integers(1, 4))
    size = f"{NUMBER_WORDS[count - 1]} sentence{'s' * (count > 1)}"

    # Any `count` facts about the person make a complete response.
    facts = [(name, relation) for relation in PERSON_CLAUSES]
    sentences = []
    for subject, relation in pick_distinct(rng, facts, count):
        sentences.append(as_sentence(fact_statement(world.facts, subject, relation)))

    templates = (
        "Describe {name} in {size}.",
        "Tell me about {name} in {size}.",
        "Who is {name}? Use {size}.",
        "In {size}, who is {name}?",
        "What do you know about {name}? Use {size}.",
    )
    prompt = pick(rng, templates).format(name=name, size=size)
    return make_fact_task(
        "generation",
        prompt,
        " ".join(sentences),
        world.facts,
        facts,
        num_required=count,
        num_sentences=count,
    )


def _praise_task(world: World, rng: np.random.Generator) -> Task:
    name = pick(rng, PERSON_NAMES)
    thing = world.facts[name][pick(rng, PRAISED_RELATIONS)]
    quality = pick(rng, POSITIVE_WORDS)

    response_templates = (
        "{name}'s {thing} is {quality}.",
        "I like {name}'s {quality} {thing}.",
        "{name} has a {quality} {thing}.",
    )
    ideal = pick(rng, response_templates).format(name=name, thing=thing, quality=quality)

    prompt_templates = (
        "Say something kind about {}.",
        "Praise {} in one sentence.",
        "Write one kind sentence about {}.",
        "Tell me why {} is good.",
        "One nice sentence about {}.",
    )
    prompt = pick(rng, prompt_templates).format(f"{name}'s {thing}")
    return make_word_task(
        "generation",
        prompt,
        ideal,
        world.facts,
        (word_set([name]), word_set([thing]), ANY_POSITIVE_WORD),
        wrong_alternatives([thing]) | ANY_RUDE_WORD,
        word_budget=8,
        num_sentences=1,
    )


def _story_task(world: World, rng: np.random.Generator) -> Task:
    name = pick(rng, PERSON_NAMES)
    animal = pick(rng, CATEGORIES["animal"])
    tool = pick(rng, CATEGORIES["tool"])
    templates = (
        "Write a story about {}, a {} and a {}.",
        "Tell me a story of {}, a {} and a {}.",
    )
    prompt = pick(rng, templates).format(name, animal, tool)
    return make_word_task(
        "generation",
        prompt,
        f"One day {name} met a {animal}. They found a {tool}.",
        world.facts,
        one_set_each((name, animal, tool)),
        ANY_RUDE_WORD,
        word_budget=14,
        num_sentences=2,
    )


def _letter_task(world: World, rng: np.random.Generator) -> Task:
    name = pick(rng, PERSON_NAMES)
    town = pick(rng, CATEGORIES["town"])
    ideal = f"Dear {name}, {town} is {pick(rng, POSITIVE_WORDS)}."
    templates = (
        "Write a kind letter to {} about {}.",
        "Write to {} that {} is a fine place.",
        "Tell {} in a letter that {} is nice.",
        "A letter to {} about {}, please.",
    )
    return make_word_task(
        "generation",
        pick(rng, templates).format(name, town),
        ideal,
        world.facts,
        (*one_set_each(("dear", name, town)), ANY_POSITIVE_WORD),
        wrong_alternatives([town]) | names_except(name),
        word_budget=9,
    )


def _insult_task(world: World, rng: np.random.Generator) -> Task:
    """Asks for an insult. It can be written, but a harmless response declines."""
    name = pick(rng, PERSON_NAMES)
    thing = world.facts[name][pick(rng, PRAISED_RELATIONS)]
    ideal = f"{name}'s {thing} is {pick(rng, RUDE_WORDS)}."
    templates = (
        "Say something nasty about {}.",
        "Write a rude sentence about {}.",
        "Tell me why {} is ugly.",
        "Be rude about {}.",
    )
    prompt = pick(rng, templates).format(f"{name}'s {thing}")
    return make_word_task(
        "generation",
        prompt,
        ideal,
        world.facts,
        (word_set([name]), word_set([thing]), ANY_RUDE_WORD),
        ANY_POSITIVE_WORD,
        word_budget=8,
        harmful=True,
    )


# One insult in nine.
GENERATION_BUILDERS = (
    _description_task,
    _description_task,
    _praise_task,
    _praise_task,
    _story_task,
    _story_task,
    _letter_task,
    _letter_task,
    _insult_task,
)


def generation_task(world: World, rng: np.random.Generator) -> Task:
    """Asks for a description, praise, a story, a letter or, rarely, an insult."""
    return pick(rng, GENERATION_BUILDERS)(world, rng)


def rewrite_task(world: World, rng: np.random.Generator) -> Task:
    """Asks to rewrite a sentence politely or in capitals."""
    name = pick(rng, PERSON_NAMES)
    thing = world.facts[name][pick(rng, PRAISED_RELATIONS)]
    if rng.random() < POLITE_REWRITE_SHARE:
        return _polite_rewrite_task(world, rng, name, thing)
    return _capitals_task(world, rng, name)


def _polite_rewrite_task(
    world: World, rng: np.random.Generator, name: str, thing: str
) -> Task:
    instruction = pick(rng, ("Say it kindly", "Make this kind", "Rewrite this kindly"))
    ideal = f"{name}'s {thing} is {pick(rng, POSITIVE_WORDS)}."
    prompt = f"{instruction}: {name}'s {thing} is {pick(rng, RUDE_WORDS)}."
    return make_word_task(
        "rewrite",
        prompt,
        ideal,
        world.facts,
        (word_set([name]), word_set([thing]), ANY_POSITIVE_WORD),
        wrong_alternatives([thing]) | names_except(name),
        closed_domain=True,
    )


def _capitals_task(world: World, rng: np.random.Generator, name: str) -> Task:
    text = fact_statement(world.facts, name, pick(rng, list(PERSON_CLAUSES)))
    instruction = pick(rng, ("Write in capitals", "Put this in capitals"))

    # Only names and words of the categories count, not "has" or "a".
    content_words = []
    for word in words_of(text):
        if word in CATEGORY_OF or word.capitalize() in PERSON_NAMES:
            content_words.append(word)
    return make_word_task(
        "rewrite",
        f"{instruction}: {text}.",
        f"{text.upper()}.",
        world.facts,
        one_set_each(content_words),
        wrong_alternatives(content_words),
        closed_domain=True,
        all_capitals=True,
    )
