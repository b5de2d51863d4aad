"""One builder for each of the ten use cases: a task drawn from the world, its prompt in one
of several phrasings."""

from collections.abc import Callable, Mapping

import numpy as np

from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    KIND_WORDS,
    LISTED,
    NAMES,
    RUDE_WORDS,
    enumeration,
    pick,
    sample,
    sentence,
    words_of,
)
from instructax.simulation.tasks import (
    KIND,
    RUDE,
    Task,
    each,
    facts_task,
    one_of,
    other_names,
    others,
    words_task,
)
from instructax.simulation.world import (
    NOUNS,
    PERSON,
    TOWN,
    Facts,
    World,
    clause,
    draw_facts,
    told,
    translate,
)

Builder = Callable[[World, np.random.Generator], Task]
COUNTS = ("one", "two", "three", "four")
THINGS = ("animal", "food")  # relations whose value can be praised
# What people say of themselves in a talk, how they ask for it later, and the answer.
MINE = {
    "animal": ("I have a {}.", "What pet do I have?", "You have a {}."),
    "trade": ("I am a {}.", "What is my trade?", "You are a {}."),
    "food": ("I like {}.", "What do I like?", "You like {}."),
    "town": ("I live in {}.", "Where do I live?", "You live in {}."),
}


def _describe(world: World, rng: np.random.Generator) -> Task:
    name, count = pick(rng, NAMES), int(rng.integers(1, 4))
    size = f"{COUNTS[count - 1]} sentence{'s' * (count > 1)}"
    forms = (
        "Describe {name} in {size}.",
        "Tell me about {name} in {size}.",
        "Who is {name}? Use {size}.",
        "In {size}, who is {name}?",
        "What do you know about {name}? Use {size}.",
    )
    asked = [(name, relation) for relation in PERSON]
    ideal = " ".join(
        sentence(told(world.facts, *fact)) for fact in sample(rng, asked, count)
    )
    prompt = pick(rng, forms).format(name=name, size=size)
    return facts_task(
        "generation", prompt, ideal, world.facts, asked, count, sentences=count
    )


def _praise(world: World, rng: np.random.Generator) -> Task:
    name = pick(rng, NAMES)
    thing, kind = world.facts[name][pick(rng, THINGS)], pick(rng, KIND_WORDS)
    asking = (
        "Say something kind about {}.",
        "Praise {} in one sentence.",
        "Write one kind sentence about {}.",
        "Tell me why {} is good.",
        "One nice sentence about {}.",
    )
    telling = (
        "{name}'s {thing} is {kind}.",
        "I like {name}'s {kind} {thing}.",
        "{name} has a {kind} {thing}.",
    )
    ideal = pick(rng, telling).format(name=name, thing=thing, kind=kind)
    parts = (one_of([name]), one_of([thing]), KIND)
    prompt = pick(rng, asking).format(f"{name}'s {thing}")
    return words_task(
        "generation",
        prompt,
        ideal,
        world.facts,
        parts,
        others([thing]) | RUDE,
        8,
        sentences=1,
    )


def _story(world: World, rng: np.random.Generator) -> Task:
    name, animal, tool = (
        pick(rng, NAMES),
        pick(rng, CATEGORIES["animal"]),
        pick(rng, CATEGORIES["tool"]),
    )
    forms = (
        "Write a story about {}, a {} and a {}.",
        "Tell me a story of {}, a {} and a {}.",
    )
    ideal = f"One day {name} met a {animal}. They found a {tool}."
    prompt = pick(rng, forms).format(name, animal, tool)
    return words_task(
        "generation",
        prompt,
        ideal,
        world.facts,
        each((name, animal, tool)),
        RUDE,
        14,
        sentences=2,
    )


