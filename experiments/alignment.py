"""The paper's central claim in small: base < SFT < PPO, and PPO-ptx keeps what pretraining taught (sections 4.1, 4.2).

Command:   python scripts/experiment.py experiments/alignment.py:micro --workdir runs/micro
Hardware:  micro: two cores, five minutes.
Expect:    true reward rises from base to SFT to PPO; the text loss of PPO-ptx stays below PPO's.
Read it:   `policies.png`, left: the reward model's score (proxy) and the true reward of each iteration's samples
           against the square root of their KL from the SFT policy: where the two part, the policy exploits the reward
           model. Right: true reward and text loss of the finished policies, with 95% intervals.

Runs in the embedded world, whose true reward no stage sees: it is computed here, from the responses' text.
"""

from pathlib import Path
from typing import Any

import numpy as np

from instructax.experiment import Run, metrics_of, samples_of, summary_of
from instructax.microworld.judge import judge
from instructax.microworld.labelers import GROUPS
from instructax.microworld.run import tasks_of
from instructax.microworld.tasks import Task
from instructax.statistics import Estimate, mean_estimate, win_rate

POLICIES = {"base": "pretrain", "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ppo-ptx"}
WORLD_SEED = 0
WINDOW = 5  # iterations: of the moving averages that are drawn as lines


def get_runs(size: str, root: str) -> list[Run]:
    """The runs in order; `root` is the experiment's workdir."""
    world, rows = f"{root}/world", {"data.folder": f"{root}/rows"}
    common = {"tokenizer": f"{world}/tokenizer.json", **rows}
    text, prompts = (f"{world}/text.jsonl.gz",), (f"{world}/prompts.jsonl.gz",)
    demonstrations, comparisons = (f"{world}/demonstrations.jsonl.gz",), (f"{world}/comparisons.jsonl.gz",)
    parents = {"policy_parent": f"{root}/sft", "reward_parent": f"{root}/reward"}
    ppo = {**common, **parents, "data.prompts": prompts, "data.text": text}
    return [
        Run("world", f"configs/world.py:{size}", {"seed": WORLD_SEED}),
        Run("pretrain", f"configs/pretrain.py:{size}", {**common, "data.text": text}),
        Run(
            "sft",
            f"configs/sft.py:{size}",
            {**common, "parent": f"{root}/pretrain", "data.text": text, "data.demonstrations": demonstrations},
        ),
        Run(
            "reward",
            f"configs/reward.py:{size}",
            {
                **common,
                "parent": f"{root}/sft",
                "data.comparisons": comparisons,
                "data.demonstrations": demonstrations,
            },
        ),
        Run("ppo", f"configs/ppo.py:{size}", {**ppo, "ptx_coef": 0.0}),
        Run("ppo-ptx", f"configs/ppo.py:{size}", ppo),
        Run(
            "evaluate",
            f"configs/evaluate.py:{size}",
            {
                **common,
                "policies": tuple((name, f"{root}/{folder}") for name, folder in POLICIES.items()),
                "reference": "SFT",
                "reward_parent": f"{root}/reward",
                "data.prompts": prompts,
                "data.text": text,
                "data.comparisons": comparisons,
            },
        ),
    ]


def true_rewards(samples: list[dict[str, Any]], tasks: dict[str, Task]) -> np.ndarray:
    """The world's own judgement of each response, as cautious as the labelers of training data: f[n]."""
    caution, rewards = GROUPS["labeler"].caution, []
    for sample in samples:
        task = tasks[sample["prompt"].strip()]
        rewards.append(judge(task, text_of(sample)).utility(task.harmful, caution))
    return np.array(rewards)


def text_of(sample: dict[str, Any]) -> str:
    """The response without the end token."""
    return sample["response"].removesuffix("<|endoftext|>")


