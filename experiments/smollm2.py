"""SmolLM2-135M, a pretrained model, through all stages with LoRA: SFT, a reward model on
people's rankings, PPO-ptx.

Command:   ./scripts/smollm2.sh DATA
           python scripts/experiment.py experiments/smollm2.py:DATA --workdir runs/smollm2    (from the stages on)
Hardware:  two cores, a night (estimated from steps, not run whole); `DATA,hour,bf16_matmul`: an hour on two cores with AMX.
           `bf16_matmul` multiplies in bfloat16, for processors with AMX and for GPUs; `DATA,hour` does without: longer.
Expect:    a reward model that orders held-out pairs better than their length does, and than the same network that was
           never pretrained; PPO raises its score. After `hour`, with an eighth of the comparisons, neither shows yet.
Read it:   the table that it prints, for as many runs as are finished also with --report_only: accuracy on held-out
           pairs of each file with 95% intervals; then the policies side by side.

DATA is a folder with `demos/`, `comparisons/`, `prompts/` and `pretrain/` of .jsonl.gz
files in the schema of README. Prompts are worded by the model's own chat template.
"""

from pathlib import Path
from typing import Any

from instructax.checkpoints.parents import is_finished
from instructax.config import ConfigError, require
from instructax.evals.intervals import Estimate
from instructax.experiment import RunSpec, summary_of

WORDS = ("hour", "bf16_matmul")
SIZE, BASE = "smollm2", "runs/smollm2/pretrain"
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
ZERO = (
    "demos/oasst*",
    "demos/selfinstruct*",
)  # score 0 on average: all of them would be read at every save
# Without a past: the shape of the pretrained network at a sixth of its depth, trained in
# full.
SCRATCH = {
    "parent": "",
    "lora.rank": 0,
    "model.num_layers": 5,
    "optimizer.learning_rate": 3e-4,
    "data.chat": False,
}
HOUR = {
    "sft": {"steps": 12, "epochs": 0.0},
    "reward": {
        "steps": 40,
        "epochs": 0.0,
        "optimizer.learning_rate": 1e-3,
    },  # few steps: 1e-4 learns nothing in 30
    "scratch": {"steps": 40, "epochs": 0.0},
    "ppo-ptx": {"steps": 6},
    "evaluate": {"prompts": 16},
}
RANKINGS = {"from SmolLM2": "ranking", "from scratch": "ranking-scratch"}


