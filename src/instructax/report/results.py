"""Results of finished experiments in the simulated world.

Everything is read from run folders: configs, summaries and logs. No model is loaded.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from instructax.checkpoints.manifest import upgrade_config, upgrade_metrics
from instructax.config import ConfigError
from instructax.data.tokenizer import END_OF_TEXT
from instructax.report.logs import JsonObject, logged_estimate, read_log, read_run_file
from instructax.simulation.files import recreate_tasks
from instructax.simulation.public_tasks import PUBLIC_TASKS
from instructax.simulation.task_metrics import TaskMetric
from instructax.simulation.tasks import Task

BEST_OF = "best-of-n"

# In the order of tables and legends.
POLICIES = ("GPT", "GPT prompted", "SFT", BEST_OF, "PPO", "PPO-ptx", "FLAN/T0")

# The second reward model is trained on labels without noise.
REWARD_RUNS = ("reward", "reward-quiet")

# The comparison sets on which an evaluation measures the reward model.
LABELERS = "labelers"
HELD_OUT_LABELERS = "held-out labelers"

# Metrics of public tasks that are either true or false for each item.
BINARY_METRICS = ("accuracy", "truthful", "toxicity")

# Policy → task → condition → metric.
PublicResults = dict[str, dict[str, dict[str, TaskMetric]]]


@dataclasses.dataclass(frozen=True)
class SizeResults:
    """What the runs of one model size logged."""

    name: str
    folder: Path
    num_parameters: int
    best_of: int  # n of best-of-n; 0 if the evaluation has no such policy
    # Policy → its samples, in the order of `ExperimentResults.prompts`; {} if not run.
    samples: dict[str, list[JsonObject]]
    reward_model: dict[str, JsonObject]  # comparison set → "accuracy", "calibration", …
    public_tasks: PublicResults  # {} if the public tasks were not run

    def public_metric(self, policy: str, task: str, condition: str) -> TaskMetric | None:
        """Returns the metric of a public task, or None if it was not logged."""
        return self.public_tasks.get(policy, {}).get(task, {}).get(condition)


@dataclasses.dataclass(frozen=True)
class ExperimentResults:
    """One seed of an experiment."""

    name: str
    seed: int  # of the world
    tasks: dict[str, Task]  # keyed by the prompt, stripped of surrounding white space
    prompts: list[str]  # every policy of every size responds to these
    sizes: list[SizeResults]  # from the smallest to the largest
    reward_runs: Mapping[str, JsonObject]  # reward model run → its summary; {} if not run
    # The same sizes, evaluated on prompts of the GPT-3 distribution.
    on_gpt_prompts: "ExperimentResults | None" = None


def load_experiment(root: Path) -> ExperimentResults:
    """Reads the experiment in the folder `root`.

    Raises ConfigError if there is no finished evaluation, if the world is missing or has
    changed, or if policies were evaluated on different prompts.
    """
    # An experiment of one size has its runs in `root`, else each size has a folder there.
    evaluations = [
        *root.glob("evaluate/summary.json"),
        *root.glob("*/evaluate/summary.json"),
    ]
    if not evaluations:
        raise ConfigError(
            f"{root} contains no finished evaluation: evaluate/summary.json is neither in "
            "it nor in the folder of a size"
        )
    tasks = _load_tasks(root)
    seed = read_run_file(root / "world" / "config.json")["seed"]

    # Sizes are ordered by their parameters: their names have no order.
    sizes = []
    for path in sorted(evaluations):
        sizes.append(_load_size(path.parent.parent, root))
    sizes.sort(key=lambda size: size.num_parameters)

    prompts, evaluated = _with_samples(sizes, "evaluate", tasks)
    experiment = ExperimentResults(
        name=root.resolve().name,
        seed=seed,
        tasks=tasks,
        prompts=prompts,
        sizes=evaluated,
        reward_runs=_load_reward_runs(root),
    )

    # The largest size has the SFT policy that all others are compared with.
    if not (sizes[-1].folder / "evaluate-gpt" / "summary.json").exists():
        return experiment
    prompts, evaluated = _with_samples(sizes, "evaluate-gpt", tasks)
    on_gpt_prompts = dataclasses.replace(
        experiment,
        name=f"{experiment.name}, GPT-3 prompts",
        prompts=prompts,
        sizes=evaluated,
    )
    return dataclasses.replace(experiment, on_gpt_prompts=on_gpt_prompts)


def _load_tasks(root: Path) -> dict[str, Task]:
    world = root / "world"
    if not (world / "config.json").exists():
        raise ConfigError(
            f"{root} contains no world: the report needs the tasks behind the prompts, "
            f"which {world} defines"
        )
    try:
        return recreate_tasks(world)
    except ConfigError:
        raise ConfigError(
            f"{world}/config.json was written by another version of this project: "
            "generate the world again"
        ) from None


def _load_reward_runs(root: Path) -> dict[str, JsonObject]:
    """Reads the summaries of REWARD_RUNS, which may be of an earlier version."""
    summaries = {}
    for run in REWARD_RUNS:
        summaries[run] = upgrade_metrics(read_run_file(root / run / "summary.json"))
    return summaries


def _load_size(folder: Path, root: Path) -> SizeResults:
    """Reads what is known of a size before its samples are matched with prompts."""
    config = upgrade_config(read_run_file(folder / "evaluate" / "config.json"))
    summary = read_run_file(folder / "evaluate" / "summary.json")
    num_parameters = count_parameters(config["model"])
    # An experiment of one size has no folder that is named after it.
    name = format_parameter_count(num_parameters) if folder == root else folder.name
    return SizeResults(
        name=name,
        folder=folder,
        num_parameters=num_parameters,
        best_of=config.get("best_of", 0),
        samples={},
        reward_model=summary.get("reward_model", {}),
        public_tasks=public_results(read_run_file(folder / "tasks" / "summary.json")),
    )


def count_parameters(model: JsonObject) -> int:
    """Counts the parameters in the embeddings and matrices of a model config.

    Biases and norms are left out.
    """
    embed_dim = model["embed_dim"]
    num_heads = model["num_heads"] + model["num_kv_heads"]
    attention = 2 * embed_dim * model["head_dim"] * num_heads  # query, output; key, value

    # Two matrices, up and down; gated activations have a third matrix.
    num_matrices = 2 if model["activation"] in ("gelu", "gelu_exact") else 3
    mlp = num_matrices * embed_dim * model["mlp_dim"]

    num_tables = 1 if model["tied_embeddings"] else 2
    # Learned positions are a table too; rotary ones have no parameters.
    embeddings = num_tables * embed_dim * model["vocab_size"]
    if model["positions"] == "learned":
        embeddings += embed_dim * model["max_length"]
    return embeddings + model["num_layers"] * (attention + mlp)


def format_parameter_count(count: int) -> str:
    """Returns a short form of a number of parameters: 0.16M, 124M, 1.3B."""
    if count >= 1e9:
        return f"{count / 1e9:.3g}B"
    if count >= 1e8:
        return f"{count / 1e6:.3g}M"
    return f"{count / 1e6:.2g}M"


def _with_samples(
    sizes: list[SizeResults], run: str, tasks: Mapping[str, Task]
) -> tuple[list[str], list[SizeResults]]:
    """Returns the prompts of the evaluation `run`, and `sizes` with their samples."""
    samples = [_load_samples(size.folder / run) for size in sizes]
    folder = sizes[-1].folder / run
    if "SFT" not in samples[-1]:
        raise ConfigError(f"{folder} has no policy SFT, which all others are compared with")

    # The prompts of the baseline define the order of all arrays over prompts.
    prompts = [record["prompt"].strip() for record in samples[-1]["SFT"]]
    check_prompts(tasks, prompts, folder)

    evaluated = []
    for size, by_policy in zip(sizes, samples, strict=True):
        ordered = _in_order(size.folder / run, by_policy, prompts)
        evaluated.append(dataclasses.replace(size, samples=ordered))
    return prompts, evaluated


def check_prompts(tasks: Mapping[str, Task], prompts: list[str], folder: Path) -> None:
    """Raises ConfigError if the run in `folder` has a prompt that is not from the world."""
    # One example is enough to see that the world is another one.
    for prompt in prompts:
        if prompt not in tasks:
            raise ConfigError(
                f"the world does not have the prompt {prompt!r}: {folder} belongs to a "
                "different world"
            )


def _load_samples(folder: Path) -> dict[str, list[JsonObject]]:
    """Returns policy → samples of the evaluation in `folder`; {} if it has not finished."""
    samples: dict[str, list[JsonObject]] = {}
    # A run writes its summary last: without one, its samples are incomplete.
    if not (folder / "summary.json").exists():
        return samples
    for record in read_log(folder / "samples.jsonl"):
        samples.setdefault(record["policy"], []).append(record)
    return samples


def _in_order(
    folder: Path, samples: dict[str, list[JsonObject]], prompts: list[str]
) -> dict[str, list[JsonObject]]:
    """Orders policies like POLICIES, unknown ones last, and samples like `prompts`."""

    def place(policy: str) -> int:
        return POLICIES.index(policy) if policy in POLICIES else len(POLICIES)

    ordered = {}
    for policy in sorted(samples, key=place):
        # White space at the ends is part of the prompt format, not of the prompt.
        by_prompt = {record["prompt"].strip(): record for record in samples[policy]}
        if by_prompt.keys() != set(prompts):
            raise ConfigError(
                f"{folder}: {policy} was evaluated on other prompts than SFT of the "
                "largest size; evaluate all sizes on the same prompts"
            )
        ordered[policy] = [by_prompt[prompt] for prompt in prompts]
    return ordered


def public_results(summary: JsonObject) -> PublicResults:
    """Parses the summary of a public tasks run."""
    results: PublicResults = {}
    for policy, tasks in summary.get("policies", {}).items():
        results[policy] = {}
        for task, conditions in tasks.items():
            results[policy][task] = {}
            for condition, record in conditions.items():
                results[policy][task][condition] = _public_metric(task, record)
    return results


def _public_metric(task: str, record: JsonObject) -> TaskMetric:
    """Parses one metric of a public task; BLEU is scaled to 0 … 1 like all others."""
    metric = PUBLIC_TASKS[task].metric
    scale = 0.01 if metric == "bleu" else 1.0
    # By item, for pairing; BLEU has none.
    values = None
    if "values" in record:
        dtype = bool if metric in BINARY_METRICS else float
        values = np.array(record["values"], dtype)
    return TaskMetric(logged_estimate(record, scale), values)


def few_shot_tasks(sizes: list[SizeResults]) -> list[str]:
    """Returns the public tasks with few-shot results, except measures of truthfulness."""
    # The order is that of PUBLIC_TASKS, whatever the order in the log.
    logged: set[str] = set()
    for size in sizes:
        for tasks in size.public_tasks.values():
            logged.update(task for task in tasks if "few-shot" in tasks[task])
    return [
        name
        for name, task in PUBLIC_TASKS.items()
        if name in logged and task.metric != "truthful"
    ]


def response_text(record: JsonObject) -> str:
    """Returns the response of a sample without its end-of-text token."""
    return record["response"].removesuffix(END_OF_TEXT)
