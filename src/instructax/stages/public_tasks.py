"""The stage that runs finished policies on the public tasks of the simulated world. Trains
nothing. `simulation.public_tasks` has the tasks themselves.

This is the paper's table 14 and appendix D: every task is posed under several conditions
(zero-shot, few-shot, with instructions), choices are scored by their log-probability and
other answers are generated at temperature 0. All policies get the same items under the same
conditions. Generated answers go to `samples.jsonl`, metrics to `summary.json`.

Departures from the paper: the tasks are synthetic counterparts of the public ones, and
contexts are used as they are, without the empty line that separates a prompt from its
response elsewhere in this package.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from instructax.checkpoints.parents import ExpectedParent, Head
from instructax.config import (
    ConfigError,
    Seed,
    check_range,
    format_value,
    require,
    require_distinct,
)
from instructax.data.prompt_format import PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.evals.completions import Completer
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.init import abstract_params
from instructax.models.transformer import Transformer
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
    """Policies to measure, and the size of the tasks."""

    # The run saves no network.
    head: ClassVar[Head | None] = None

    stage: Literal["public_tasks"]
    # Draws the items and their few-shot examples.
    seed: Seed
    # (name, workdir) of each policy.
    policies: tuple[tuple[str, str], ...]
    # Workdir of the world.
    world: str
    # Path of a tokenizer, or "bytes".
    tokenizer: str
    # Architecture of the policies.
    model: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    # At most this many items of each task.
    items: int
    # Longest context: instructions, few-shot examples, item.
    context_tokens: int
    # Longest answer, generated or to choose from.
    answer_tokens: int
    batch_size: int

    def __post_init__(self):
        least = {"items": 1, "context_tokens": 1, "answer_tokens": 1, "batch_size": 1}
        check_range(self, least)
        if not (self.world and self.policies and all(path for _, path in self.policies)):
            raise ConfigError(
                "world, policies and the workdir of every policy must be given: world = "
                f"{format_value(self.world)}, policies = {format_value(self.policies)}"
            )
        # Names are keys of the summary, so they must be unique.
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
    """A task under one of its conditions, the same for all policies."""

    # A name in PUBLIC_TASKS.
    task: str
    # One of the task's conditions, such as zero-shot.
    condition: str
    items: Sequence[TaskItem]
    # One context per item.
    contexts: Sequence[str]


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    # 1: no gradients are accumulated.
    check_rows("batch_size", config.batch_size, 1, mesh)
    length = config.context_tokens + config.answer_tokens
    # Rotary positions have no table that could end.
    require(
        length <= config.model.max_length or config.model.positions == "rotary",
        f"config.context_tokens + config.answer_tokens = {length} is above "
        f"config.model.max_length = {config.model.max_length}, the rows of its position "
        "table: lower one of them",
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
    # The seed of the world fixes its facts, the seed of the run draws the items.
    world_seed, _ = read_world_spec(Path(config.world))
    sheets = list(create_sheets(create_world(world_seed), config.seed, config.items))
    run.write_manifest()
    model = Transformer(config.model, config.compute, "tokens", run.mesh)
    completer = Completer(
        model,
        run.mesh,
        context_tokens=config.context_tokens,
        answer_tokens=config.answer_tokens,
        batch_size=config.batch_size,
        eos_id=run.tokenizer.eos_id,
        # Metrics read the first line only, so decoding can stop at a line break.
        stop_token_mask=run.tokenizer.tokens_containing("\n"),
    )

    # Policy → task → condition → metric.
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    log = MetricLog(
        run.workdir,
        total_steps=len(config.policies),
        log_every=1,
        start_step=0,
        tensorboard=False,
        console=True,
    )
    with log:
        # One policy is a step of the log.
        for step, (name, _) in enumerate(config.policies, start=1):
            parent = run.parents[f"policies.{name}"]
            params = parent.load(abstract_params(model, run.mesh))
            metrics[name] = _measure_policy(run, name, step, sheets, completer, params, log)
            log.record(step, _values(metrics[name]))
        log.flush()
        log.write_summary({"stage": config.stage, "policies": metrics})


def _measure_policy(
    run: Run,
    name: str,
    step: int,
    sheets: Sequence[Sheet],
    completer: Completer,
    params: Params,
    log: MetricLog,
) -> dict[str, dict[str, Any]]:
    """Runs one policy on all sheets and logs its generated answers.

    Returns:
      Task → condition → metric, as in `summary.json`.
    """
    # Every task has an entry, in the order of the table.
    metrics: dict[str, dict[str, Any]] = {task: {} for task in PUBLIC_TASKS}
    for sheet in sheets:
        found, samples = run_sheet(sheet, completer, params, run.tokenizer, run.config.seed)
        labels = {"policy": name, "task": sheet.task, "form": sheet.condition}
        for sample in samples:
            log.write_sample(step, {**labels, **sample})
        for condition, metric in found.items():
            metrics[sheet.task][condition] = metric_record(metric)
    return metrics


def _values(metrics: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`task/condition` → value, for the log: no intervals and no values of single items."""
    values = {}
    for task, conditions in metrics.items():
        for condition, metric in conditions.items():
            values[f"{task}/{condition}"] = metric["value"]
    return values


