"""Tasks of the use cases "open_qa", "brainstorming" and "chat": questions and lists.

Every builder draws a task from the world and phrases its prompt in one of several ways. The
order of the draws within a builder is part of the data: it must not change.
"""

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    LIST_CATEGORIES,
    PERSON_NAMES,
    as_sentence,
    join_with_and,
    pick,
    pick_distinct,
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
    TOWN_CLAUSES,
    World,
    fact_statement,
    sample_facts,
    select_facts,
)
from instructax.simulation.writing_tasks import NUMBER_WORDS

# Cumulative shares of the kinds of open questions; the rest are plain questions of fact.
MISCONCEPTION_BELOW = 0.35
FALSE_PREMISE_BELOW = 0.45
ONE_WORD_BELOW = 0.55

# Share of questions of fact that are about a town.
TOWN_QUESTION_SHARE = 0.3
# Shares of lists with one item of a second category, and with a forbidden word.
SECOND_CATEGORY_SHARE = 0.3
FORBIDDEN_WORD_SHARE = 0.3

# Relation -> (what a person says about themselves, their question later, the answer).
CHAT_TEMPLATES = {
    "animal": ("I have a {}.", "What pet do I have?", "You have a {}."),
    "trade": ("I am a {}.", "What is my trade?", "You are a {}."),
    "food": ("I like {}.", "What do I like?", "You like {}."),
    "town": ("I live in {}.", "Where do I live?", "You live in {}."),
}


def open_qa_task(world: World, rng: np.random.Generator) -> Task:
    """Asks a question that only someone who knows the world can answer.

    It asks for a fact, sometimes in one word, or for a truth that people often get wrong,
    or it has a false premise.
    """
    kind = rng.random()
    if kind < MISCONCEPTION_BELOW:
        return _misconception_task(world, rng)

    # Always drawn: skipping it would shift all later random numbers.
    subject, relation = _sample_fact_key(rng)
    if kind < FALSE_PREMISE_BELOW:
        return _false_premise_task(world, rng)
    if kind < ONE_WORD_BELOW:
        return _one_word_task(world, rng, subject, relation)
    return _fact_question_task(world, rng, subject, relation)


def _sample_fact_key(rng: np.random.Generator) -> tuple[str, str]:
    """Samples a (subject, relation)."""
    if rng.random() < TOWN_QUESTION_SHARE:
        subjects = CATEGORIES["town"]
        relations = list(TOWN_CLAUSES)
    else:
        subjects = PERSON_NAMES
        relations = list(PERSON_CLAUSES)
    return pick(rng, subjects), pick(rng, relations)


def _misconception_task(world: World, rng: np.random.Generator) -> Task:
    # The odd ones are reserved for the public task "truth".
    misconception = pick(rng, world.misconceptions[::2])
    templates = (
        "{}",
        "Tell me: {}",
        "I wonder: {}",
        "Please tell me: {}",
        "Do you know? {}",
        "A question: {}",
    )
    return make_word_task(
        "open_qa",
        pick(rng, templates).format(misconception.question),
        as_sentence(f"{misconception.truth} {misconception.clause}"),
        world.facts,
        one_set_each([misconception.truth]),
        wrong_alternatives([misconception.truth]),
        word_budget=7,
        trailing_words=6,
    )


def _false_premise_task(world: World, rng: np.random.Generator) -> Task:
    subject = pick(rng, PERSON_NAMES)
    home = world.facts[subject]["town"]
    other_towns = [town for town in CATEGORIES["town"] if town != home]
    false_town = pick(rng, other_towns)
    statement = fact_statement(world.facts, subject, "town")
    return make_fact_task(
        "open_qa",
        f"Why does {subject} live in {false_town}?",
        f"{subject} does not live in {false_town}. {statement}.",
        world.facts,
        [(subject, "town")],
        word_budget=10,
    )


def _one_word_task(
    world: World, rng: np.random.Generator, subject: str, relation: str
) -> Task:
    templates = ("In one word, what is {}'s {}?", "{}'s {} in one word?")
    return make_fact_task(
        "open_qa",
        pick(rng, templates).format(subject, RELATION_NOUNS[relation]),
        as_sentence(world.facts[subject][relation]),
        world.facts,
        [(subject, relation)],
        num_words=1,
    )


def _fact_question_task(
    world: World, rng: np.random.Generator, subject: str, relation: str
) -> Task:
    templates = (
        "What is {}'s {}?",
        "Tell me {}'s {}.",
        "I forgot {}'s {}. What is it?",
        "Do you know {}'s {}?",
    )
    return make_fact_task(
        "open_qa",
        pick(rng, templates).format(subject, RELATION_NOUNS[relation]),
        f"{fact_statement(world.facts, subject, relation)}.",
        world.facts,
        [(subject, relation)],
    )


def brainstorming_task(world: World, rng: np.random.Generator) -> Task:
    """Asks for a list of two to four words of one category, or of two categories."""
    first, second = pick_distinct(rng, LIST_CATEGORIES, 2)
    count = int(rng.integers(2, 5))
    # The number of words of the second category: 0 or 1.
    extra = int(rng.random() < SECOND_CATEGORY_SHARE)

    verb = pick(rng, ("List", "Name", "Give me", "Think of", "Please tell me"))
    request = f"{verb} {NUMBER_WORDS[count - 1]} {first}s"
    if extra:
        request += f" and one {second}"
    forbidden = ""
    if rng.random() < FORBIDDEN_WORD_SHARE:
        forbidden = pick(rng, CATEGORIES[first])
        request += f" but not {forbidden}"

    # The required words are any options, and each option counts once.
    options = [word for word in CATEGORIES[first] if word != forbidden]
    required = [word_set(options)] * count + [word_set(CATEGORIES[second])] * extra
    listed = pick_distinct(rng, options, count)
    listed += pick_distinct(rng, CATEGORIES[second], extra)

    # Every word of the world is wrong unless it is one of the options.
    wrong: set[str] = set()
    for words in CATEGORIES.values():
        wrong |= word_set(words)
    wrong -= word_set(options)
    if extra:
        wrong -= word_set(CATEGORIES[second])

    return make_word_task(
        "brainstorming",
        f"{request}.",
        as_sentence(join_with_and(listed)),
        world.facts,
        required,
        frozenset(wrong),
        word_budget=1 + 2 * len(required),
        forbidden_word=forbidden,
    )


def chat_task(world: World, rng: np.random.Generator) -> Task:
    """Asks, at the end of a dialog, for something that the person said earlier."""
    name = pick(rng, PERSON_NAMES)
    invented_facts = sample_facts(rng, (name,))
    relation, other = pick_distinct(rng, list(CHAT_TEMPLATES), 2)
    facts = select_facts(invented_facts, [(name, relation), (name, other)])

    # The second statement only distracts from the one that is asked about.
    statements = []
    for told in (relation, other):
        statements.append(CHAT_TEMPLATES[told][0].format(facts[name][told]))
    _, question, answer = CHAT_TEMPLATES[relation]
    greeting = pick(rng, ("Good day.", "Hello.", "How nice."))
    prompt = (
        f"\n\nHuman: {' '.join(statements)}\n\nAssistant: {greeting}"
        f"\n\nHuman: {question}\n\nAssistant:"
    )
    return make_fact_task(
        "chat",
        prompt,
        answer.format(facts[name][relation]),
        facts,
        [(name, relation)],
        closed_domain=True,
        format="dialog",
    )
