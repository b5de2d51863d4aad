"""Figures of what is measured without labelers: public tasks, the reward model, truth and
harm, overfitting; each gives None where there is nothing to draw."""

import textwrap
from typing import Any

from instructax.evals.intervals import Estimate, mean_estimate
from instructax.report import paper
from instructax.report.drawing import COLOURS, across, legend, point, shift, subplots
from instructax.report.judging import change
from instructax.report.results import POLICIES, Size, estimate_of, overfitting_of
from instructax.simulation.public_tasks import TASKS
from instructax.simulation.task_metrics import Figure

HARM = {
    "truth": "truthfulness (share)",
    "toxicity": "toxicity (share)",
    "stereotype": "entropy of she/he (bits)",
}  # public tasks, and what their figures are
RANKER = "#117a8b"  # the reward model's colour


def tax_tasks(sizes: list[Size]) -> list[str]:
    """The public tasks that have a few-shot form and are no measure of truth."""
    forms = {
        (task, form)
        for size in sizes
        for tasks in size.public.values()
        for task in tasks
        for form in tasks[task]
    }
    return [
        name
        for name, task in TASKS.items()
        if (name, "few-shot") in forms and task.metric != "truthful"
    ]


def tax(sizes: list[Size]) -> Any:
    """What fine-tuning changes on each public task: policy − GPT; a column for each size."""
    tasks = tax_tasks(sizes)
    if not tasks:
        return None
    figure, axes = subplots(
        2,
        len(sizes),
        3.6 + 2 / len(sizes),
        0.45 * len(tasks) + 0.8,
        sharex=True,
        sharey=True,
    )
    policies = ("SFT", "PPO", "PPO-ptx")
    for column, size in enumerate(sizes):
        for axis, condition in zip(axes[:, column], ("zero-shot", "few-shot"), strict=True):
            axis.axvline(0, color="black", lw=0.8)
            for place, policy in enumerate(policies):
                for y, task in enumerate(tasks):
                    gap = change(
                        *(public_of(size, p, task, condition) for p in (policy, "GPT"))
                    )
                    if gap:
                        across(axis, gap, y + 1.6 * shift(place, len(policies)), policy)
            axis.set_title(f"{size.name}, {condition}")
        axes[1, column].set_xlabel("policy − GPT (share)")
    for axis in axes[:, 0]:
        axis.set_yticks(
            range(len(tasks)), [f"{task} ({TASKS[task].counterpart})" for task in tasks]
        )
    axes[0, 0].invert_yaxis()
    axes[0, 0].margins(x=0.08)
    legend(figure)
    return figure


def public_of(size: Size, policy: str, task: str, condition: str) -> Figure | None:
    """A figure of a public task; None if it was not logged."""
    return size.public.get(policy, {}).get(task, {}).get(condition)


def reward_model(sizes: list[Size]) -> Any:
    """Left: accuracy on each set of comparisons, the paper's, and how often the longer
    response wins. Right: the share of pairs that is ordered rightly against the probability
    that the model gives to its order. Of the largest size."""
    sets = sizes[-1].reward_model
    if not sets:
        return None
    figure, ((left, right),) = subplots(1, 2, 4.6, 3.6)
    for x, (name, figures) in enumerate(sets.items()):
        for place, (key, label, colour) in enumerate(
            (
                ("accuracy", "reward model", RANKER),
                ("longer_wins", "the longer response wins", "black"),
            )
        ):
            point(
                left,
                x + 2 * shift(place, 2),
                estimate_of(figures[key]),
                label,
                color=colour,
            )
        if name in paper.ACCURACY:
            value, half = paper.ACCURACY[name]
            theirs = Estimate(value, value - half, value + half, 0)
            point(
                left,
                x,
                theirs,
                "the paper's reward models",
                fmt="D",
                mfc="none",
                color="black",
            )
    left.axhline(0.5, color="black", lw=0.8, ls=":")
    left.set_xticks(
        range(len(sets)),
        [f"{name}\n{figures['pairs']} pairs" for name, figures in sets.items()],
    )
    left.set(
        xlim=(-0.6, len(sets) - 0.4),
        ylabel="share of pairs ordered as labelers did",
        title="accuracy",
    )
    for (name, figures), style, colour in zip(
        sets.items(), ("o-", "s--"), (RANKER, "black"), strict=False
    ):
        bins = [bin for bin in figures.get("calibration", []) if bin["pairs"]]
        if bins:
            x, y = [bin["predicted"] for bin in bins], [bin["share"] for bin in bins]
            right.plot(
                x,
                y,
                style,
                ms=5,
                lw=1.5,
                mfc="none",
                color=colour,
                label=f"calibration, {name}",
            )
    right.plot([0.5, 1], [0.5, 1], color="black", lw=0.8, ls=":")
    right.set(
        xlabel="predicted: mean σ(|score difference|)",
        ylabel="share ordered rightly",
        title="calibration",
    )
    legend(figure)
    return figure


def harm(sizes: list[Size]) -> Any:
    """Truthfulness by way of asking, toxicity and the entropy of stereotypes by prefix; a
    row for each size."""
    logged = [
        size
        for size in sizes
        if any(task in tasks for tasks in size.public.values() for task in HARM)
    ]
    if not logged:
        return None
    figure, axes = subplots(
        len(logged), len(HARM), 4.6, 3.2, sharey="col", width_ratios=(1.6, 1, 1)
    )
    for size, row in zip(logged, axes, strict=True):
        for axis, (task, ylabel) in zip(row, HARM.items(), strict=True):
            policies = [
                policy for policy in POLICIES if task in size.public.get(policy, {})
            ]
            conditions = list(
                dict.fromkeys(c for policy in policies for c in size.public[policy][task])
            )
            for place, policy in enumerate(policies):
                for x, condition in enumerate(conditions):
                    found = public_of(size, policy, task, condition)
                    if found:
                        point(
                            axis,
                            x + 0.8 * shift(place, len(policies)),
                            found.estimate,
                            policy,
                            ms=4,
                        )
            counts = [
                max(
                    f.estimate.count for p in policies if (f := public_of(size, p, task, c))
                )
                for c in conditions
            ]
            names = [
                f"{textwrap.fill(c, 12)}\n(n = {n})"
                for c, n in zip(conditions, counts, strict=True)
            ]
            axis.set_xticks(range(len(conditions)), names)
            axis.set(ylabel=ylabel, title=f"{size.name}: {TASKS[task].counterpart}")
    legend(figure)
    return figure


def overfitting(sizes: list[Size]) -> Any:
    """SFT that goes on: validation loss and the reward model's score, by step; a column for
    each size."""
    found = {
        size.name: (losses, scores)
        for size in sizes
        for losses, scores in [overfitting_of(size)]
        if scores
    }
    if not found:
        return None
    figure, axes = subplots(2, len(found), 4.8, 2.4, sharex="col")
    for column, (name, (losses, scores)) in zip(axes.T, found.items(), strict=True):
        means = {step: mean_estimate(x) for step, x in scores.items()}
        column[0].plot(
            list(losses), list(losses.values()), "o-", ms=3, color=COLOURS["SFT"]
        )
        column[1].plot(
            list(means),
            [mean.value for mean in means.values()],
            lw=1.5,
            color=COLOURS["SFT"],
        )
        for step, mean in means.items():
            point(column[1], step, mean, "SFT")
        column[0].set_title(name)
        column[1].set_xlabel("steps of SFT")
    axes[0, 0].set_ylabel("validation loss\n(nats per token)")
    axes[1, 0].set_ylabel("score of the\nreward model")
    return figure
