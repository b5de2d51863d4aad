"""Readers of a finished world: its seed and sizes, its prompts, and the tasks behind them."""

import json
from pathlib import Path

from instructax.checkpoints.parents import is_finished
from instructax.config import construct, require
from instructax.simulation.prompts import SimulatedPrompt, tasks_by_prompt
from instructax.simulation.tasks import Task
from instructax.simulation.write import Sizes, prompts_of


def world_of(workdir: Path) -> tuple[int, Sizes]:
    """(seed, sizes) of the finished world in `workdir`. Raises ConfigError if there is
    none."""
    stored = (
        json.loads((workdir / "config.json").read_text()) if is_finished(workdir) else {}
    )
    require(
        stored.get("stage") == "world",
        f"{workdir} is not a finished world: write it first, or change the path",
    )
    return stored["seed"], construct(Sizes, stored["lines"])


def asked_of(workdir: Path, name: str) -> list[SimulatedPrompt]:
    """The prompts of set `name` (one of `prompts.SETS`) of the finished world in `workdir`,
    as they were asked."""
    return prompts_of(*world_of(workdir))[name]


def tasks_of(workdir: Path) -> dict[str, Task]:
    """What is asked for in every prompt of the finished world in `workdir`, by the prompt
    without white space at its ends: for evaluation alone."""
    return tasks_by_prompt(prompts_of(*world_of(workdir)))
