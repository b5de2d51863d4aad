"""Arithmetic on estimates with 95% intervals: means, differences and paired differences."""

import numpy as np

from instructax.evals.intervals import Estimate, mean_estimate, share_difference
from instructax.simulation.task_metrics import TaskMetric


def mean_of_estimates(estimates: list[Estimate]) -> Estimate:
    """Returns the mean of independent estimates.

    On each side, the half-widths add in quadrature and are divided by the number of
    estimates.
    """
    count = len(estimates)
    value = sum(x.value for x in estimates) / count

    # [number of estimates, 2]: below and above the value.
    squares = []
    for x in estimates:
        squares.append(((x.value - x.low) ** 2, (x.high - x.value) ** 2))
    below, above = np.sqrt(np.sum(squares, axis=0)) / count
    return Estimate(
        float(value),
        float(value - below),
        float(value + above),
        sum(x.count for x in estimates),
    )


def subtract_estimates(ours: Estimate | None, theirs: Estimate | None) -> Estimate | None:
    """Returns the difference of independent estimates, or None if either is missing.

    Half-widths add in quadrature: the lower end takes the lower half of ours and the upper
    half of theirs (Newcombe, 1998).
    """
    if ours is None or theirs is None:
        return None
    value = ours.value - theirs.value
    # Our difference is low if ours is low and theirs is high.
    below = np.hypot(ours.value - ours.low, theirs.high - theirs.value)
    above = np.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return Estimate(
        value, float(value - below), float(value + above), min(ours.count, theirs.count)
    )


def metric_difference(
    ours: TaskMetric | None, theirs: TaskMetric | None
) -> Estimate | None:
    """Returns the difference of a public task's metric between two policies.

    It is paired by item if both metrics are means over the same items, and None if either
    is missing.
    """
    if ours is None or theirs is None:
        return None
    # f[n] or b[n] by item; None for BLEU, which is not a mean over items.
    x = ours.values
    y = theirs.values
    if x is None or y is None:
        return subtract_estimates(ours.estimate, theirs.estimate)
    # For binary values, an interval that stays positive even if all items agree.
    if x.dtype == bool:
        return share_difference(x, y)
    return mean_estimate(x - y)
