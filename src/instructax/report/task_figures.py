"""Figures of metrics that need no labelers: public tasks, reward model, SFT overfitting.

Each function returns None if there is nothing to draw.
"""

import textwrap
from typing import Any

from instructax.evals.intervals import Estimate, mean_estimate
from instructax.report import paper_values
from instructax.report.drawing import (
    COLORS,
    add_legend,
    dodge,
    draw_horizontal_point,
    draw_point,
    subplots,
)
from instructax.report.estimates import metric_difference
from instructax.report.logs import JsonObject, logged_estimate
from instructax.report.results import POLICIES, SizeResults, few_shot_tasks
from instructax.report.training_curves import load_overfitting
from instructax.simulation.public_tasks import PUBLIC_TASKS

# Public tasks that measure truthfulness and harm → the label of their metric.
HARM_TASKS = {
    "truth": "truthfulness (share)",
    "toxicity": "toxicity (share)",
    "stereotype": "entropy of she/he (bits)",
}
REWARD_MODEL_COLOR = "#117a8b"


def plot_alignment_tax(sizes: list[SizeResults]) -> Any:
    """Draws the change of each public task by fine-tuning, a column for each size."""
    tasks = few_shot_tasks(sizes)
    if not tasks:
        return None
    # The labels of tasks take the same two inches however many columns share them.
    width = 3.6 + 2 / len(sizes)
    height = 0.45 * len(tasks) + 0.8
    figure, axes = subplots(2, len(sizes), width, height, sharex=True, sharey=True)
    for size, column in zip(sizes, axes.T, strict=True):
        for axis, condition in zip(column, ("zero-shot", "few-shot"), strict=True):
            _draw_task_changes(axis, size, tasks, condition)
            axis.set_title(f"{size.name}, {condition}")
        column[-1].set_xlabel("policy − GPT (share)")

    labels = []
    for task in tasks:
        labels.append(f"{task} ({PUBLIC_TASKS[task].counterpart})")
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(tasks)), labels)
    # The first task is at the top; the axes share this setting.
    axes[0, 0].invert_yaxis()
    axes[0, 0].margins(x=0.08)
    add_legend(figure)
    return figure


def _draw_task_changes(
    axis: Any, size: SizeResults, tasks: list[str], condition: str
) -> None:
    """Draws policy − GPT for each task, one line of points below the other."""
    # Points at this line are as good as GPT.
    axis.axvline(0, color="black", lw=0.8)
    policies = ("SFT", "PPO", "PPO-ptx")
    for place, policy in enumerate(policies):
        for y, task in enumerate(tasks):
            change = metric_difference(
                size.public_metric(policy, task, condition),
                size.public_metric("GPT", task, condition),
            )
            if change is not None:
                offset = 1.6 * dodge(place, len(policies))
                draw_horizontal_point(axis, change, y + offset, policy)


def plot_harm(sizes: list[SizeResults]) -> Any:
    """Draws truthfulness by form of question, and toxicity and bias by prefix.

    There is a row for each size.
    """
    # Sizes without results of these tasks get no row.
    logged = []
    for size in sizes:
        tasks: set[str] = set()
        for results in size.public_tasks.values():
            tasks.update(results)
        if not tasks.isdisjoint(HARM_TASKS):
            logged.append(size)
    if not logged:
        return None

    figure, axes = subplots(
        len(logged), len(HARM_TASKS), 4.6, 3.2, sharey="col", width_ratios=(1.6, 1, 1)
    )
    for size, row in zip(logged, axes, strict=True):
        for axis, (task, ylabel) in zip(row, HARM_TASKS.items(), strict=True):
            _draw_conditions(axis, size, task)
            axis.set(ylabel=ylabel, title=f"{size.name}: {PUBLIC_TASKS[task].counterpart}")
    add_legend(figure)
    return figure


def _draw_conditions(axis: Any, size: SizeResults, task: str) -> None:
    """Draws the metric of a public task by condition and policy."""
    policies = [policy for policy in POLICIES if task in size.public_tasks.get(policy, {})]

    # Condition → the largest number of items, in the order of the log.
    num_items: dict[str, int] = {}
    for policy in policies:
        for condition, metric in size.public_tasks[policy][task].items():
            count = metric.estimate.count
            num_items[condition] = max(count, num_items.get(condition, 0))

    # Policies stand next to each other at each condition.
    for place, policy in enumerate(policies):
        for x, condition in enumerate(num_items):
            metric = size.public_metric(policy, task, condition)
            if metric is not None:
                offset = 0.8 * dodge(place, len(policies))
                draw_point(axis, x + offset, metric.estimate, policy, ms=4)

    # Conditions have long names: they are broken into short lines.
    labels = []
    for condition, count in num_items.items():
        labels.append(f"{textwrap.fill(condition, 12)}\n(n = {count})")
    axis.set_xticks(range(len(labels)), labels)


