"""The prompts of the simulated data sets, with who wrote each of them.

The proportions are those of the paper (tables 1 and 6, appendices A.1 and A.2). Customers
use the model in the shares of table 1. A few customers send many prompts and most send few,
and several belong to the same organization. Labelers write plain prompts, prompts modeled
after customers' wishes, and few-shot prompts, where examples precede the last instruction.

No prompt is in two data sets, and no few-shot example is itself a prompt. What is asked
does recur in other words, because the number of people and things is small.
"""

import dataclasses

import numpy as np

from instructax.config import ConfigError
from instructax.data.prompt_format import add_separator
from instructax.simulation.lexicon import choose_weighted, pick, rng_for
from instructax.simulation.tasks import Task
from instructax.simulation.use_cases import USE_CASES
from instructax.simulation.world import World

PROMPT_SETS = ("demonstrations", "comparisons", "prompts", "gpt_prompts")

# Share of the prompts of each set that labelers wrote (table 6).
LABELER_PROMPT_SHARE = {
    "demonstrations": 0.89,
    "comparisons": 0.20,
    "prompts": 0.0,
    "gpt_prompts": 0.0,
}
# Share of few-shot prompts. Labelers write some; customers who send prompts to GPT always
# show it an example.
FEW_SHOT_SHARE = {
    "demonstrations": 0.15,
    "comparisons": 0.0,
    "prompts": 0.0,
    "gpt_prompts": 1.0,
}
# Fewest and most examples of a few-shot prompt.
NUM_EXAMPLES = {"demonstrations": (1, 2), "gpt_prompts": (1, 1)}

PROMPTS_PER_USER = 8  # on average; the most active users send far more
USERS_PER_ORGANIZATION = 4
LABELERS_PER_GROUP = 12
# Draws of a new prompt before its use case counts as exhausted.
MAX_DRAWS = 100

# Some people begin every prompt with one of these.
GREETINGS = (
    "Hello.",
    "Good day.",
    "Please help me.",
    "I need help.",
    "A wish:",
    "Quick, please.",
    "My friend,",
    "Be so kind.",
)
# Share of the people who begin with none of them.
NO_GREETING_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class SimulatedPrompt:
    """A task and who wrote its prompt."""

    task: Task
    user: str
    # "" for a labeler.
    organization: str
    # "plain", "few-shot", "user-based" or "customer".
    kind: str


def create_prompt_sets(
    world: World, seed: int, sizes: dict[str, int]
) -> dict[str, list[SimulatedPrompt]]:
    """Creates the prompts of all sets.

    Args:
      world: the world that the prompts are about.
      seed: the same world, seed and sizes give the same prompts.
      sizes: the number of prompts of each of PROMPT_SETS.

    Returns:
      The prompts of each set.

    Raises:
      ConfigError: the world does not have enough different prompts.
    """
    # Every set avoids the prompts of the sets before it. Examples are added last, so that
    # they can avoid the prompts of all sets.
    used: set[str] = set()
    without_examples = {}
    for name in PROMPT_SETS:
        rng = rng_for(seed, name)
        without_examples[name] = _create_prompts(world, rng, name, sizes[name], used)

    prompt_sets = {}
    for name, prompts in without_examples.items():
        rng = rng_for(seed, f"{name}, examples")
        prompt_sets[name] = _add_examples(world, rng, name, prompts, used)
    return prompt_sets


def tasks_by_prompt(prompt_sets: dict[str, list[SimulatedPrompt]]) -> dict[str, Task]:
    """Returns the task of every prompt, keyed by the prompt without surrounding space.

    An evaluation looks up here what a prompt asks for.
    """
    tasks = {}
    for prompts in prompt_sets.values():
        for prompt in prompts:
            tasks[prompt.task.prompt.strip()] = prompt.task
    return tasks


