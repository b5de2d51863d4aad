"""How all figures of a report are drawn: one colour for each policy, 95% intervals as bars,
one legend below.

matplotlib (the extra `plots`) is imported when a figure is drawn.
"""

from pathlib import Path
from typing import Any

import numpy as np

from instructax.evals.intervals import Estimate

COLOURS = {
    "GPT": "#7f7f7f",
    "GPT prompted": "#8c564b",
    "SFT": "#1f77b4",
    "best-of-n": "#d62728",
    "PPO": "#e87a00",
    "PPO-ptx": "#2ca02c",
    "FLAN/T0": "#9467bd",
}
PAD = 0.1  # inches around each of the axes, so that none ends at the figure's edge
SPREAD = 0.13  # between policies that stand beside each other, in units of the axis


def subplots(
    rows: int, columns: int, width: float, height: float, **rest: Any
) -> tuple[Any, np.ndarray]:
    """A figure of `rows` × `columns` axes of so many inches each."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    matplotlib.rcParams.update(
        {"svg.hashsalt": "instructax", "axes.titlesize": 10, "axes.grid": True}
    )
    matplotlib.rcParams.update({"grid.alpha": 0.3, "grid.linewidth": 0.6})
    import matplotlib.pyplot as plt

    size = (width * columns, height * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **rest
    )
    figure.set_layout_engine("constrained", w_pad=PAD, h_pad=PAD)
    return figure, axes


def save(figure: Any, folder: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg, the same bytes for the same figure, and closes it."""
    import matplotlib.pyplot as plt

    figure.savefig(folder / f"{name}.png", dpi=120)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def legend(figure: Any) -> None:
    """One legend below all axes, each name once, policies first and in their order."""
    found = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    policies = list(COLOURS)
    labels = sorted(
        found,
        key=lambda label: policies.index(label) if label in policies else len(policies),
    )
    widest = 0.6 + 0.075 * max(
        map(len, labels), default=0
    )  # inches: the marker, its margins, a letter
    columns = max(1, min(len(found), int(figure.get_figwidth() / widest)))
    options = {"ncols": columns, "frameon": False, "loc": "outside lower center"}
    figure.legend([found[label] for label in labels], labels, **options)


def point(axis: Any, x: float, estimate: Estimate, policy: str, **style: Any) -> None:
    """A point with its interval, which is left out if it has no end."""
    half = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
    options = {
        "fmt": "o",
        "ms": 5,
        "capsize": 2,
        "color": COLOURS.get(policy, "black"),
        "label": policy,
    } | style
    axis.errorbar(
        x, estimate.value, yerr=half if np.isfinite(half).all() else None, **options
    )


def shift(place: int, count: int) -> float:
    return SPREAD * (place - (count - 1) / 2)


def across(axis: Any, estimate: Estimate, y: float, policy: str) -> None:
    half = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
    options = {"fmt": "o", "ms": 4, "capsize": 2, "color": COLOURS[policy], "label": policy}
    axis.errorbar(
        estimate.value, y, xerr=half if np.isfinite(half).all() else None, **options
    )