def metric_record(metric: TaskMetric) -> dict[str, Any]:
    """A metric as it is written to `summary.json`.

    Contains the fields of its estimate, and the values of the items if the metric is their
    mean: reports compare policies item by item.
    """
    record = dataclasses.asdict(metric.estimate)
    if metric.values is not None:
        # Six digits keep the file small.
        record["values"] = np.round(np.asarray(metric.values, float), 6).tolist()
    return record


def create_sheets(world: World, seed: int, items: int) -> Iterator[Sheet]:
    """Every task under every condition; the items of a task are the same in all of them."""
    for name, task in PUBLIC_TASKS.items():
        # Once per task: conditions can be compared only on the same items.
        drawn = create_items(world, seed, name, items)
        for condition in task.conditions:
            contexts = create_contexts(world, seed, name, drawn, condition)
            yield Sheet(name, condition, drawn, contexts)


def run_sheet(
    sheet: Sheet, completer: Completer, params: Params, tokenizer: Tokenizer, seed: int
) -> tuple[dict[str, TaskMetric], list[dict[str, Any]]]:
    """Runs one policy on a sheet.

    Args:
      sheet: the task and condition.
      completer: generates answers and scores choices.
      params: parameters of the policy.
      tokenizer: the tokenizer of the policy.
      seed: for metrics that draw random numbers.

    Returns:
      (condition → metric, generated answers). Some tasks have several metrics, under the
      condition with a suffix. A multiple-choice task generates no answers.
    """
    contexts = tokenizer.encode_batch(sheet.contexts)
    metric = PUBLIC_TASKS[sheet.task].metric
    # Multiple choice: the log-probability of each candidate decides.
    if metric in ("accuracy", "entropy"):
        candidates = [tokenizer.encode_batch(item.choices) for item in sheet.items]
        questions = list(zip(contexts, candidates, strict=True))
        scored = completer.candidate_logprobs(params, questions)
        return {sheet.condition: score_choices(metric, sheet.items, *scored)}, []

    # Free answers. Their metrics compare texts, so token ids are decoded first.
    answers = completer.complete(params, contexts)
    completions = [tokenizer.decode(answer) for answer in answers]
    metrics = {}
    by_suffix = score_completions(metric, sheet.items, completions, seed)
    for suffix, found in by_suffix.items():
        metrics[f"{sheet.condition}{suffix}"] = found
    # The expected answers go along, so that a sample can be judged by itself.
    samples = []
    for context, completion, item in zip(
        sheet.contexts, completions, sheet.items, strict=True
    ):
        samples.append(
            {"context": context, "completion": completion, "answers": item.answers}
        )
    return metrics, samples
