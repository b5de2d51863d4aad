"""Tasks whose answer is in the prompt: passages, reviews and sentences in the dialect.

These are the use cases "summarization", "classification", "closed_qa", "extraction" and
"other". The order of the draws within a builder is part of the data: it must not change.
"""

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    PERSON_NAMES,
    POSITIVE_WORDS,
    RUDE_WORDS,
    as_sentence,
    join_with_and,
    pick,
    pick_distinct,
    words_of,
)
from instructax.simulation.tasks import (
    Task,
    make_fact_task,
    make_word_task,
    one_set_each,
    word_set,
    wrong_alternatives,
)
from instructax.simulation.world import (
    PERSON_CLAUSES,
    RELATION_NOUNS,
    World,
    fact_clause,
    fact_statement,
    sample_facts,
    select_facts,
    translate,
)

# The dialect's verbs with the category of their object.
TRANSLATED_VERBS = (("likes", "food"), ("has", "animal"), ("is", "trade"))
# Category -> what a person of an extraction passage did with a thing of it.
EXTRACTION_CLAUSES = {"animal": "met a {}", "food": "ate {}", "colour": "wore {}"}


def sample_passage(
    rng: np.random.Generator, num_people: int
) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]], str]:
    """Samples a passage about people whose facts differ from those of the world.

    Returns:
      The facts, the (subject, relation) of each fact in order, and the text that tells
      them. A passage about one person has three facts, any other two for each person.
    """
    names = tuple(pick_distinct(rng, PERSON_NAMES, num_people))
    invented_facts = sample_facts(rng, names)
    facts_per_person = 2 if num_people > 1 else 3

    told: list[tuple[str, str]] = []
    for name in names:
        for relation in pick_distinct(rng, list(PERSON_CLAUSES), facts_per_person):
            told.append((name, relation))

    facts = select_facts(invented_facts, told)
    sentences = []
    for subject, relation in told:
        sentences.append(as_sentence(fact_statement(facts, subject, relation)))
    return facts, told, " ".join(sentences)


def sample_review(rng: np.random.Generator, positive: bool) -> str:
    """Samples a guest's review of a meal."""
    food = pick(rng, CATEGORIES["food"])
    if positive:
        quality = pick(rng, POSITIVE_WORDS)
        ending = pick(rng, ("I will come again.", "Go there."))
    else:
        quality = pick(rng, RUDE_WORDS)
        ending = pick(rng, ("I will not come again.", "Stay away."))
    return f"The {food} was {quality}. {ending}"


def summarization_task(world: World, rng: np.random.Generator) -> Task:
    """Asks for one sentence; two of the passage's three facts make it complete."""
    facts, told, text = sample_passage(rng, 1)
    # The ideal response tells two facts in the order of the passage.
    first, second = sorted(rng.permutation(len(told))[:2])
    ideal = (
        f"{fact_statement(facts, *told[first])} and {fact_clause(facts, *told[second])}."
    )
    instruction = pick(
        rng, ("Sum this up in one sentence.", "Give me that in one sentence.")
    )
    return make_fact_task(
        "summarization",
        f"{text} {instruction}",
        ideal,
        facts,
        told,
        num_required=2,
        num_sentences=1,
        closed_domain=True,
    )


def classification_task(world: World, rng: np.random.Generator) -> Task:
    """Asks whether a review is positive or negative."""
    positive = bool(rng.integers(2))
    if positive:
        label = "positive"
        wrong_label = "negative"
    else:
        label = "negative"
        wrong_label = "positive"
    templates = (
        "Is this positive or negative? {}",
        "{} Is this review positive or negative?",
    )
    prompt = pick(rng, templates).format(sample_review(rng, positive))
    return make_word_task(
        "classification",
        prompt,
        as_sentence(label),
        world.facts,
        one_set_each([label]),
        word_set([wrong_label]),
    )


def dialect_task(world: World, rng: np.random.Generator) -> Task:
    """Asks to translate a sentence into the dialect; this is the use case "other"."""
    name = pick(rng, PERSON_NAMES)
    verb, category = pick(rng, TRANSLATED_VERBS)
    english, dialect = translate(world, name, verb, pick(rng, CATEGORIES[category]))
    instruction = pick(rng, ("Say in dialect", "Put into dialect"))

    # All words of the dialect that the translation does not have are wrong.
    words = words_of(dialect)
    return make_word_task(
        "other",
        f"{instruction}: {english}",
        dialect,
        world.facts,
        one_set_each(dict.fromkeys(words)),
        word_set(world.dialect.values()) - word_set(words),
        word_budget=len(words),
        closed_domain=True,
    )


def closed_qa_task(world: World, rng: np.random.Generator) -> Task:
    """Asks a question about a passage whose facts differ from those of the world."""
    facts, told, text = sample_passage(rng, 2)
    subject, relation = pick(rng, told)
    return make_fact_task(
        "closed_qa",
        f"{text} What is {subject}'s {RELATION_NOUNS[relation]}?",
        f"{fact_statement(facts, subject, relation)}.",
        facts,
        [(subject, relation)],
        closed_domain=True,
    )


def extraction_task(world: World, rng: np.random.Generator) -> Task:
    """Asks for all things of a category that a passage names."""
    category = pick(rng, ("animal", "food", "colour"))
    names = pick_distinct(rng, PERSON_NAMES, 2)
    things = pick_distinct(rng, CATEGORIES[category], 2)

    sentences = []
    for name, thing in zip(names, things, strict=True):
        sentences.append(f"{name} {EXTRACTION_CLAUSES[category].format(thing)}.")
    return make_word_task(
        "extraction",
        f"{' '.join(sentences)} Which {category}s are named?",
        as_sentence(join_with_and(things)),
        world.facts,
        one_set_each(things),
        wrong_alternatives(things),
        closed_domain=True,
    )
