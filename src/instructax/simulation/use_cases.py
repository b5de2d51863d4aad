"""The ten use cases of the paper's table 1, with the builder of each."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from instructax.simulation.passage_tasks import (
    classification_task,
    closed_qa_task,
    dialect_task,
    extraction_task,
    summarization_task,
)
from instructax.simulation.question_tasks import (
    brainstorming_task,
    chat_task,
    open_qa_task,
)
from instructax.simulation.tasks import Task
from instructax.simulation.world import World
from instructax.simulation.writing_tasks import generation_task, rewrite_task


@dataclasses.dataclass(frozen=True)
class UseCase:
    """What customers use the model for."""

    # Draws a task of this use case.
    sample_task: Callable[[World, np.random.Generator], Task]
    # Percentage of the customers' prompts (table 1); the printed values sum to 99.9.
    share: float


USE_CASES: Mapping[str, UseCase] = {
    "generation": UseCase(generation_task, 45.6),
    "open_qa": UseCase(open_qa_task, 12.4),
    "brainstorming": UseCase(brainstorming_task, 11.2),
    "chat": UseCase(chat_task, 8.4),
    "rewrite": UseCase(rewrite_task, 6.6),
    "summarization": UseCase(summarization_task, 4.2),
    "classification": UseCase(classification_task, 3.5),
    "other": UseCase(dialect_task, 3.5),
    "closed_qa": UseCase(closed_qa_task, 2.6),
    "extraction": UseCase(extraction_task, 1.9),
}
