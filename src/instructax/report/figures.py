"""Figures of what labelers and the world say of the responses, beside the paper's; each
gives None where there is nothing to draw."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from instructax.evals.intervals import Estimate, mean_estimate
from instructax.report import paper
from instructax.report.drawing import COLOURS, legend, point, shift, subplots
from instructax.report.judging import (
    HELD_OUT,
    LABELER,
    TRUTH,
    Curve,
    Reading,
    asked_about,
    best_of_kl,
    flag_estimate,
    wins_estimate,
)
from instructax.report.results import POLICIES, Size, in_words

WINDOW = 5  # iterations: of the moving averages that are drawn as lines
FLAG_TITLES = {
    "attempts": "attempts the task",
    "constraint": "keeps explicit constraints",
    "hallucinates": "hallucinates (closed tasks)",
    "appropriate": "appropriate for an assistant",
}
GROUPS = {LABELER: "training labelers", HELD_OUT: "held-out labelers"}
FIGURE_3 = {
    ("InstructGPT", LABELER): paper.WIN_RATES,
    ("InstructGPT", HELD_OUT): paper.HELD_OUT_WIN_RATES,
    ("GPT-3", LABELER): paper.GPT_WIN_RATES,
    ("GPT-3", HELD_OUT): paper.HELD_OUT_GPT_WIN_RATES,
}  # by prompts and labelers
Measure = Callable[[Reading, str, str], Estimate | None]  # of (seed, size, policy)


def by_size(
    readings: list[Reading],
    measure: Measure,
    ylabel: str,
    table: dict[str, paper.Row] | None,
) -> Any:
    """`measure` by size and policy, the paper's `table` beside it on the same vertical
    axis."""
    figure, ((ours, *rest),) = subplots(1, 2 if table else 1, 5, 4, sharey=True)
    _ours(ours, readings, measure)
    ours.set(
        ylabel=ylabel,
        title="here"
        if len(readings) == 1
        else f"here, {len(readings)} seeds and their mean",
    )
    for axis in rest:
        _papers(axis, table or {})
        axis.set_title("the paper")
    legend(figure)
    return figure


def figure_3(readings: list[Reading]) -> Any:
    """Win rates against the largest SFT on the same prompts: a row for each distribution of
    prompts that was answered, two columns, here and the paper's, for each group of
    labelers."""
    answered = {
        "InstructGPT": readings,
        "GPT-3": [reading.gpt for reading in readings if reading.gpt],
    }
    rows = [name for name, found in answered.items() if found]
    figure, axes = subplots(len(rows), 2 * len(GROUPS), 3.2, 3.1, sharey=True)
    for name, row in zip(rows, axes, strict=True):
        for (by, group), ours, theirs in zip(
            GROUPS.items(), row[::2], row[1::2], strict=True
        ):
            _ours(ours, answered[name], partial(wins_estimate, by=by))
            _papers(theirs, FIGURE_3[name, by])
            ours.set_title(f"{group}, here")
            theirs.set_title(f"{group}, the paper")
        row[0].set_ylabel(f"{name} prompts:\nwin rate")
    legend(figure)
    return figure


def _ours(axis: Any, readings: list[Reading], measure: Measure) -> None:
    """`measure` by size and policy, or by policy where there is one size. Of several seeds
    each is a thin line, and their mean is a thick one without bars: a seed is another
    world, and what seeds differ by is none of their own intervals."""
    sizes = readings[0].experiment.sizes
    found = {
        policy: [
            [measure(reading, size.name, policy) for size in sizes] for reading in readings
        ]
        for policy in POLICIES
    }
    kept = {
        policy: [i for i in range(len(sizes)) if all(line[i] for line in lines)]
        for policy, lines in found.items()
    }
    shown = [policy for policy in POLICIES if kept[policy]]
    for place, policy in enumerate(shown):
        lines: list[list[Any]] = [[line[i] for i in kept[policy]] for line in found[policy]]
        x = np.array(kept[policy]) + (
            shift(place, len(shown)) / 3 if len(sizes) > 1 else place
        )
        for line in lines if len(lines) > 1 else []:
            axis.plot(
                x,
                [estimate.value for estimate in line],
                "-",
                lw=0.7,
                alpha=0.6,
                color=COLOURS[policy],
            )
        means = lines[0]
        if len(lines) > 1:
            values = np.mean(
                [[estimate.value for estimate in line] for line in lines], axis=0
            )
            means = [
                Estimate(float(value), -np.inf, np.inf, len(lines)) for value in values
            ]
        _line(axis, x, means, policy)
    numbers = [in_words(size.parameters) for size in sizes]
    if len(sizes) > 1:
        _size_axis(
            axis,
            [f"{size.name}\n{number}" for size, number in zip(sizes, numbers, strict=True)],
        )
    else:
        axis.set_xticks(
            range(len(shown)), shown, rotation=60, ha="right", rotation_mode="anchor"
        )
        axis.set(xlabel=f"{numbers[0]} parameters")


def _papers(axis: Any, table: dict[str, paper.Row]) -> None:
    """A table of the paper, as it is drawn there."""
    for place, (policy, row) in enumerate(table.items()):
        estimates = [Estimate(*values, count=0) for values in row]
        _line(
            axis, np.arange(len(row)) + shift(place, len(POLICIES)) / 3, estimates, policy
        )
    _size_axis(axis, list(paper.NAMES))


def _line(axis: Any, x: np.ndarray, estimates: list[Estimate], policy: str) -> None:
    axis.plot(
        x, [estimate.value for estimate in estimates], "-", lw=2, color=COLOURS[policy]
    )
    for at, estimate in zip(x, estimates, strict=True):
        point(axis, float(at), estimate, policy)


def _size_axis(axis: Any, labels: list[str]) -> None:
    axis.set_xticks(range(len(labels)), labels)
    axis.set(xlim=(-0.6, len(labels) - 0.4), xlabel="parameters")


def metadata(reading: Reading) -> Any:
    """The yes-no questions of table 3, as figure 4: answered by training labelers, sizes
    pooled."""
    figure, axes = subplots(1, len(FLAG_TITLES), 2.8, 3.4)
    for axis, (flag, title) in zip(axes[0], FLAG_TITLES.items(), strict=True):
        policies = [p for p in POLICIES if flag_estimate(reading, p, flag) is not None]
        for x, policy in enumerate(policies):
            estimate = flag_estimate(reading, policy, flag)
            if estimate and estimate.count:
                axis.bar(x, estimate.value, 0.7, color=COLOURS[policy], alpha=0.35)
                point(axis, x, estimate, policy)
            if policy in paper.METADATA[flag]:
                axis.plot(
                    x,
                    paper.METADATA[flag][policy],
                    "D",
                    ms=5,
                    mfc="none",
                    color="black",
                    label="the paper",
                )
        axis.set_xticks(
            range(len(policies)), policies, rotation=60, ha="right", rotation_mode="anchor"
        )
        prompts = int(asked_about(reading.experiment, flag).sum())
        axis.set(title=title, xlabel=f"{prompts} prompts", ylim=(0, 1.05))
    axes[0][0].set_ylabel("share of responses")
    return figure


def over_optimisation(
    sizes: list[Size], curves: dict[tuple[str, str], Curve], reading: Reading
) -> Any:
    """True utility (above) and score (below) of each iteration's samples against √KL; a
    column for each size."""
    if not curves:
        return None
    figure, axes = subplots(2, len(sizes), 4.6, 2.9, sharex="col")
    for column, size in enumerate(sizes):
        for policy in ("PPO", "PPO-ptx"):
            curve = curves.get((size.name, policy))
            if curve:
                for axis, y in zip(
                    axes[:, column], (curve.utility, curve.scores), strict=True
                ):
                    _smoothed(axis, curve.distance, y, policy)
        answers = reading.answers.get((size.name, "best-of-n"))
        if answers and size.best_of:
            bound = np.sqrt(best_of_kl(size.best_of))
            for axis, y in zip(
                axes[:, column], (answers.opinions[TRUTH], answers.scores), strict=True
            ):
                style = {"fmt": "*", "ms": 11, "label": f"best of {size.best_of}"}
                point(axis, bound, mean_estimate(y), "best-of-n", **style)
        axes[0, column].set_title(size.name)
        axes[1, column].set_xlabel("√KL from the SFT policy (√nats)")
    axes[0, 0].set_ylabel("true utility (−1 … 1)")
    axes[1, 0].set_ylabel("score of the reward model")
    legend(figure)
    return figure


def _smoothed(axis: Any, x: np.ndarray, y: np.ndarray, policy: str) -> None:
    axis.plot(
        x, y, "o", ms=2.5, alpha=0.35, color=COLOURS[policy], rasterized=True
    )  # hundreds of points
    window = np.ones(min(WINDOW, len(x))) / min(WINDOW, len(x))
    axis.plot(
        np.convolve(x, window, "valid"),
        np.convolve(y, window, "valid"),
        lw=1.8,
        color=COLOURS[policy],
        label=policy,
    )
