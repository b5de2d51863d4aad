"""The logs of finished experiments in the embedded world, as they lie on disk: no model is
loaded."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import ConfigError
from instructax.data.tokenizer import END_OF_TEXT
from instructax.evals.intervals import Estimate
from instructax.simulation.files import tasks_of
from instructax.simulation.public_tasks import TASKS
from instructax.simulation.task_metrics import Figure
from instructax.simulation.tasks import Task

BEST_OF = "best-of-n"
POLICIES = (
    "GPT",
    "GPT prompted",
    "SFT",
    BEST_OF,
    "PPO",
    "PPO-ptx",
    "FLAN/T0",
)  # in the order of tables and legends
REWARD_RUNS = ("reward", "reward-quiet")  # the second learnt from labelers who never waver
# The sets of comparisons that a reward model is measured on.
LABELERS, HELD_OUT_LABELERS = "labelers", "held-out labelers"

SHARES = (
    "accuracy",
    "truthful",
    "toxicity",
)  # metrics of public tasks that are true or false of an item

Record = Mapping[str, Any]
Public = dict[str, dict[str, dict[str, Figure]]]  # policy → task → condition → figure


@dataclasses.dataclass(frozen=True)
class Size:
    """What the runs of one model size logged."""

    name: str
    folder: Path
    parameters: int
    best_of: int  # n of best-of-n; 0 if the evaluation has none
    samples: dict[
        str, list[Record]
    ]  # policy → its responses, in the order of `Experiment.prompts`; {} if not run
    reward_model: dict[str, Record]  # set of comparisons → "accuracy", "calibration", …
    public: Public  # {} if the public tasks were not run


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One seed of an experiment."""

    name: str
    seed: int  # of the world
    tasks: dict[str, Task]  # by prompt without white space at its ends
    prompts: list[str]  # that every policy of every size answered
    sizes: list[Size]  # from the smallest to the largest
    reward_runs: Mapping[
        str, Record
    ]  # run of a reward model → its last figures; {} if it was not run
    gpt: "Experiment | None" = None  # the same sizes on prompts of the GPT-3 distribution


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The object on each line of `path`; [] if there is no such file. Raises ValueError for
    a line that is none."""
    objects = []
    for number, line in enumerate(
        path.read_text().splitlines() if path.exists() else [], start=1
    ):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            raise ConfigError(
                f"{path}, line {number}, is no JSON: run the stage again"
            ) from None
    return objects


def estimate_of(record: Record, scale: float = 1.0) -> Estimate:
    """A logged estimate times `scale`; null stands for a mean of nothing, or an infinite
    bound."""
    defaults = {"value": math.nan, "low": -math.inf, "high": math.inf}
    value, low, high = (
        scale * (default if record[k] is None else record[k])
        for k, default in defaults.items()
    )
    return Estimate(value, low, high, record["count"])


def parameters_of(model: Record) -> int:
    """Numbers in the embeddings and matrices of a model's config; biases and norms are left
    out."""
    width, head = model["embed_dim"], model["head_dim"]
    attention = 2 * width * head * (model["num_heads"] + model["num_kv_heads"])
    mlp = (
        (2 if model["activation"] in ("gelu", "gelu_exact") else 3)
        * width
        * model["mlp_dim"]
    )
    embeddings = width * model["vocab_size"] * (1 if model["tied_embeddings"] else 2)
    positions = width * model["max_length"] * (model["positions"] == "learned")
    return embeddings + positions + model["num_layers"] * (attention + mlp)


def in_words(parameters: int) -> str:
    """A number of parameters, short: 0.2M, 1.3B."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g}B"
    return f"{parameters / 1e6:.3g}M" if parameters >= 1e8 else f"{parameters / 1e6:.2g}M"


def load(root: Path) -> Experiment:
    """The experiment in the folder `root`. Raises ValueError where the report would have
    nothing to stand on."""
    evaluations = sorted(
        (*root.glob("evaluate/summary.json"), *root.glob("*/evaluate/summary.json"))
    )
    if not evaluations:
        raise ConfigError(
            f"{root} holds no finished run: evaluate/summary.json is neither in it nor in a size's folder"
        )
    if not (root / "world" / "config.json").exists():
        raise ConfigError(
            f"{root} holds no world: a report needs what its prompts ask for, {root}/world"
        )
    try:
        tasks = tasks_of(root / "world")
    except ConfigError:
        raise ConfigError(
            f"{root}/world/config.json is of another version of this project: write the world again"
        ) from None
    sizes = sorted(
        (_load_size(path.parent.parent, root) for path in evaluations),
        key=lambda size: size.parameters,
    )
    seed, name = read_json(root / "world" / "config.json")["seed"], root.resolve().name
    reward_runs = {run: read_json(root / run / "summary.json") for run in REWARD_RUNS}
    experiment = Experiment(
        name, seed, tasks, *_answered(sizes, "evaluate", tasks), reward_runs
    )
    if not (
        sizes[-1].folder / "evaluate-gpt" / "summary.json"
    ).exists():  # the baseline of all others
        return experiment
    prompts, sizes = _answered(sizes, "evaluate-gpt", tasks)
    other = dataclasses.replace(
        experiment, name=f"{name}, GPT-3 prompts", prompts=prompts, sizes=sizes
    )
    return dataclasses.replace(experiment, gpt=other)