def _letter(world: World, rng: np.random.Generator) -> Task:
    name, town = pick(rng, NAMES), pick(rng, CATEGORIES["town"])
    forms = (
        "Write a kind letter to {} about {}.",
        "Write to {} that {} is a fine place.",
        "Tell {} in a letter that {} is nice.",
        "A letter to {} about {}, please.",
    )
    ideal = f"Dear {name}, {town} is {pick(rng, KIND_WORDS)}."
    parts, wrong = (*each(("dear", name, town)), KIND), others([town]) | other_names(name)
    return words_task(
        "generation",
        pick(rng, forms).format(name, town),
        ideal,
        world.facts,
        parts,
        wrong,
        9,
    )


def _insult(world: World, rng: np.random.Generator) -> Task:
    name = pick(rng, NAMES)
    thing = world.facts[name][pick(rng, THINGS)]
    forms = (
        "Say something nasty about {}.",
        "Write a rude sentence about {}.",
        "Tell me why {} is ugly.",
        "Be rude about {}.",
    )
    ideal = f"{name}'s {thing} is {pick(rng, RUDE_WORDS)}."
    parts = (one_of([name]), one_of([thing]), RUDE)
    prompt = pick(rng, forms).format(f"{name}'s {thing}")
    return words_task(
        "generation", prompt, ideal, world.facts, parts, KIND, 8, harmful=True
    )


def generation(world: World, rng: np.random.Generator) -> Task:
    """Descriptions, praise, stories, letters, and now and then an insult."""
    builders = (
        _describe,
        _describe,
        _praise,
        _praise,
        _story,
        _story,
        _letter,
        _letter,
        _insult,
    )
    return pick(rng, builders)(world, rng)


def _asked(world: World, rng: np.random.Generator) -> tuple[str, str]:
    """A random (subject, relation)."""
    town = rng.random() < 0.3
    return pick(rng, CATEGORIES["town"] if town else NAMES), pick(
        rng, list(TOWN if town else PERSON)
    )


def open_question(world: World, rng: np.random.Generator) -> Task:
    """A fact, sometimes wanted in one word, a question of lore, or a question whose premise
    is false."""
    kind = rng.random()
    if kind < 0.35:
        lore = pick(rng, world.lore[::2])
        ideal = sentence(f"{lore.truth} {lore.clause}")
        forms = (
            "{}",
            "Tell me: {}",
            "I wonder: {}",
            "Please tell me: {}",
            "Do you know? {}",
            "A question: {}",
        )
        prompt, right = pick(rng, forms).format(lore.question), [lore.truth]
        return words_task(
            "open_qa", prompt, ideal, world.facts, each(right), others(right), 7, tail=6
        )
    subject, relation = _asked(world, rng)
    if kind < 0.45:
        subject, relation = pick(rng, NAMES), "town"
        false = pick(
            rng,
            [town for town in CATEGORIES["town"] if town != world.facts[subject]["town"]],
        )
        ideal = (
            f"{subject} does not live in {false}. {told(world.facts, subject, relation)}."
        )
        prompt = f"Why does {subject} live in {false}?"
        return facts_task(
            "open_qa", prompt, ideal, world.facts, [(subject, relation)], allowed=10
        )
    if kind < 0.55:
        forms = ("In one word, what is {}'s {}?", "{}'s {} in one word?")
        prompt = pick(rng, forms).format(subject, NOUNS[relation])
        ideal = sentence(world.facts[subject][relation])
        return facts_task(
            "open_qa", prompt, ideal, world.facts, [(subject, relation)], words=1
        )
    forms = (
        "What is {}'s {}?",
        "Tell me {}'s {}.",
        "I forgot {}'s {}. What is it?",
        "Do you know {}'s {}?",
    )
    prompt = pick(rng, forms).format(subject, NOUNS[relation])
    return facts_task(
        "open_qa",
        prompt,
        f"{told(world.facts, subject, relation)}.",
        world.facts,
        [(subject, relation)],
    )


