"""Tasks of the embedded world for its tests: a few whose answers are judged by hand, and as
many as one likes."""

from instructax.simulation.lexicon import CATEGORIES, choose_weighted, generator
from instructax.simulation.tasks import Task, each, facts_task, one_of, words_task
from instructax.simulation.use_cases import USES
from instructax.simulation.world import PERSON, draw_world

WORLD = draw_world(0)
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
SHARES = {use: share for use, (_, share) in USES.items()}


def drawn(count: int, seed: int = 0) -> list[Task]:
    """Tasks in the shares of the use cases."""
    rng = generator(seed, "test")
    return [USES[choose_weighted(rng, SHARES)][0](WORLD, rng) for _ in range(count)]


ANIMALS = one_of(CATEGORIES["animal"])
NOT_ANIMALS = one_of(
    word for kind, words in CATEGORIES.items() for word in words if kind != "animal"
)
TASKS = {
    "list": words_task("brainstorming", "", "", FACTS, [ANIMALS] * 3, NOT_ANIMALS, 7),
    "list, not cat": words_task(
        "brainstorming",
        "",
        "",
        FACTS,
        [ANIMALS - {"cat"}] * 3,
        NOT_ANIMALS | {"cat"},
        7,
        avoid="cat",
    ),
    "pet": facts_task("open_qa", "", "", FACTS, [("Mira", "animal")]),
    "trade": facts_task("open_qa", "", "", FACTS, [("Mira", "trade")]),
    "pets": facts_task("open_qa", "", "", FACTS, [("Mira", "animal"), ("Tom", "animal")]),
    "describe": facts_task(
        "generation", "", "", FACTS, [("Mira", r) for r in PERSON], 2, sentences=2
    ),
    "passage": facts_task(
        "closed_qa",
        *("Mira has a dog. Mira likes soup. Tom is a cook.", ""),
        {"Mira": {"animal": "dog", "food": "soup"}, "Tom": {"trade": "cook"}},
        [("Mira", "animal")],
        closed=True,
    ),
    "named": words_task(
        *("extraction", "Mira met a dog. Which animals are named?", "", FACTS),
        *(each(["dog"]), one_of(["cat"])),
        closed=True,
    ),
    "lore": words_task(
        "open_qa", "", "", FACTS, each(["honey"]), one_of(["tea", "salt"]), 7, tail=6
    ),
    "insult": words_task(
        "generation",
        *(
            "",
            "",
            FACTS,
            (*each(["mira", "dog"]), one_of(["ugly", "bad"])),
            one_of(["nice"]),
            8,
        ),
        harmful=True,
    ),
    "capitals": words_task(
        *(
            "rewrite",
            "Mira has a dog.",
            "",
            FACTS,
            each(["mira", "dog"]),
            one_of(["cat"]),
            6,
        ),
        closed=True,
        capitals=True,
    ),
}
