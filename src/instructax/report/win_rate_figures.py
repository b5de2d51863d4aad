"""Figures of win rates and grades by model size, next to the figures in the paper."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from instructax.evals.intervals import Estimate
from instructax.report import paper_values
from instructax.report.drawing import (
    COLORS,
    add_legend,
    dodge,
    draw_point,
    rotate_labels,
    subplots,
)
from instructax.report.judging import (
    HELD_OUT_GROUP,
    TRAINING_GROUP,
    JudgedExperiment,
    win_rate_estimate,
)
from instructax.report.paper_values import PolicyTable
from instructax.report.results import POLICIES, SizeResults, format_parameter_count

GROUP_TITLES = {
    TRAINING_GROUP: "training labelers",
    HELD_OUT_GROUP: "held-out labelers",
}

# The paper's figure 3, by distribution of the prompts and group of labelers.
PAPER_WIN_RATES = {
    ("InstructGPT", TRAINING_GROUP): paper_values.WIN_RATES,
    ("InstructGPT", HELD_OUT_GROUP): paper_values.HELD_OUT_WIN_RATES,
    ("GPT-3", TRAINING_GROUP): paper_values.GPT_WIN_RATES,
    ("GPT-3", HELD_OUT_GROUP): paper_values.HELD_OUT_GPT_WIN_RATES,
}

Metric = Callable[[JudgedExperiment, str, str], Estimate | None]  # of (seed, size, policy)


def plot_metric_by_size(
    experiments: list[JudgedExperiment],
    metric: Metric,
    ylabel: str,
    paper_table: PolicyTable | None,
) -> Any:
    """Draws a metric by size and policy.

    Args:
      experiments: the seeds of one experiment.
      metric: returns the estimate of (seed, size, policy); None if there is no such policy.
      ylabel: label of the vertical axis.
      paper_table: the paper's values, drawn next to ours on the same vertical axis.
    """
    # Our values on the left, the paper's on the right.
    num_columns = 1 if paper_table is None else 2
    figure, axes = subplots(1, num_columns, 5, 4, sharey=True)

    _draw_measured(axes[0, 0], experiments, metric)
    title = "here"
    if len(experiments) > 1:
        title = f"here, {len(experiments)} seeds and their mean"
    axes[0, 0].set(ylabel=ylabel, title=title)

    if paper_table is not None:
        _draw_published(axes[0, 1], paper_table)
        axes[0, 1].set_title("the paper")
    add_legend(figure)
    return figure


def plot_win_rates(experiments: list[JudgedExperiment]) -> Any:
    """Draws the paper's figure 3: win rates against SFT of the largest size.

    There is a row for each evaluated distribution of prompts, and two columns for each
    group of labelers: our win rates and the paper's.
    """
    # Distribution of the prompts → the seeds that were evaluated on it.
    rows = {"InstructGPT": experiments}
    on_gpt_prompts = []
    for judged in experiments:
        if judged.on_gpt_prompts is not None:
            on_gpt_prompts.append(judged.on_gpt_prompts)
    if on_gpt_prompts:
        rows["GPT-3"] = on_gpt_prompts

    figure, axes = subplots(len(rows), 2 * len(GROUP_TITLES), 3.2, 3.1, sharey=True)
    # Columns: training labelers, here and in the paper; held-out labelers, likewise.
    for row, (distribution, evaluated) in enumerate(rows.items()):
        for column, (group, title) in enumerate(GROUP_TITLES.items()):
            ours = axes[row, 2 * column]
            _draw_measured(ours, evaluated, partial(win_rate_estimate, by=group))
            ours.set_title(f"{title}, here")

            theirs = axes[row, 2 * column + 1]
            _draw_published(theirs, PAPER_WIN_RATES[distribution, group])
            theirs.set_title(f"{title}, the paper")
        axes[row, 0].set_ylabel(f"{distribution} prompts:\nwin rate")
    add_legend(figure)
    return figure


def _draw_measured(axis: Any, experiments: list[JudgedExperiment], metric: Metric) -> None:
    """Draws a metric by size and policy, or by policy if there is only one size.

    Of several seeds each is a thin line, and their mean is a thick line without error bars:
    each seed is a different world, and the spread between seeds is not covered by the
    per-seed intervals.
    """
    # All seeds have the same sizes.
    sizes = experiments[0].results.sizes
    lines_by_policy = _measured_lines(experiments, metric)
    shown = list(lines_by_policy)
    for place, (policy, (places, lines)) in enumerate(lines_by_policy.items()):
        if len(sizes) > 1:
            # Lines of policies are drawn slightly apart, so that error bars do not overlap.
            x = np.array(places) + dodge(place, len(shown)) / 3
        else:
            # With one size each policy has its own place on the axis.
            x = np.array(places) + place

        if len(lines) == 1:
            _draw_line(axis, x, lines[0], policy)
            continue
        values = _values(lines)  # [seeds, sizes]
        for seed_values in values:
            axis.plot(x, seed_values, "-", lw=0.7, alpha=0.6, color=COLORS[policy])
        # An infinite interval is not drawn.
        means = []
        for mean in np.mean(values, axis=0):
            means.append(Estimate(float(mean), -np.inf, np.inf, len(lines)))
        _draw_line(axis, x, means, policy)

    if len(sizes) > 1:
        _label_sizes(axis, [_size_label(size) for size in sizes])
    else:
        rotate_labels(axis, shown)
        axis.set(xlabel=f"{format_parameter_count(sizes[0].num_parameters)} parameters")


def _measured_lines(
    experiments: list[JudgedExperiment], metric: Metric
) -> dict[str, tuple[list[int], list[list[Estimate]]]]:
    """Returns policy → (places of the sizes, one line of estimates for each seed).

    A size is left out if any seed lacks the policy there.
    """
    sizes = experiments[0].results.sizes
    lines_by_policy = {}
    for policy in POLICIES:
        places = []
        lines: list[list[Estimate]] = [[] for _ in experiments]
        for place, size in enumerate(sizes):
            estimates = [metric(judged, size.name, policy) for judged in experiments]
            # A mean over some of the seeds would not be comparable between policies.
            found = [estimate for estimate in estimates if estimate is not None]
            if len(found) < len(experiments):
                continue
            places.append(place)
            for line, estimate in zip(lines, found, strict=True):
                line.append(estimate)
        if places:
            lines_by_policy[policy] = (places, lines)
    return lines_by_policy


def _values(lines: list[list[Estimate]]) -> np.ndarray:
    """Returns the values of all estimates as an array."""
    values = []
    for line in lines:
        values.append([estimate.value for estimate in line])
    return np.array(values)


def _draw_published(axis: Any, table: PolicyTable) -> None:
    """Draws a table of the paper the way the paper does."""
    for place, (policy, row) in enumerate(table.items()):
        # The paper does not state how many prompts are behind each point.
        estimates = [Estimate(*values, count=0) for values in row]
        x = np.arange(len(row)) + dodge(place, len(POLICIES)) / 3
        _draw_line(axis, x, estimates, policy)
    _label_sizes(axis, list(paper_values.SIZES))


def _draw_line(axis: Any, x: np.ndarray, estimates: list[Estimate], policy: str) -> None:
    # The line first: points and error bars are drawn over it.
    values = [estimate.value for estimate in estimates]
    axis.plot(x, values, "-", lw=2, color=COLORS[policy])
    for position, estimate in zip(x, estimates, strict=True):
        draw_point(axis, float(position), estimate, policy)


def _size_label(size: SizeResults) -> str:
    return f"{size.name}\n{format_parameter_count(size.num_parameters)}"


def _label_sizes(axis: Any, labels: list[str]) -> None:
    axis.set_xticks(range(len(labels)), labels)
    axis.set(xlim=(-0.6, len(labels) - 0.4), xlabel="parameters")
