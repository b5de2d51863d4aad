"""SmolLM2-135M, a pretrained model, through all stages with LoRA.

The stages are SFT, a reward model trained on human rankings, and PPO-ptx.

Command:   ./scripts/smollm2.sh DATA
           or, once SmolLM2 is imported:
           python scripts/experiment.py experiments/smollm2.py:DATA --workdir runs/smollm2
Hardware:  two cores, one night (estimated from single steps; never run in full).
           `DATA,hour,bf16_matmul`: one hour on two cores with AMX. `bf16_matmul`
           multiplies in bfloat16, for CPUs with AMX and for GPUs; without it, `DATA,hour`
           takes longer.
Expect:    a reward model that ranks validation pairs better than a preference for the
           longer response does, and better than a smaller network without pretraining. PPO
           raises the score. With `hour`, which uses an eighth of the comparisons, neither
           result is visible yet.
Read it:   the printed table has the accuracy on the validation pairs of each file with 95%
           intervals, followed by the metrics of the policies. With --report_only it covers
           the runs that are finished.

DATA is a folder with `demos/`, `comparisons/`, `prompts/` and `pretrain/`, which contain
.jsonl.gz files in the schema of `docs/data.md`. FILES lists the names that are read.
Prompts use the model's own chat template.
"""

from pathlib import Path
from typing import Any

from configs import ppo

from instructax.checkpoints.parents import is_finished
from instructax.config import require
from instructax.evals.intervals import Estimate
from instructax.experiment import RunSpec, find_files
from instructax.runtime.metric_log import read_summary

# What may follow the folder of the data.
VARIANTS = ("hour", "bf16_matmul")
SIZE = "smollm2"
# The workdir of the imported model.
BASE = "runs/smollm2/pretrain"

# Kind of data -> patterns of its files in DATA, without .jsonl.gz.
FILES = {
    "text": ("pretrain/wikipedia*",),
    "demonstrations": (
        "demos/asqa*",
        "demos/dolly*",
        "demos/gsm8k*",
        "demos/oasst*",
        "demos/selfinstruct*",
    ),
    "comparisons": (
        "comparisons/hh_*",
        "comparisons/oasst_kwise*",
        "comparisons/qa_feedback*",
    ),
    "prompts": ("prompts/*",),
}
# Demonstrations whose mean score is set to 0. Two files are enough: all their records are
# scored at every checkpoint.
CENTERING_FILES = ("demos/oasst*", "demos/selfinstruct*")

# The reward model without pretraining: the shape of SmolLM2 with a sixth of its layers, all
# parameters trained.
FROM_SCRATCH = {
    "parent": "",
    "lora.rank": 0,
    "model.num_layers": 5,
    "optimizer.learning_rate": 3e-4,
    "data.chat": False,
}

# Run -> overrides of the variant `hour`.
HOUR = {
    "sft": {"steps": 12, "epochs": 0.0},
    # With so few steps, a learning rate of 1e-4 learns nothing.
    "reward": {"steps": 40, "epochs": 0.0, "optimizer.learning_rate": 1e-3},
    "scratch": {"steps": 40, "epochs": 0.0},
    "ppo-ptx": {"steps": 6},
    "evaluate": {"prompts": 16},
}
# Column of the printed table -> workdir of the ranking evaluation.
RANKING_RUNS = {"from SmolLM2": "ranking", "from scratch": "ranking-scratch"}


def get_runs(arg: str, root: str) -> list[RunSpec]:
    """Returns the runs in order.

    Args:
      arg: the folder with the data, followed by any of VARIANTS: `DATA,hour`.
      root: the workdir of the experiment.
    """
    folder, *variants = arg.split(",")
    for variant in variants:
        require(
            variant in VARIANTS,
            f"{variant!r} must be one of {', '.join(VARIANTS)}: "
            "experiments/smollm2.py:DATA,hour",
        )
    require(
        (Path(BASE) / "summary.json").is_file(),
        f"{BASE} does not exist: ./scripts/smollm2.sh imports SmolLM2 there",
    )

    runs = [
        *training_runs(folder, root),
        *ranking_runs(folder, root),
        evaluation_run(folder, root),
    ]
    by_name = {run.name: run for run in runs}
    order = (
        "sft",
        "reward",
        "ranking",
        "scratch",
        "ranking-scratch",
        "ppo-ptx",
        "evaluate",
    )
    return [with_variants(by_name[name], variants) for name in order]


def training_runs(folder: str, root: str) -> list[RunSpec]:
    """Returns the runs of SFT, both reward models and PPO-ptx."""
    common = {"data.folder": f"{root}/rows"}
    text = {"data.text": all_files(folder, FILES["text"])}
    comparisons = {
        "data.comparisons": all_files(folder, FILES["comparisons"]),
        "data.demonstrations": all_files(folder, CENTERING_FILES),
    }

    sft = {
        **common,
        **text,
        "data.demonstrations": all_files(folder, FILES["demonstrations"]),
    }
    reward = {**common, **comparisons, "parent": f"{root}/sft"}
    scratch = {**common, **comparisons, **FROM_SCRATCH}
    ppo = {
        **common,
        **text,
        "data.prompts": all_files(folder, FILES["prompts"]),
        "policy_parent": f"{root}/sft",
        "reward_parent": f"{root}/reward",
    }
    return [
        RunSpec("sft", f"configs/sft.py:{SIZE}", sft),
        RunSpec("reward", f"configs/reward_model.py:{SIZE}", reward),
        RunSpec("scratch", f"configs/reward_model.py:{SIZE}", scratch),
        RunSpec("ppo-ptx", f"configs/ppo.py:{SIZE}", ppo),
    ]