def report(root: Path) -> None:
    """Prints the table, and draws `policies.png` and `policies.svg`."""
    summary = summary_of(root / "evaluate")
    responses = {name: [s for s in samples_of(root / "evaluate") if s["policy"] == name] for name in POLICIES}
    tasks = tasks_of(root / "world")
    truth = {name: true_rewards(samples, tasks) for name, samples in responses.items()}
    rows = []
    for name in POLICIES:
        figures = summary["policies"][name]
        text_loss = Estimate(**figures["text_loss"])
        rows.append(
            (
                name,
                str(mean_estimate(truth[name])),
                str(win_rate(truth[name], truth["SFT"])),
                f"{figures['scores']['value']:.2f}",
                f"{figures['kl']['value']:.2f}",
                str(text_loss),
                f"{figures['ended_share']['value']:.0%}",
            )
        )
    heads = ("policy", "true reward", "win rate against SFT", "proxy score", "KL from SFT", "text loss", "ended")
    print_table(heads, rows)
    ranking = summary["reward_model"]
    print(
        f"reward model, held-out comparisons: accuracy {Estimate(**ranking['accuracy'])}, "
        f"the longer answer wins {Estimate(**ranking['longer_wins'])}, {ranking['pairs']} pairs"
    )
    draw(root, truth, summary, tasks)


def print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Aligned columns on the console; 95% intervals in brackets."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, tuple("-" * width for width in widths), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def draw(root: Path, truth: dict[str, np.ndarray], summary: dict[str, Any], tasks: dict[str, Task]) -> None:
    """The two panels described above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = {"base": "tab:gray", "SFT": "tab:blue", "PPO": "tab:orange", "PPO-ptx": "tab:green"}
    proxy_axis = left.twinx()
    for name in ("PPO", "PPO-ptx"):
        folder = root / POLICIES[name]
        metrics, samples = metrics_of(folder), samples_of(folder)
        steps = np.array([sample["step"] for sample in samples])
        rewards = true_rewards(samples, tasks)
        distance = np.sqrt([max(line["kl"], 0.0) for line in metrics])
        mean = np.array([rewards[steps == line["step"]].mean() for line in metrics])
        proxy = np.array([line["scores"] for line in metrics])
        for axis, figures, mark, style, what in (
            (left, mean, "o", "-", "true reward"),
            (proxy_axis, proxy, "x", "--", "proxy score"),
        ):
            axis.plot(distance, figures, mark, ms=3, alpha=0.5, color=colours[name])
            smooth = [np.convolve(x, np.ones(WINDOW) / WINDOW, "valid") for x in (distance, figures)]
            axis.plot(*smooth, style, lw=1.5, color=colours[name], label=f"{name}, {what}")
    left.set(xlabel="√KL from the SFT policy (√nats)", ylabel="true reward (-1 … 1)")
    proxy_axis.set_ylabel("proxy: the reward model's score")
    lines = [x for x in (*left.get_lines(), *proxy_axis.get_lines()) if not str(x.get_label()).startswith("_")]
    left.legend(lines, [str(line.get_label()) for line in lines], loc="lower right", fontsize=8)
    left.set_title("True and proxy reward during PPO")
    for name in POLICIES:
        loss, reward = summary["policies"][name]["text_loss"], mean_estimate(truth[name])
        errors = {
            "xerr": [[loss["value"] - loss["low"]], [loss["high"] - loss["value"]]],
            "yerr": [[reward.value - reward.low], [reward.high - reward.value]],
        }
        right.errorbar(loss["value"], reward.value, fmt="o", color=colours[name], label=name, capsize=2, **errors)
    right.set(xlabel="loss on held-out text (nats per token)", ylabel="true reward (-1 … 1)")
    right.legend()
    right.set_title("Finished policies, 95% intervals")
    for ending in ("png", "svg"):
        figure.savefig(root / f"policies.{ending}", dpi=150)
    plt.close(figure)
    print(f"figure: {root / 'policies.png'}")
