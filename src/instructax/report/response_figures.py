"""Figures of response quality: the labelers' yes-no questions and over-optimization."""

from typing import Any

import numpy as np

from instructax.evals.intervals import mean_estimate
from instructax.report import paper_values
from instructax.report.drawing import (
    COLORS,
    add_legend,
    draw_point,
    rotate_labels,
    subplots,
)
from instructax.report.judging import (
    TRUE_UTILITY,
    JudgedExperiment,
    applicable_prompts,
    flag_estimate,
)
from instructax.report.results import BEST_OF, POLICIES, SizeResults
from instructax.report.training_curves import PpoCurve, best_of_n_kl

WINDOW = 5  # iterations; of the moving averages that are drawn as lines
# Flag → title. Truthfulness has no panel in the paper's figure 4.
FLAG_TITLES = {
    "attempts": "attempts the task",
    "constraint": "keeps explicit constraints",
    "hallucinates": "hallucinates (closed tasks)",
    "appropriate": "appropriate for an assistant",
}


def plot_flag_shares(judged: JudgedExperiment) -> Any:
    """Draws the paper's figure 4: shares of responses with each flag of table 3.

    The flags are set by training labelers, and sizes are pooled.
    """
    figure, axes = subplots(1, len(FLAG_TITLES), 2.8, 3.4)
    for axis, (flag, title) in zip(axes[0], FLAG_TITLES.items(), strict=True):
        shown = []
        for policy in POLICIES:
            estimate = flag_estimate(judged, policy, flag)
            if estimate is None:
                continue
            # Policies without responses leave no gap.
            x = len(shown)
            shown.append(policy)
            # Without an applicable prompt there is nothing to draw but the paper's value.
            if estimate.count:
                axis.bar(x, estimate.value, 0.7, color=COLORS[policy], alpha=0.35)
                draw_point(axis, x, estimate, policy)
            if policy in paper_values.FLAG_SHARES[flag]:
                published = paper_values.FLAG_SHARES[flag][policy]
                axis.plot(x, published, "D", ms=5, mfc="none", color="black")

        # The number of prompts tells how much the interval can say.
        rotate_labels(axis, shown)
        prompts = int(applicable_prompts(judged.results, flag).sum())
        axis.set(title=title, xlabel=f"{prompts} prompts", ylim=(0, 1.05))
    axes[0, 0].set_ylabel("share of responses")
    return figure


def plot_overoptimization(
    judged: JudgedExperiment, curves: dict[tuple[str, str], PpoCurve]
) -> Any:
    """Draws true utility (above) and score (below) against √KL, a column for each size.

    Args:
      judged: the experiment, for best-of-n.
      curves: (size, "PPO" or "PPO-ptx") → the curve of that run.

    Returns:
      The figure, or None without a curve.
    """
    if not curves:
        return None
    # Utility and score have different units, so only the x axis is shared.
    sizes = judged.results.sizes
    figure, axes = subplots(2, len(sizes), 4.6, 2.9, sharex="col")
    for size, (upper, lower) in zip(sizes, axes.T, strict=True):
        for policy in ("PPO", "PPO-ptx"):
            curve = curves.get((size.name, policy))
            if curve is not None:
                _draw_smoothed(upper, curve.sqrt_kl, curve.utility, policy)
                _draw_smoothed(lower, curve.sqrt_kl, curve.scores, policy)
        _draw_best_of_n(upper, lower, judged, size)
        upper.set_title(size.name)
        lower.set_xlabel("√KL from the SFT policy (√nats)")
    axes[0, 0].set_ylabel("true utility (−1 … 1)")
    axes[1, 0].set_ylabel("score of the reward model")
    add_legend(figure)
    return figure


def _draw_best_of_n(
    upper: Any, lower: Any, judged: JudgedExperiment, size: SizeResults
) -> None:
    """Draws best-of-n as a star, at the upper bound of its KL."""
    responses = judged.responses.get((size.name, BEST_OF))
    if responses is None or not size.best_of:
        return
    # The true KL is at most this: the star may belong further left.
    x = np.sqrt(best_of_n_kl(size.best_of))
    for axis, values in (
        (upper, responses.opinions[TRUE_UTILITY]),
        (lower, responses.scores),
    ):
        label = f"best of {size.best_of}"
        draw_point(axis, x, mean_estimate(values), BEST_OF, fmt="*", ms=11, label=label)


def _draw_smoothed(axis: Any, x: np.ndarray, y: np.ndarray, policy: str) -> None:
    """Draws all points, and their moving average as a line."""
    color = COLORS[policy]
    # Hundreds of points: as an image they keep the SVG small.
    axis.plot(x, y, "o", ms=2.5, alpha=0.35, color=color, rasterized=True)
    # The same window for x and y keeps the line among its points.
    size = min(WINDOW, len(x))
    window = np.ones(size) / size
    smooth_x = np.convolve(x, window, "valid")
    smooth_y = np.convolve(y, window, "valid")
    axis.plot(smooth_x, smooth_y, lw=1.8, color=color, label=policy)
