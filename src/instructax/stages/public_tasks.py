"""Finished policies on the public tasks of the simulated world, the paper's table 14: a run
that trains nothing.

Every policy gets the same items in the same forms, its contexts as they are: no empty line
opens the answer, as it does after a prompt of a customer. Generated answers go to
`samples.jsonl`, figures to `summary.json`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from instructax.checkpoints.parents import ExpectedParent, Head
from instructax.config import ConfigError, Seed, check_range, require, require_distinct
from instructax.data.prompt_format import PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.evals.completions import Completer
from instructax.models import ComputeConfig, ModelConfig, Transformer
from instructax.models.init import abstract_params
from instructax.runtime.metric_log import MetricLog
from instructax.sharding import MeshConfig
from instructax.simulation.files import read_world_spec
from instructax.simulation.public_items import TaskItem
from instructax.simulation.public_tasks import PUBLIC_TASKS, create_contexts, create_items
from instructax.simulation.task_metrics import TaskMetric, score_choices, score_completions
from instructax.simulation.world import World, create_world
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import check_rows
from instructax.training.run import Run
from instructax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Policies to be measured."""

    head: ClassVar[Head | None] = None

    stage: Literal["public_tasks"]
    seed: Seed  # of the items and their worked examples
    policies: tuple[tuple[str, str], ...]  # (name, workdir)
    world: str  # workdir of the world
    tokenizer: str  # path, or "bytes"
    model: ModelConfig  # of the policies
    compute: ComputeConfig
    mesh: MeshConfig
    items: int  # the most of each task
    context_tokens: int  # the longest context: opening, worked examples, item
    answer_tokens: int  # the longest answer, generated or to choose
    batch_size: int

    def __post_init__(self):
        check_range(
            self, {"items": 1, "context_tokens": 1, "answer_tokens": 1, "batch_size": 1}
        )
        if not (self.world and self.policies and all(path for _, path in self.policies)):
            raise ConfigError(
                "world, policies and the workdir of every policy must be given"
            )
        require_distinct("policies", [name for name, _ in self.policies])

    def parents(self) -> dict[str, ExpectedParent]:
        """The policies."""
        expected: dict[str, ExpectedParent] = {}
        for name, path in self.policies:
            expected[f"policies.{name}"] = ExpectedParent(path, self.model, "tokens")
        return expected

    def prepare_data(
        self, tokenizer: Tokenizer, prompt_format: PromptFormat
    ) -> dict[str, PreparedData]:
        """No data sets: the world generates the items."""
        return {}


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A task in one of its forms, as all policies get it."""

    task: str
    form: str
    items: Sequence[TaskItem]
    contexts: Sequence[str]


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    check_rows("batch_size", config.batch_size, 1, mesh)
    length = config.context_tokens + config.answer_tokens
    require(
        length <= config.model.max_length
        or config.model.positions == "rotary",  # which have no last one
        f"config.context_tokens + config.answer_tokens = {length} is above config.model.max_length = "
        f"{config.model.max_length}, the rows of its position table: lower one of them",
    )


def row_lengths(config: Config) -> RowLengths:
    """Pieces of a context with an answer."""
    length = config.context_tokens + config.answer_tokens
    return split_lengths(config.compute, length), False


def memory(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Nothing is trained."""
    return {}


def train(run: Run) -> None:
    """Measures the policies; an interrupted run starts over."""
    config: Config = run.config
    mesh, tokenizer, parents = run.mesh, run.tokenizer, run.parents
    workdir = run.workdir
    seed, _ = read_world_spec(Path(config.world))
    sheets = list(sheets_of(create_world(seed), config.seed, config.items))
    run.write_manifest()
    model = Transformer(config.model, config.compute, "tokens", mesh)
    lengths = {
        "context_tokens": config.context_tokens,
        "answer_tokens": config.answer_tokens,
    }
    # What stands after a line break is never read.
    stops = tokenizer.tokens_containing("\n")
    completer = Completer(
        model,
        mesh,
        batch_size=config.batch_size,
        eos_id=tokenizer.eos_id,
        stop_token_mask=stops,
        **lengths,
    )
    policies: dict[str, dict[str, dict[str, Any]]] = {}
    log = MetricLog(
        workdir,
        total_steps=len(config.policies),
        log_every=1,
        start_step=0,
        tensorboard=False,
        console=True,
    )
    with log:
        for number, (name, _) in enumerate(config.policies, start=1):
            params = parents[f"policies.{name}"].load(abstract_params(model, mesh))
            policies[name] = {task: {} for task in PUBLIC_TASKS}
            for sheet in sheets:
                found, samples = answered(sheet, completer, params, tokenizer, config.seed)
                for sample in samples:
                    log.write_sample(
                        number,
                        {"policy": name, "task": sheet.task, "form": sheet.form, **sample},
                    )
                policies[name][sheet.task] |= {
                    form: record_of(figure) for form, figure in found.items()
                }
            log.record(
                number,
                {
                    f"{task}/{f}": x["value"]
                    for task, group in policies[name].items()
                    for f, x in group.items()
                },
            )
        log.flush()
        log.write_summary({"stage": config.stage, "policies": policies})


def record_of(figure: TaskMetric) -> dict[str, Any]:
    """The figure for the log: its estimate, and the values of the items where it is their
    mean."""
    values = (
        {}
        if figure.values is None
        else {"values": np.round(np.asarray(figure.values, float), 6).tolist()}
    )
    return {**dataclasses.asdict(figure.estimate), **values}


def sheets_of(world: World, seed: int, items: int) -> Iterator[Sheet]:
    """Every task in every form; the items of a task are the same in all of them."""
    for name, task in PUBLIC_TASKS.items():
        drawn = create_items(world, seed, name, items)
        for form in task.conditions:
            yield Sheet(name, form, drawn, create_contexts(world, seed, name, drawn, form))


def answered(
    sheet: Sheet, completer: Completer, params: Params, tokenizer: Tokenizer, seed: int
) -> tuple[dict[str, TaskMetric], list[dict[str, Any]]]:
    """(figures of one policy by name, its generated answers; none of a choice)."""
    contexts, metric = (
        tokenizer.encode_batch(sheet.contexts),
        PUBLIC_TASKS[sheet.task].metric,
    )
    if metric in ("accuracy", "entropy"):
        candidates = [tokenizer.encode_batch(item.choices) for item in sheet.items]
        scored = completer.candidate_logprobs(
            params, list(zip(contexts, candidates, strict=True))
        )
        return {sheet.form: score_choices(metric, sheet.items, *scored)}, []
    completions = [
        tokenizer.decode(answer) for answer in completer.complete(params, contexts)
    ]
    figures = score_completions(metric, sheet.items, completions, seed)
    samples = [
        {"context": context, "completion": completion, "answers": item.answers}
        for context, completion, item in zip(
            sheet.contexts, completions, sheet.items, strict=True
        )
    ]
    return {f"{sheet.form}{suffix}": x for suffix, x in figures.items()}, samples