def get_runs(arg: str, root: str) -> list[RunSpec]:
    """The runs in order; `arg` is the folder of the data and words of WORDS; `root` is the
    experiment's workdir."""
    folder, *words = arg.split(",")
    for word in words:
        require(
            word in WORDS,
            f"{word!r} must be one of {', '.join(WORDS)}: experiments/smollm2.py:DATA,hour",
        )
    require(
        (Path(BASE) / "summary.json").is_file(),
        f"{BASE} is not there: ./scripts/smollm2.sh puts SmolLM2 into it",
    )
    files = {kind: found(folder, patterns) for kind, patterns in FILES.items()}
    text, comparisons = (
        {"data.text": files["text"]},
        {"data.comparisons": files["comparisons"]},
    )
    zero = {"data.demonstrations": found(folder, ZERO)}
    prompts, common = {"data.prompts": files["prompts"]}, {"data.folder": f"{root}/rows"}
    parents = {"policy_parent": f"{root}/sft", "reward_parent": f"{root}/reward"}
    groups = tuple(
        (Path(file).name.partition(".")[0], (file,)) for file in files["comparisons"]
    )
    measured = {**common, **prompts, "data.demonstrations": (), "reference": "SFT"}
    alone = {**measured, "policies": (("SFT", f"{root}/sft", "plain"),), "data.text": ()}
    alone |= {"prompts": 1, "batch_size": 4, "batches": 10000}
    policies = (
        ("SmolLM2", BASE, "plain"),
        ("SFT", f"{root}/sft", "plain"),
        ("PPO-ptx", f"{root}/ppo-ptx", "plain"),
    )
    short = {
        "data.limits.prompt_tokens": 256,
        "data.limits.response_tokens": 128,
        "data.limits.sequence_tokens": 512,
    }
    every = [
        ("sft", "sft", {**common, **text, "data.demonstrations": files["demonstrations"]}),
        (
            "reward",
            "reward_model",
            {**common, **comparisons, **zero, "parent": f"{root}/sft"},
        ),
        (
            "ranking",
            "evaluate",
            {**alone, "data.comparisons": groups, "reward_parent": f"{root}/reward"},
        ),
        ("scratch", "reward_model", {**common, **comparisons, **zero, **SCRATCH}),
        (
            "ranking-scratch",
            "evaluate",
            {
                **alone,
                "data.comparisons": groups,
                "reward_parent": f"{root}/scratch",
                "data.chat": False,
            }
            | {"reward_model.num_layers": SCRATCH["model.num_layers"]},
        ),
        ("ppo-ptx", "ppo", {**common, **text, **prompts, **parents}),
        (
            "evaluate",
            "evaluate",
            {**measured, **text, **short, "data.comparisons": (), "policies": policies}
            | {
                "reward_parent": f"{root}/reward",
                "prompts": 128,
                "batch_size": 16,
                "batches": 4,
            },
        ),
    ]
    changes: dict[str, Any] = HOUR if "hour" in words else {}
    mixed: dict[str, Any] = (
        {"compute.dtype": "bf16_matmul"} if "bf16_matmul" in words else {}
    )
    rounded: dict[str, Any] = (
        {"tolerance": 0.03} if mixed else {}
    )  # the sampler's products stay in float32
    return [
        RunSpec(
            name,
            f"configs/{stage}.py:{SIZE}",
            {
                **values,
                **mixed,
                **(rounded if stage == "ppo" else {}),
                **changes.get(name, {}),
            },
        )
        for name, stage, values in every
    ]


def found(folder: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The files of `folder` that match. Raises ConfigError for a pattern that none does."""
    files = []
    for pattern in patterns:
        matching = sorted(Path(folder).glob(f"{pattern}.jsonl.gz"))
        if not matching:
            raise ConfigError(
                f"{folder!r} has no {pattern}.jsonl.gz: give experiments/smollm2.py:DATA"
            )
        files += map(str, matching)
    return tuple(files)


def report(root: Path) -> None:
    """Prints the rankings and the policies of the runs that are finished."""
    print(
        rankings(
            {
                name: summary_of(root / run)
                for name, run in RANKINGS.items()
                if is_finished(root / run)
            }
        )
    )
    if is_finished(root / "evaluate"):
        for name, figures in summary_of(root / "evaluate")["policies"].items():
            print(
                f"{name:<8}"
                + "".join(
                    f"  {figure} {Estimate(**x)}" for figure, x in sorted(figures.items())
                )
            )


def rankings(summaries: dict[str, dict[str, Any]]) -> str:
    """A line for each file: its held-out pairs, the share of them that length orders
    rightly, and that each reward model does, with 95% intervals."""
    lines = [
        "held-out pairs ordered rightly",
        f"{'file':<32}{'pairs':>6}  {'the longer one':<22}",
    ]
    lines[1] += "".join(f"  {name:<22}" for name in summaries)
    for file in next(iter(summaries.values()), {}).get("reward_model", {}):
        own = [summary["reward_model"][file] for summary in summaries.values()]
        shares = [own[0]["longer_wins"], *(ranking["accuracy"] for ranking in own)]
        lines.append(
            f"{file:<32}{own[0]['pairs']:>6}"
            + "".join(f"  {Estimate(**share)!s:<22}" for share in shares)
        )
    return "\n".join(lines) if summaries else "no reward model is ranked yet"