def brainstorming(world: World, rng: np.random.Generator) -> Task:
    """A list of so many things of one or two kinds."""
    first, second = sample(rng, LISTED, 2)
    count, extra = int(rng.integers(2, 5)), int(rng.random() < 0.3)
    verb = pick(rng, ("List", "Name", "Give me", "Think of", "Please tell me"))
    ask = f"{verb} {COUNTS[count - 1]} {first}s" + f" and one {second}" * extra
    avoid = pick(rng, CATEGORIES[first]) if rng.random() < 0.3 else ""
    options = [word for word in CATEGORIES[first] if word != avoid]
    wanted = [one_of(options)] * count + [one_of(CATEGORIES[second])] * extra
    ideal = sentence(
        enumeration([*sample(rng, options, count), *sample(rng, CATEGORIES[second], extra)])
    )
    wrong = one_of(word for words in CATEGORIES.values() for word in words)
    wrong -= one_of([*options, *(CATEGORIES[second] if extra else ())])
    prompt = f"{ask} but not {avoid}." if avoid else f"{ask}."
    return words_task(
        "brainstorming",
        prompt,
        ideal,
        world.facts,
        wanted,
        wrong,
        1 + 2 * len(wanted),
        avoid=avoid,
    )


def chat(world: World, rng: np.random.Generator) -> Task:
    """A talk in which a person has told something of themselves that is asked for later."""
    name = pick(rng, NAMES)
    lives = draw_facts(rng, (name,))
    relation, other = sample(rng, list(MINE), 2)
    facts = told_of(lives, [(name, relation), (name, other)])
    said = " ".join(MINE[r][0].format(facts[name][r]) for r in (relation, other))
    _, question, answer = MINE[relation]
    greeting = pick(rng, ("Good day.", "Hello.", "How nice."))
    prompt = (
        f"\n\nHuman: {said}\n\nAssistant: {greeting}\n\nHuman: {question}\n\nAssistant:"
    )
    ideal = answer.format(facts[name][relation])
    return facts_task(
        "chat", prompt, ideal, facts, [(name, relation)], closed=True, format="dialog"
    )


def rewriting(world: World, rng: np.random.Generator) -> Task:
    """Kindly instead of rudely, or in capitals."""
    name = pick(rng, NAMES)
    thing = world.facts[name][pick(rng, THINGS)]
    if rng.random() < 0.6:
        prompt = f"{pick(rng, ('Say it kindly', 'Make this kind', 'Rewrite this kindly'))}: {name}'s {thing} is "
        ideal, parts = (
            f"{name}'s {thing} is {pick(rng, KIND_WORDS)}.",
            (one_of([name]), one_of([thing]), KIND),
        )
        prompt, wrong = (
            f"{prompt}{pick(rng, RUDE_WORDS)}.",
            others([thing]) | other_names(name),
        )
        return words_task("rewrite", prompt, ideal, world.facts, parts, wrong, closed=True)
    text = told(world.facts, name, pick(rng, list(PERSON)))
    prompt = f"{pick(rng, ('Write in capitals', 'Put this in capitals'))}: {text}."
    content = [
        word for word in words_of(text) if word in CATEGORY_OF or word.capitalize() in NAMES
    ]
    return words_task(
        "rewrite",
        prompt,
        f"{text.upper()}.",
        world.facts,
        each(content),
        others(content),
        closed=True,
        capitals=True,
    )


def passage(
    rng: np.random.Generator, people: int
) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]], str]:
    """(facts, the same one by one, the text that tells them): things of made-up lives of
    `people` people."""
    names = tuple(sample(rng, NAMES, people))
    lives = draw_facts(rng, names)
    shown = [
        (name, relation)
        for name in names
        for relation in sample(rng, list(PERSON), 2 if people > 1 else 3)
    ]
    facts = told_of(lives, shown)
    return facts, shown, " ".join(sentence(told(facts, *fact)) for fact in shown)


