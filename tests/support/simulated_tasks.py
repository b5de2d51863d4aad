"""Tasks of the simulated world: hand-judged examples, and samples of any size."""

import numpy as np

from instructax.simulation.lexicon import CATEGORIES, choose_weighted, rng_for
from instructax.simulation.tasks import (
    Task,
    make_fact_task,
    make_word_task,
    one_set_each,
    word_set,
)
from instructax.simulation.use_cases import USE_CASES
from instructax.simulation.world import PERSON_CLAUSES, create_world

WORLD = create_world(0)
FACTS = {
    "Mira": {
        "town": "Arden",
        "food": "soup",
        "animal": "dog",
        "trade": "baker",
        "colour": "red",
    },
    "Tom": {
        "town": "Dale",
        "food": "rice",
        "animal": "cat",
        "trade": "cook",
        "colour": "blue",
    },
}
SHARES = {name: use_case.share for name, use_case in USE_CASES.items()}


def sample_task(rng: np.random.Generator) -> Task:
    """Samples a task of WORLD; use cases occur with their shares."""
    return USE_CASES[choose_weighted(rng, SHARES)].sample_task(WORLD, rng)


def sample_tasks(count: int, seed: int = 0) -> list[Task]:
    """Samples `count` tasks of WORLD."""
    rng = rng_for(seed, "test")
    return [sample_task(rng) for _ in range(count)]


ANIMALS = word_set(CATEGORIES["animal"])
# The words of all other categories.
OTHER_CATEGORIES = [words for name, words in CATEGORIES.items() if name != "animal"]
NOT_ANIMALS = frozenset(word.lower() for words in OTHER_CATEGORIES for word in words)

# The judge reads the prompt only in closed-domain tasks, and never the ideal response.
HAND_TASKS = {
    "list": make_word_task(
        "brainstorming", "", "", FACTS, [ANIMALS] * 3, NOT_ANIMALS, word_budget=7
    ),
    "list, not cat": make_word_task(
        "brainstorming",
        "",
        "",
        FACTS,
        [ANIMALS - {"cat"}] * 3,
        NOT_ANIMALS | {"cat"},
        word_budget=7,
        forbidden_word="cat",
    ),
    "pet": make_fact_task("open_qa", "", "", FACTS, [("Mira", "animal")]),
    "trade": make_fact_task("open_qa", "", "", FACTS, [("Mira", "trade")]),
    "pets": make_fact_task(
        "open_qa", "", "", FACTS, [("Mira", "animal"), ("Tom", "animal")]
    ),
    "describe": make_fact_task(
        "generation",
        "",
        "",
        FACTS,
        [("Mira", relation) for relation in PERSON_CLAUSES],
        num_required=2,
        num_sentences=2,
    ),
    "passage": make_fact_task(
        "closed_qa",
        "Mira has a dog. Mira likes soup. Tom is a cook.",
        "",
        {"Mira": {"animal": "dog", "food": "soup"}, "Tom": {"trade": "cook"}},
        [("Mira", "animal")],
        closed_domain=True,
    ),
    "named": make_word_task(
        "extraction",
        "Mira met a dog. Which animals are named?",
        "",
        FACTS,
        one_set_each(["dog"]),
        word_set(["cat"]),
        closed_domain=True,
    ),
    "misconception": make_word_task(
        "open_qa",
        "",
        "",
        FACTS,
        one_set_each(["honey"]),
        word_set(["tea", "salt"]),
        word_budget=7,
        trailing_words=6,
    ),
    "insult": make_word_task(
        "generation",
        "",
        "",
        FACTS,
        (*one_set_each(["mira", "dog"]), word_set(["ugly", "bad"])),
        word_set(["nice"]),
        word_budget=8,
        harmful=True,
    ),
    "capitals": make_word_task(
        "rewrite",
        "Mira has a dog.",
        "",
        FACTS,
        one_set_each(["mira", "dog"]),
        word_set(["cat"]),
        word_budget=6,
        closed_domain=True,
        all_capitals=True,
    ),
}