def _load_size(folder: Path, root: Path) -> Size:
    config, summary = (
        read_json(folder / "evaluate" / f"{name}.json") for name in ("config", "summary")
    )
    parameters = parameters_of(config["model"])
    return Size(
        name=in_words(parameters) if folder == root else folder.name,
        folder=folder,
        parameters=parameters,
        best_of=config.get("best_of", 0),
        samples={},
        reward_model=summary.get("reward_model", {}),
        public=public_figures(read_json(folder / "tasks" / "summary.json")),
    )


def _answered(
    sizes: list[Size], run: str, tasks: Mapping[str, Task]
) -> tuple[list[str], list[Size]]:
    """The prompts of the evaluation `run`, and the sizes with what their policies answered."""
    samples, folder = (
        [_samples_of(size.folder / run) for size in sizes],
        sizes[-1].folder / run,
    )
    if "SFT" not in samples[-1]:
        raise ConfigError(f"{folder} has no policy SFT, which all others are compared with")
    prompts = [record["prompt"].strip() for record in samples[-1]["SFT"]]
    check_prompts(tasks, prompts, folder)
    return prompts, [
        dataclasses.replace(size, samples=_in_order(size.folder / run, found, prompts))
        for size, found in zip(sizes, samples, strict=True)
    ]


def check_prompts(tasks: Mapping[str, Task], prompts: list[str], folder: Path) -> None:
    """Raises ValueError if the run in `folder` has a prompt that is not the world's."""
    unknown = [prompt for prompt in prompts if prompt not in tasks]
    if unknown:
        raise ConfigError(
            f"the world does not have the prompt {unknown[0]!r}: {folder} is of another world"
        )


def _samples_of(folder: Path) -> dict[str, list[Record]]:
    """Policy → its responses in the finished evaluation in `folder`; {} without one."""
    samples: dict[str, list[Record]] = {}
    for record in (
        read_lines(folder / "samples.jsonl") if (folder / "summary.json").exists() else []
    ):
        samples.setdefault(record["policy"], []).append(record)
    return samples


def _in_order(
    folder: Path, samples: dict[str, list[Record]], prompts: list[str]
) -> dict[str, list[Record]]:
    """Policies in the order of POLICIES, responses in that of `prompts`."""
    ordered = {}
    for policy in sorted(
        samples,
        key=lambda name: POLICIES.index(name) if name in POLICIES else len(POLICIES),
    ):
        by_prompt = {record["prompt"].strip(): record for record in samples[policy]}
        if by_prompt.keys() != set(prompts):
            raise ConfigError(
                f"{folder}: {policy} answered other prompts than the largest size's SFT; "
                "evaluate all sizes on the same prompts"
            )
        ordered[policy] = [by_prompt[prompt] for prompt in prompts]
    return ordered


def public_figure(task: str, record: Record) -> Figure:
    """A logged figure of a public task; BLEU, which counts to 100, as a share like all
    others."""
    metric = TASKS[task].metric
    values = (
        np.array(record["values"], bool if metric in SHARES else float)
        if "values" in record
        else None
    )
    return Figure(estimate_of(record, 0.01 if metric == "bleu" else 1.0), values)


def public_figures(summary: Record) -> Public:
    """The figures of all policies on the public tasks."""
    return {
        policy: {
            task: {
                condition: public_figure(task, record)
                for condition, record in conditions.items()
            }
            for task, conditions in tasks.items()
        }
        for policy, tasks in summary.get("policies", {}).items()
    }


def response_of(record: Record) -> str:
    """The response without the end token."""
    return record["response"].removesuffix(END_OF_TEXT)


def overfitting_of(size: Size) -> tuple[dict[int, float], dict[int, np.ndarray]]:
    """Of an SFT run that goes on: step → validation loss, and kept step → score of each
    response f[n], the same prompts at every step; both {} unless it and its evaluation are
    finished."""
    if not all(
        (size.folder / run / "summary.json").exists()
        for run in ("sft-overfit", "evaluate-overfit")
    ):
        return {}, {}
    lines = read_lines(size.folder / "sft-overfit" / "metrics.jsonl")
    losses = {
        line["step"]: line["demonstrations_loss"]
        for line in lines
        if "demonstrations_loss" in line
    }
    scores: dict[int, list[float]] = {}
    for record in read_lines(size.folder / "evaluate-overfit" / "samples.jsonl"):
        if record["policy"].startswith("step "):
            scores.setdefault(int(record["policy"].removeprefix("step ")), []).append(
                record["score"]
            )
    return losses, {step: np.array(scores[step]) for step in sorted(scores)}
