"""All stages on real text, from a randomly initialized model with 4M parameters.

Command:   python scripts/train_tokenizer.py --files DATA/pretrain/gutenberg.jsonl.gz … \\
               --field text --vocab_size 8192 --out runs/real/tokenizer.json
           python scripts/experiment.py experiments/real_text.py:DATA --workdir runs/real
Hardware:  two cores, about an hour.
Expect:    a weak model, but every stage works: losses fall, and score and KL rise during
           PPO. The ranking accuracy is close to chance, because a few thousand real
           comparisons are too few for a model of this size.
Read it:   `runs.png` shows the validation losses of pretraining and SFT, the ranking
           accuracy next to that of preferring the longer response, and the score and KL
           of PPO by iteration.

DATA is a folder with `pretrain/`, `demos/`, `comparisons/` and `prompts/`, which contain
.jsonl.gz files in the schema of `docs/data.md`. FILES lists the names that are read.
"""

from pathlib import Path
from typing import Any

from instructax.evals.intervals import Estimate
from instructax.experiment import RunSpec, find_files
from instructax.runtime.metric_log import read_metrics, read_summary

# The argument of every config.
SIZE = "small"
# Kind of data -> patterns of its files in DATA, without .jsonl.gz.
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
# Name of an evaluated policy -> its workdir.
POLICIES = {"GPT": "pretrain", "SFT": "sft", "PPO-ptx": "ppo-ptx"}


def get_runs(folder: str, root: str) -> list[RunSpec]:
    """Returns the runs in order.

    Args:
      folder: the folder with the data.
      root: the workdir of the experiment.
    """
    files = {kind: find_files(folder, patterns) for kind, patterns in FILES.items()}
    common = {"tokenizer": f"{root}/tokenizer.json", "data.folder": f"{root}/rows"}
    text = {"data.text": files["text"]}
    demonstrations = {"data.demonstrations": files["demonstrations"]}
    comparisons = {"data.comparisons": files["comparisons"]}
    prompts = {"data.prompts": files["prompts"]}

    pretrain = {**common, **text}
    sft = {**common, **text, **demonstrations, "parent": f"{root}/pretrain"}
    reward = {**common, **comparisons, **demonstrations, "parent": f"{root}/sft"}
    ppo = {
        **common,
        **prompts,
        **text,
        "policy_parent": f"{root}/sft",
        "reward_parent": f"{root}/reward",
    }
    evaluate = {
        **common,
        **prompts,
        **text,
        **demonstrations,
        "data.comparisons": (("people", files["comparisons"]),),
        "policies": tuple(
            (name, f"{root}/{run}", "plain") for name, run in POLICIES.items()
        ),
        "reference": "SFT",
        "reward_parent": f"{root}/reward",
    }
    return [
        RunSpec("pretrain", f"configs/pretrain.py:{SIZE}", pretrain),
        RunSpec("sft", f"configs/sft.py:{SIZE}", sft),
        RunSpec("reward", f"configs/reward_model.py:{SIZE}", reward),
        RunSpec("ppo-ptx", f"configs/ppo.py:{SIZE}", ppo),
        RunSpec("evaluate", f"configs/evaluate.py:{SIZE}", evaluate),
    ]


def report(root: Path) -> None:
    """Prints the metrics of the finished policies and plots `runs.png`."""
    summary = read_summary(root / "evaluate")
    for name, metrics in summary["policies"].items():
        line = f"{name:<8}"
        for metric, value in sorted(metrics.items()):
            line += f"  {metric} {Estimate(**value)}"
        print(line)

    ranking = summary["reward_model"]["people"]
    print(
        f"reward model, held-out comparisons: accuracy {Estimate(**ranking['accuracy'])}, "
        f"the longer answer wins {Estimate(**ranking['longer_wins'])}, "
        f"{ranking['pairs']} pairs"
    )
    plot(root, ranking)


def plot(root: Path, ranking: dict[str, Any]) -> None:
    """Plots three panels: validation losses, ranking accuracy and PPO."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, accuracy, ppo) = plt.subplots(
        1, 3, figsize=(14, 4), layout="constrained"
    )
    _plot_losses(losses, root)
    _plot_ranking(accuracy, ranking)
    _plot_ppo(ppo, read_metrics(root / "ppo-ptx"))
    figure.savefig(root / "runs.png", dpi=150)
    plt.close(figure)
    print(f"figure: {root / 'runs.png'}")


def _plot_losses(axes: Any, root: Path) -> None:
    curves = (
        ("pretrain", "text_loss"),
        ("sft", "text_loss"),
        ("sft", "demonstrations_loss"),
    )
    for run, metric in curves:
        # Validation losses are logged at some steps only.
        lines = [line for line in read_metrics(root / run) if metric in line]
        steps = [line["step"] for line in lines]
        values = [line[metric] for line in lines]
        axes.plot(steps, values, "o-", ms=3, label=f"{run}: {metric}")
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats per token)",
        title="Pretraining and SFT",
    )
    axes.legend()


def _plot_ranking(axes: Any, ranking: dict[str, Any]) -> None:
    for x, metric in enumerate(("accuracy", "longer_wins")):
        estimate = Estimate(**ranking[metric])
        below = estimate.value - estimate.low
        above = estimate.high - estimate.value
        axes.errorbar(x, estimate.value, yerr=[[below], [above]], fmt="o")
    axes.axhline(0.5, color="gray", lw=1)
    axes.set_xticks([0, 1], ["reward model", "longer response"])
    axes.set(
        xlim=(-0.5, 1.5),
        ylabel="pairs ordered correctly",
        title="Held-out comparisons, 95% intervals",
    )


def _plot_ppo(axes: Any, metrics: list[dict[str, Any]]) -> None:
    steps = [line["step"] for line in metrics]
    scores = [line["scores"] for line in metrics]
    axes.plot(steps, scores, "o-", ms=3, color="tab:green")
    axes.set(xlabel="iteration", ylabel="reward model's score", title="PPO-ptx")

    # The KL has an axis of its own on the right.
    kl_axes = axes.twinx()
    kl_axes.plot(steps, [line["kl"] for line in metrics], "x--", ms=4, color="tab:gray")
    kl_axes.set_ylabel("KL from SFT (nats per response)")
    axes.legend([*axes.get_lines(), *kl_axes.get_lines()], ["score", "KL"])