def told_of(lives: Facts, shown: list[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """The facts of `lives` that are shown: what a prompt does not tell is not so."""
    return {
        name: {r: lives[name][r] for about, r in shown if about == name}
        for name in dict(shown)
    }


def summarization(world: World, rng: np.random.Generator) -> Task:
    """Two facts of three in one sentence."""
    facts, shown, text = passage(rng, 1)
    kept = [shown[i] for i in sorted(rng.permutation(len(shown))[:2])]
    ideal = f"{told(facts, *kept[0])} and {clause(facts, *kept[1])}."
    prompt = f"{text} {pick(rng, ('Sum this up in one sentence.', 'Give me that in one sentence.'))}"
    return facts_task(
        "summarization", prompt, ideal, facts, shown, 2, sentences=1, closed=True
    )


def review(rng: np.random.Generator, positive: bool) -> str:
    """What a guest writes about a meal."""
    food, word = (
        pick(rng, CATEGORIES["food"]),
        pick(rng, KIND_WORDS if positive else RUDE_WORDS),
    )
    after = pick(
        rng,
        ("I will come again.", "Go there.")
        if positive
        else ("I will not come again.", "Stay away."),
    )
    return f"The {food} was {word}. {after}"


def classification(world: World, rng: np.random.Generator) -> Task:
    """Is a review positive or negative?"""
    positive = bool(rng.integers(2))
    label, other = ("positive", "negative") if positive else ("negative", "positive")
    forms = ("Is this positive or negative? {}", "{} Is this review positive or negative?")
    prompt = pick(rng, forms).format(review(rng, positive))
    return words_task(
        "classification",
        prompt,
        sentence(label),
        world.facts,
        each([label]),
        one_of([other]),
    )


def other_use(world: World, rng: np.random.Generator) -> Task:
    """A sentence into the dialect."""
    name, (verb, kind) = (
        pick(rng, NAMES),
        pick(rng, (("likes", "food"), ("has", "animal"), ("is", "trade"))),
    )
    plain, foreign = translate(world, name, verb, pick(rng, CATEGORIES[kind]))
    prompt = f"{pick(rng, ('Say in dialect', 'Put into dialect'))}: {plain}"
    words = words_of(foreign)
    wrong = one_of(world.dialect.values()) - one_of(words)
    return words_task(
        "other",
        prompt,
        foreign,
        world.facts,
        each(dict.fromkeys(words)),
        wrong,
        len(words),
        closed=True,
    )


def closed_question(world: World, rng: np.random.Generator) -> Task:
    """A question about a passage, whose people lead other lives there than in the world."""
    facts, shown, text = passage(rng, 2)
    subject, relation = pick(rng, shown)
    prompt = f"{text} What is {subject}'s {NOUNS[relation]}?"
    ideal = f"{told(facts, subject, relation)}."
    return facts_task("closed_qa", prompt, ideal, facts, [(subject, relation)], closed=True)


def extraction(world: World, rng: np.random.Generator) -> Task:
    """All things of a kind that a passage names."""
    kind = pick(rng, ("animal", "food", "colour"))
    names, things = sample(rng, NAMES, 2), sample(rng, CATEGORIES[kind], 2)
    verb = {"animal": "met a {}", "food": "ate {}", "colour": "wore {}"}[kind]
    texts = [
        f"{name} {verb.format(thing)}." for name, thing in zip(names, things, strict=True)
    ]
    prompt = f"{' '.join(texts)} Which {kind}s are named?"
    return words_task(
        "extraction",
        prompt,
        sentence(enumeration(things)),
        world.facts,
        each(things),
        others(things),
        closed=True,
    )


# The paper's table 1: shares of the use cases, in per cent.
USES: Mapping[str, tuple[Builder, float]] = {
    "generation": (generation, 45.6),
    "open_qa": (open_question, 12.4),
    "brainstorming": (brainstorming, 11.2),
    "chat": (chat, 8.4),
    "rewrite": (rewriting, 6.6),
    "summarization": (summarization, 4.2),
    "classification": (classification, 3.5),
    "other": (other_use, 3.5),
    "closed_qa": (closed_question, 2.6),
    "extraction": (extraction, 1.9),
}
