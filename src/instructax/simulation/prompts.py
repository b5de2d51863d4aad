"""The prompts of the data sets, by whom they were asked, in the paper's proportions (table
6, A.1, A.2).

Customers ask in the shares of table 1; a few of them ask much, most ask little, and several
belong to one organisation. Labelers write plain prompts, prompts after the wishes of
customers, and few-shot prompts: an instruction with examples of its use before the last
one, which is left open. No prompt is in two sets, nor an example of one; what is asked
recurs in other words, since the world has but so many people and things.
"""

import dataclasses
import itertools

import numpy as np

from instructax.config import ConfigError
from instructax.data.prompt_format import add_separator
from instructax.simulation.lexicon import choose_weighted, generator, pick
from instructax.simulation.tasks import Task
from instructax.simulation.use_cases import USES
from instructax.simulation.world import World

SETS = ("demonstrations", "comparisons", "prompts", "gpt_prompts")
# Share of the prompts that labelers wrote (table 6).
BY_LABELERS = {
    "demonstrations": 0.89,
    "comparisons": 0.20,
    "prompts": 0.0,
    "gpt_prompts": 0.0,
}
# Share of few-shot prompts: some of the labelers', and what customers send to GPT, to show
# it what they want.
FEW_SHOT = {"demonstrations": 0.15, "comparisons": 0.0, "prompts": 0.0, "gpt_prompts": 1.0}
SHOTS = {
    "demonstrations": (1, 2),
    "gpt_prompts": (1, 1),
}  # fewest and most examples before the open one
PROMPTS_PER_USER = 8  # on average; the busiest users ask far more
USERS_PER_ORGANISATION = 4
LABELER_COUNT = 12  # of each group
DRAWS = 100  # of one prompt, before its use case counts as exhausted
OPENINGS = (
    "Hello.",
    "Good day.",
    "Please help me.",
    "I need help.",
    "A wish:",
    "Quick, please.",
    "My friend,",
    "Be so kind.",
)  # what some people always begin with
PLAIN = 0.4  # share of the people who begin with none of them


@dataclasses.dataclass(frozen=True)
class SimulatedPrompt:
    """A task and who asked for it."""

    task: Task
    user: str
    organisation: str  # "" for a labeler
    kind: str  # "plain", "few-shot", "user-based" or "customer"


def few_shot(examples: list[Task], last: Task) -> Task:
    """`last` with worked examples before its prompt."""
    shots = "".join(
        f"{add_separator(example.prompt)}{example.ideal}\n\n" for example in examples
    )
    return dataclasses.replace(last, prompt=shots + last.prompt)


def _opening(rng: np.random.Generator) -> str:
    """How someone begins."""
    return "" if rng.random() < PLAIN else pick(rng, OPENINGS)


def _new_task(world: World, rng: np.random.Generator, opening: str, seen: set[str]) -> Task:
    """A task whose prompt, with `opening` before it, is not in `seen`. Raises ValueError if
    none can be found."""
    shares = {use: share for use, (_, share) in USES.items()}
    while shares:
        use = choose_weighted(rng, shares)
        for _ in range(DRAWS):
            task = USES[use][0](world, rng)
            if opening and task.format == "plain":
                task = dataclasses.replace(task, prompt=f"{opening} {task.prompt}")
            if task.prompt not in seen:
                seen.add(task.prompt)
                return task
        del shares[use]
    raise ConfigError(
        f"the world has no more than {len(seen)} prompts: ask for fewer lines"
    )


def prompt_sets(
    world: World, seed: int, sizes: dict[str, int]
) -> dict[str, list[SimulatedPrompt]]:
    """So many prompts of each of SETS, the same ones for the same world, seed and sizes."""
    seen: set[str] = set()
    sets = {
        name: _prompts(world, generator(seed, name), name, sizes[name], seen)
        for name in SETS
    }
    return {
        name: _with_examples(
            world, generator(seed, f"{name}, examples"), name, sets[name], seen
        )
        for name in sets
    }


def _with_examples(
    world: World,
    rng: np.random.Generator,
    name: str,
    prompts: list[SimulatedPrompt],
    seen: set[str],
) -> list[SimulatedPrompt]:
    """`prompts`, some of them few-shot; no example is itself a prompt of any set."""
    made = []
    for asked in prompts:
        may = not asked.organisation or name == "gpt_prompts"
        if may and asked.task.format == "plain" and rng.random() < FEW_SHOT[name]:
            builder, count = (
                USES[asked.task.use][0],
                int(rng.integers(SHOTS[name][0], SHOTS[name][1] + 1)),
            )
            drawn = (builder(world, rng) for _ in range(DRAWS))
            examples = list(
                itertools.islice(
                    (example for example in drawn if example.prompt not in seen), count
                )
            )
            kind = asked.kind if asked.organisation else "few-shot"
            asked = dataclasses.replace(
                asked, task=few_shot(examples, asked.task), kind=kind
            )
        made.append(asked)
    return made


def _prompts(
    world: World, rng: np.random.Generator, name: str, count: int, seen: set[str]
) -> list[SimulatedPrompt]:
    users = max(1, count // PROMPTS_PER_USER)
    openings = [
        _opening(rng) for _ in range(users)
    ]  # each user always begins in the same way
    activity = 1 / np.arange(1, users + 1)  # Zipf's law: a long tail of users who ask once
    activity /= activity.sum()
    made = []
    for _ in range(count):
        if rng.random() >= BY_LABELERS[name]:
            number = int(rng.choice(users, p=activity))
            user, kind, opening = f"{name}-user-{number:04d}", "customer", openings[number]
            organisation = f"{name}-organisation-{number // USERS_PER_ORGANISATION:03d}"
        else:
            user, organisation = f"labeler-{int(rng.integers(LABELER_COUNT)):02d}", ""
            kind = pick(rng, ("plain", "user-based"))
            opening = _opening(rng) if kind == "user-based" else ""
        task = _new_task(world, rng, opening, seen)
        made.append(SimulatedPrompt(task, user, organisation, kind))
    return made


def tasks_by_prompt(sets: dict[str, list[SimulatedPrompt]]) -> dict[str, Task]:
    """The task of every prompt, without white space at its ends: how an evaluation finds
    what was asked for."""
    return {
        asked.task.prompt.strip(): asked.task
        for prompts in sets.values()
        for asked in prompts
    }
