"""Readers of a finished world: its seed and sizes, its prompts, and their tasks.

Only the seed and the sizes are stored. Prompts and tasks are created again from these,
because the files do not record what a prompt asks for.
"""

import json
from pathlib import Path

from instructax.checkpoints.parents import is_finished
from instructax.config import construct, require
from instructax.simulation.prompts import SimulatedPrompt, tasks_by_prompt
from instructax.simulation.tasks import Task
from instructax.simulation.write import WorldSizes, create_prompts


def read_world_spec(workdir: Path) -> tuple[int, WorldSizes]:
    """Returns the seed and the sizes of the finished world in `workdir`.

    Raises:
      ConfigError: there is no finished world.
    """
    config = {}
    if is_finished(workdir):
        config = json.loads((workdir / "config.json").read_text())
    require(
        config.get("stage") == "world",
        f"{workdir} is not a finished world: write it first, or change the path",
    )
    return config["seed"], construct(WorldSizes, config["lines"])


def recreate_prompts(workdir: Path, set_name: str) -> list[SimulatedPrompt]:
    """Returns the prompts of one of `prompts.PROMPT_SETS`, with their tasks and writers."""
    return create_prompts(*read_world_spec(workdir))[set_name]


def recreate_tasks(workdir: Path) -> dict[str, Task]:
    """Returns the task of every prompt of the world in `workdir`, for evaluation only.

    The keys are the prompts without surrounding space.
    """
    return tasks_by_prompt(create_prompts(*read_world_spec(workdir)))
