"""Shared style of plots: one color per policy, error bars for 95% intervals, one legend.

matplotlib (the extra `plots`) is imported only when a figure is drawn.
"""

from pathlib import Path
from typing import Any

import numpy as np

from instructax.evals.intervals import Estimate

# Policy → color, in the order of legends.
COLORS = {
    "GPT": "#7f7f7f",
    "GPT prompted": "#8c564b",
    "SFT": "#1f77b4",
    "best-of-n": "#d62728",
    "PPO": "#e87a00",
    "PPO-ptx": "#2ca02c",
    "FLAN/T0": "#9467bd",
}
# Inches around each of the axes, so that no label is cut off at the edge of the figure.
PADDING = 0.1
# Distance between neighboring policies at the same x, in units of the axis.
DODGE = 0.13
# Inches in the legend: the marker with its margins, and one character.
MARKER_WIDTH = 0.6
CHARACTER_WIDTH = 0.075

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    # The same figure gives the same SVG file.
    "svg.hashsalt": "instructax",
}


def subplots(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Any, np.ndarray]:
    """Creates a figure with `rows` × `columns` axes.

    Args:
      rows: number of rows.
      columns: number of columns.
      width: width of each of the axes, in inches.
      height: height of each of the axes, in inches.
      **options: passed on to `matplotlib.pyplot.subplots`.

    Returns:
      The figure and its axes [rows, columns].
    """
    import matplotlib

    # Figures are only written to files: no display is needed.
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    import matplotlib.pyplot as plt

    # squeeze=False: the axes are a 2-D array even if there is only one.
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        layout="constrained",
        squeeze=False,
        **options,
    )
    figure.set_layout_engine("constrained", w_pad=PADDING, h_pad=PADDING)
    return figure, axes


def save_figure(figure: Any, folder: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg, byte for byte reproducible, and closes the figure."""
    import matplotlib.pyplot as plt

    # Without the date, the bytes depend on the figure alone.
    figure.savefig(folder / f"{name}.png", dpi=120)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def add_legend(figure: Any) -> None:
    """Adds one legend below all axes: each label once, policies first, in their order."""
    # Several axes, and each point with its error bar, repeat the same labels.
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)

    policies = list(COLORS)

    def place(label: str) -> int:
        return policies.index(label) if label in policies else len(policies)

    labels = sorted(handles, key=place)
    # As many columns as the width of the figure allows, at least one.
    longest = max(map(len, labels), default=0)
    entry_width = MARKER_WIDTH + CHARACTER_WIDTH * longest
    num_columns = max(1, min(len(labels), int(figure.get_figwidth() / entry_width)))
    # Outside of the axes: "constrained" layout makes room for it.
    figure.legend(
        [handles[label] for label in labels],
        labels,
        ncols=num_columns,
        frameon=False,
        loc="outside lower center",
    )


def draw_point(axis: Any, x: float, estimate: Estimate, policy: str, **style: Any) -> None:
    """Draws an estimate at `x`, with its interval if that is finite.

    `style` overrides options of matplotlib's `errorbar`.
    """
    # Estimates of other things than policies, such as the paper's, are black.
    options = {
        "fmt": "o",
        "ms": 5,
        "capsize": 2,
        "color": COLORS.get(policy, "black"),
        "label": policy,
    }
    axis.errorbar(x, estimate.value, yerr=_error_bar(estimate), **(options | style))


def draw_horizontal_point(axis: Any, estimate: Estimate, y: float, policy: str) -> None:
    """Draws an estimate along the x axis at the height `y`."""
    axis.errorbar(
        estimate.value,
        y,
        xerr=_error_bar(estimate),
        fmt="o",
        ms=4,
        capsize=2,
        color=COLORS[policy],
        label=policy,
    )


def _error_bar(estimate: Estimate) -> list[list[float]] | None:
    """Returns the lengths below and above the value; None if an end is not finite."""
    lengths = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
    return lengths if np.isfinite(lengths).all() else None


def dodge(place: int, count: int) -> float:
    """Returns the offset of the marker at `place` among `count` markers at the same x."""
    return DODGE * (place - (count - 1) / 2)


def rotate_labels(axis: Any, labels: list[str]) -> None:
    """Labels the x axis at 0, 1, … with slanted text."""
    # "anchor" rotates around the end of the text, which then points at its tick.
    axis.set_xticks(
        range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor"
    )