def evaluated(folder: str, root: str) -> dict[str, Any]:
    """Returns the overrides of all evaluations."""
    return {
        "data.folder": f"{root}/rows",
        "data.prompts": all_files(folder, FILES["prompts"]),
        "data.demonstrations": (),
        "reference": "SFT",
    }


def ranking_runs(folder: str, root: str) -> list[RunSpec]:
    """Returns the runs that rank validation comparisons with both reward models."""
    comparisons = all_files(folder, FILES["comparisons"])
    # Accuracy on the pairs of each file; the policies answer a single prompt.
    ranking = {
        **evaluated(folder, root),
        "policies": (("SFT", f"{root}/sft", "plain"),),
        "data.text": (),
        "data.comparisons": tuple(
            (Path(file).name.partition(".")[0], (file,)) for file in comparisons
        ),
        "prompts": 1,
        "batch_size": 4,
        "batches": 10000,
    }
    ranking_scratch = {
        **ranking,
        "reward_parent": f"{root}/scratch",
        "data.chat": False,
        "reward_model.num_layers": FROM_SCRATCH["model.num_layers"],
    }
    config = f"configs/evaluate.py:{SIZE}"
    return [
        RunSpec("ranking", config, {**ranking, "reward_parent": f"{root}/reward"}),
        RunSpec("ranking-scratch", config, ranking_scratch),
    ]


def evaluation_run(folder: str, root: str) -> RunSpec:
    """Returns the run that compares the policies."""
    lengths = ppo.LENGTHS[SIZE]._asdict()
    overrides = {
        **evaluated(folder, root),
        "data.text": all_files(folder, FILES["text"]),
        # Those of PPO: responses are sampled from three policies.
        **{f"data.limits.{name}": tokens for name, tokens in lengths.items()},
        "data.comparisons": (),
        "policies": (
            ("SmolLM2", BASE, "plain"),
            ("SFT", f"{root}/sft", "plain"),
            ("PPO-ptx", f"{root}/ppo-ptx", "plain"),
        ),
        "reward_parent": f"{root}/reward",
        "prompts": 128,
        "batch_size": 16,
        "batches": 4,
    }
    return RunSpec("evaluate", f"configs/evaluate.py:{SIZE}", overrides)


def with_variants(run: RunSpec, variants: list[str]) -> RunSpec:
    """Returns `run` with the overrides of the chosen variants."""
    overrides = dict(run.overrides)
    if "bf16_matmul" in variants:
        overrides["compute.dtype"] = "bf16_matmul"
        if run.name == "ppo-ptx":
            # The sampler multiplies in float32, so log-probabilities differ a little.
            overrides["tolerance"] = ppo.TOLERANCES["bf16_matmul"]
    if "hour" in variants:
        overrides.update(HOUR.get(run.name, {}))
    return RunSpec(run.name, run.config, overrides)


def all_files(folder: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the files of `folder` that match `patterns`, each of which must match."""
    files: list[str] = []
    for pattern in patterns:
        files += find_files(folder, (pattern,))
    return tuple(files)


def report(root: Path) -> None:
    """Prints the rankings and the policies of the runs that are finished."""
    summaries = {}
    for name, run in RANKING_RUNS.items():
        if is_finished(root / run):
            summaries[name] = read_summary(root / run)
    print(ranking_table(summaries))

    if is_finished(root / "evaluate"):
        for name, metrics in read_summary(root / "evaluate")["policies"].items():
            line = f"{name:<8}"
            for metric, value in sorted(metrics.items()):
                line += f"  {metric} {Estimate(**value)}"
            print(line)


def ranking_table(summaries: dict[str, dict[str, Any]]) -> str:
    """Formats a table with a line for each file of comparisons.

    Its columns are the number of validation pairs, the share of pairs whose longer response
    is the better one, and the accuracy of each reward model, with 95% intervals.

    Args:
      summaries: name of a reward model -> summary of its evaluation.
    """
    if not summaries:
        return "no reward model is ranked yet"

    header = f"{'file':<32}{'pairs':>6}  {'the longer one':<22}"
    for name in summaries:
        header += f"  {name:<22}"
    lines = ["held-out pairs ordered correctly", header]

    reward_models = [summary["reward_model"] for summary in summaries.values()]
    for file, first in reward_models[0].items():
        line = f"{file:<32}{first['pairs']:>6}"
        line += f"  {Estimate(**first['longer_wins'])!s:<22}"
        for rankings in reward_models:
            line += f"  {Estimate(**rankings[file]['accuracy'])!s:<22}"
        lines.append(line)
    return "\n".join(lines)
