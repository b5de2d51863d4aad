"""Sampled items of one world's public tasks."""

from functools import cache

from instructax.simulation.public_items import TaskItem
from instructax.simulation.public_tasks import PUBLIC_TASKS, create_items
from instructax.simulation.world import create_world

WORLD = create_world(0)
CHOICE_TASKS = [name for name, task in PUBLIC_TASKS.items() if task.metric == "accuracy"]


@cache
def sampled_items(name: str) -> list[TaskItem]:
    """200 items of a task, or all of them if there are fewer."""
    return create_items(WORLD, 0, name, 200)