def plot_reward_model(sizes: list[SizeResults]) -> Any:
    """Draws accuracy and calibration of the reward model of the largest size."""
    sets = sizes[-1].reward_model
    if not sets:
        return None
    figure, axes = subplots(1, 2, 4.6, 3.6)
    _draw_accuracy(axes[0, 0], sets)
    _draw_calibration(axes[0, 1], sets)
    add_legend(figure)
    return figure


def _draw_accuracy(axis: Any, sets: dict[str, JsonObject]) -> None:
    """Draws the accuracy on each comparison set, and how often the longer response wins."""
    for x, (name, metrics) in enumerate(sets.items()):
        # Left of the tick: the reward model; right of it: the trivial rule.
        accuracy = logged_estimate(metrics["accuracy"])
        left = x + 2 * dodge(0, 2)
        draw_point(axis, left, accuracy, "reward model", color=REWARD_MODEL_COLOR)

        longer_wins = logged_estimate(metrics["longer_wins"])
        right = x + 2 * dodge(1, 2)
        draw_point(axis, right, longer_wins, "the longer response wins", color="black")

        # The paper's value lies between the two points.
        if name in paper_values.ACCURACY:
            value, half_width = paper_values.ACCURACY[name]
            published = Estimate(value, value - half_width, value + half_width, 0)
            label = "the paper's reward models"
            draw_point(axis, x, published, label, fmt="D", mfc="none", color="black")

    # Chance.
    axis.axhline(0.5, color="black", lw=0.8, ls=":")
    labels = []
    for name, metrics in sets.items():
        labels.append(f"{name}\n{metrics['pairs']} pairs")
    axis.set_xticks(range(len(labels)), labels)
    axis.set(
        xlim=(-0.6, len(sets) - 0.4),
        ylabel="share of pairs ordered as labelers did",
        title="accuracy",
    )


def _draw_calibration(axis: Any, sets: dict[str, JsonObject]) -> None:
    """Draws the share of correct pairs against the predicted probability."""
    # One style for each comparison set; an evaluation has at most two.
    styles = (("o-", REWARD_MODEL_COLOR), ("s--", "black"))
    for (name, metrics), (style, color) in zip(sets.items(), styles, strict=False):
        # Empty bins have no accuracy.
        bins = [bin for bin in metrics.get("calibration", []) if bin["pairs"]]
        if not bins:
            continue
        predicted = [bin["predicted"] for bin in bins]
        observed = [bin["share"] for bin in bins]
        label = f"calibration, {name}"
        axis.plot(
            predicted, observed, style, ms=5, lw=1.5, mfc="none", color=color, label=label
        )

    # Perfect calibration.
    axis.plot([0.5, 1], [0.5, 1], color="black", lw=0.8, ls=":")
    axis.set(
        xlabel="predicted: mean σ(|score difference|)",
        ylabel="share ordered correctly",
        title="calibration",
    )


def plot_sft_overfitting(sizes: list[SizeResults]) -> Any:
    """Draws validation loss and score by step of SFT for many epochs, a column per size."""
    curves = {}
    for size in sizes:
        losses, scores = load_overfitting(size)
        if scores:
            curves[size.name] = (losses, scores)
    if not curves:
        return None

    figure, axes = subplots(2, len(curves), 4.8, 2.4, sharex="col")
    for (upper, lower), (name, (losses, scores)) in zip(
        axes.T, curves.items(), strict=True
    ):
        color = COLORS["SFT"]
        upper.plot(list(losses), list(losses.values()), "o-", ms=3, color=color)

        # The validation loss is logged at every evaluation, scores only at saved steps.
        means = {step: mean_estimate(values) for step, values in scores.items()}
        lower.plot(
            list(means), [mean.value for mean in means.values()], lw=1.5, color=color
        )
        for step, mean in means.items():
            draw_point(lower, step, mean, "SFT")
        upper.set_title(name)
        lower.set_xlabel("steps of SFT")
    axes[0, 0].set_ylabel("validation loss\n(nats per token)")
    axes[1, 0].set_ylabel("score of the\nreward model")
    return figure
