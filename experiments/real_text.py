"""All stages on real text: a from-scratch model of 4M parameters, pretrained, fine-tuned,
ranked and aligned.

Command:   python scripts/train_tokenizer.py --files DATA/pretrain/gutenberg.jsonl.gz … --field text \\
               --vocab_size 8192 --out runs/real/tokenizer.json
           python scripts/experiment.py experiments/real_text.py:DATA --workdir runs/real
Hardware:  two cores, about an hour.
Expect:    a weak model, but every stage whole: losses fall and the reward rises with the KL. A few thousand real
           comparisons teach a model of this size little: its ranking accuracy is near that of guessing.
Read it:   `runs.png`: held-out loss of pretraining and SFT, ranking accuracy beside "the longer answer wins",
           reward and KL of PPO by iteration.

DATA is a folder with `pretrain/`, `demos/`, `comparisons/` and `prompts/` of .jsonl.gz
files in the schema of README.
"""

from pathlib import Path
from typing import Any

from instructax.config import ConfigError
from instructax.evals.intervals import Estimate
from instructax.experiment import RunSpec, metrics_of, summary_of

SIZE = "small"
FILES = {
    "text": ("pretrain/gutenberg*", "pretrain/wikipedia*", "pretrain/us_presidents*"),
    "demonstrations": ("demos/*",),
    "comparisons": (
        "comparisons/hh_*",
        "comparisons/oasst_kwise*",
        "comparisons/qa_feedback*",
    ),
    "prompts": ("prompts/*",),
}
POLICIES = {"GPT": "pretrain", "SFT": "sft", "PPO-ptx": "ppo-ptx"}


def files_of(folder: str) -> dict[str, tuple[str, ...]]:
    """The files of each kind. Raises ConfigError where there are none."""
    found = {
        kind: tuple(
            str(path)
            for pattern in patterns
            for path in sorted(Path(folder).glob(f"{pattern}.jsonl.gz"))
        )
        for kind, patterns in FILES.items()
    }
    for kind, paths in found.items():
        if not paths:
            raise ConfigError(
                f"{folder!r} has no {kind}: no file like {FILES[kind]}; give experiments/real_text.py:DATA"
            )
    return found


def get_runs(folder: str, root: str) -> list[RunSpec]:
    """The runs in order; `folder` holds the data, `root` is the experiment's workdir."""
    files = files_of(folder)
    text, demonstrations = (
        {"data.text": files["text"]},
        {"data.demonstrations": files["demonstrations"]},
    )
    comparisons, prompts = (
        {"data.comparisons": files["comparisons"]},
        {"data.prompts": files["prompts"]},
    )
    common = {"tokenizer": f"{root}/tokenizer.json", "data.folder": f"{root}/rows"}
    parents = {"policy_parent": f"{root}/sft", "reward_parent": f"{root}/reward"}
    policies = tuple((name, f"{root}/{run}", "plain") for name, run in POLICIES.items())
    return [
        RunSpec("pretrain", f"configs/pretrain.py:{SIZE}", {**common, **text}),
        RunSpec(
            "sft",
            f"configs/sft.py:{SIZE}",
            {**common, **text, **demonstrations, "parent": f"{root}/pretrain"},
        ),
        RunSpec(
            "reward",
            f"configs/reward_model.py:{SIZE}",
            {**common, **comparisons, **demonstrations, "parent": f"{root}/sft"},
        ),
        RunSpec(
            "ppo-ptx", f"configs/ppo.py:{SIZE}", {**common, **parents, **prompts, **text}
        ),
        RunSpec(
            "evaluate",
            f"configs/evaluate.py:{SIZE}",
            {
                **common,
                **prompts,
                **text,
                **demonstrations,
                "data.comparisons": (("people", files["comparisons"]),),
                "policies": policies,
                "reference": "SFT",
                "reward_parent": f"{root}/reward",
            },
        ),
    ]


def report(root: Path) -> None:
    """Prints the figures of the finished policies, and draws `runs.png`."""
    summary = summary_of(root / "evaluate")
    for name, figures in summary["policies"].items():
        print(
            f"{name:<8}"
            + "".join(
                f"  {figure} {Estimate(**value)}"
                for figure, value in sorted(figures.items())
            )
        )
    ranking = summary["reward_model"]["people"]
    print(
        f"reward model, held-out comparisons: accuracy {Estimate(**ranking['accuracy'])}, "
        f"the longer answer wins {Estimate(**ranking['longer_wins'])}, {ranking['pairs']} pairs"
    )
    draw(root, ranking)


def draw(root: Path, ranking: dict[str, Any]) -> None:
    """Three panels: losses, ranking accuracy, PPO."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, accuracy, aligned) = plt.subplots(
        1, 3, figsize=(14, 4), layout="constrained"
    )
    for run, name in (
        ("pretrain", "text_loss"),
        ("sft", "text_loss"),
        ("sft", "demonstrations_loss"),
    ):
        lines = [line for line in metrics_of(root / run) if name in line]
        steps = [line["step"] for line in lines]
        losses.plot(
            steps, [line[name] for line in lines], "o-", ms=3, label=f"{run}: {name}"
        )
    losses.set(
        xlabel="step", ylabel="held-out loss (nats per token)", title="Pretraining and SFT"
    )
    losses.legend()
    for place, name in enumerate(("accuracy", "longer_wins")):
        value = Estimate(**ranking[name])
        accuracy.errorbar(
            place,
            value.value,
            yerr=[[value.value - value.low], [value.high - value.value]],
            fmt="o",
        )
    accuracy.axhline(0.5, color="gray", lw=1)
    accuracy.set_xticks([0, 1], ["reward model", "longer answer"])
    accuracy.set(
        xlim=(-0.5, 1.5),
        ylabel="pairs ordered rightly",
        title="Held-out comparisons, 95% intervals",
    )
    metrics = metrics_of(root / "ppo-ptx")
    steps = [line["step"] for line in metrics]
    aligned.plot(
        steps,
        [line["scores"] for line in metrics],
        "o-",
        ms=3,
        color="tab:green",
        label="score",
    )
    aligned.set(xlabel="iteration", ylabel="reward model's score", title="PPO-ptx")
    distance = aligned.twinx()
    distance.plot(
        steps, [line["kl"] for line in metrics], "x--", ms=4, color="tab:gray", label="KL"
    )
    distance.set_ylabel("KL from SFT (nats per response)")
    aligned.legend([*aligned.get_lines(), *distance.get_lines()], ["score", "KL"])
    figure.savefig(root / "runs.png", dpi=150)
    plt.close(figure)
    print(f"figure: {root / 'runs.png'}")