def _create_prompts(
    world: World, rng: np.random.Generator, set_name: str, count: int, used: set[str]
) -> list[SimulatedPrompt]:
    """Creates the prompts of a set without few-shot examples, and adds them to `used`."""
    num_users = max(1, count // PROMPTS_PER_USER)
    # Each user always begins in the same way.
    greetings = [_sample_greeting(rng) for _ in range(num_users)]
    # Zipf's law: a long tail of users who send one prompt.
    activity = 1 / np.arange(1, num_users + 1)
    activity /= activity.sum()

    prompts = []
    for _ in range(count):
        if rng.random() >= LABELER_PROMPT_SHARE[set_name]:
            index = int(rng.choice(num_users, p=activity))
            user = f"{set_name}-user-{index:04d}"
            organization = f"{set_name}-organization-{index // USERS_PER_ORGANIZATION:03d}"
            kind = "customer"
            greeting = greetings[index]
        else:
            user = f"labeler-{int(rng.integers(LABELERS_PER_GROUP)):02d}"
            organization = ""
            kind = pick(rng, ("plain", "user-based"))
            greeting = _sample_greeting(rng) if kind == "user-based" else ""
        task = _sample_unused_task(world, rng, greeting, used)
        prompts.append(SimulatedPrompt(task, user, organization, kind))
    return prompts


def _sample_greeting(rng: np.random.Generator) -> str:
    return "" if rng.random() < NO_GREETING_SHARE else pick(rng, GREETINGS)


def _sample_unused_task(
    world: World, rng: np.random.Generator, greeting: str, used: set[str]
) -> Task:
    """Samples a task whose prompt, with `greeting`, is not in `used`, and adds it there.

    Raises:
      ConfigError: all use cases are exhausted.
    """
    shares = {name: use_case.share for name, use_case in USE_CASES.items()}
    while shares:
        name = choose_weighted(rng, shares)
        for _ in range(MAX_DRAWS):
            task = USE_CASES[name].sample_task(world, rng)
            if greeting and task.format == "plain":
                task = dataclasses.replace(task, prompt=f"{greeting} {task.prompt}")
            if task.prompt not in used:
                used.add(task.prompt)
                return task
        # Exhausted: draw from the remaining use cases.
        del shares[name]
    raise ConfigError(
        f"the world has no more than {len(used)} prompts: ask for fewer lines"
    )


def _add_examples(
    world: World,
    rng: np.random.Generator,
    set_name: str,
    prompts: list[SimulatedPrompt],
    used: set[str],
) -> list[SimulatedPrompt]:
    """Turns some of the `prompts` into few-shot prompts, with examples not in `used`."""
    result = []
    for prompt in prompts:
        by_labeler = not prompt.organization
        allowed = by_labeler or set_name == "gpt_prompts"
        # The random number is drawn only for prompts that may have examples.
        if (
            allowed
            and prompt.task.format == "plain"
            and rng.random() < FEW_SHOT_SHARE[set_name]
        ):
            fewest, most = NUM_EXAMPLES[set_name]
            count = int(rng.integers(fewest, most + 1))
            examples = _sample_examples(world, rng, prompt.task.use_case, count, used)
            prompt = dataclasses.replace(
                prompt,
                task=_prepend_examples(examples, prompt.task),
                kind="few-shot" if by_labeler else prompt.kind,
            )
        result.append(prompt)
    return result


def _sample_examples(
    world: World, rng: np.random.Generator, use_case: str, count: int, used: set[str]
) -> list[Task]:
    """Samples `count` tasks of a use case with prompts not in `used`.

    There are fewer if MAX_DRAWS draws do not find enough.
    """
    examples: list[Task] = []
    for _ in range(MAX_DRAWS):
        if len(examples) == count:
            break
        example = USE_CASES[use_case].sample_task(world, rng)
        if example.prompt not in used:
            examples.append(example)
    return examples


def _prepend_examples(examples: list[Task], task: Task) -> Task:
    shots = ""
    for example in examples:
        shots += f"{add_separator(example.prompt)}{example.ideal}\n\n"
    return dataclasses.replace(task, prompt=shots + task.prompt)
