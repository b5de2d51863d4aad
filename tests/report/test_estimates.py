"""Arithmetic on estimates, worked out by hand."""

import numpy as np
import pytest

from instructax.evals.intervals import Estimate, mean_estimate, share_difference
from instructax.report.estimates import (
    mean_of_estimates,
    metric_difference,
    subtract_estimates,
)
from instructax.simulation.task_metrics import TaskMetric


def test_half_widths_of_independent_estimates_add_in_quadrature():
    ours = Estimate(0.7, 0.67, 0.73, 50)
    theirs = Estimate(0.5, 0.46, 0.54, 40)
    difference = subtract_estimates(ours, theirs)
    np.testing.assert_allclose(
        [difference.value, difference.low, difference.high], [0.2, 0.15, 0.25]
    )
    mean = mean_of_estimates([ours, theirs])
    np.testing.assert_allclose([mean.value, mean.low, mean.high], [0.6, 0.575, 0.625])
    assert subtract_estimates(ours, None) is None


def test_difference_of_asymmetric_intervals_adds_opposite_sides():
    ours = Estimate(0.5, 0.46, 0.51, 9)
    theirs = Estimate(0.1, 0.1, 0.13, 9)
    difference = subtract_estimates(ours, theirs)
    np.testing.assert_allclose(
        [difference.value, difference.low, difference.high], [0.4, 0.35, 0.41]
    )


def test_metrics_of_the_same_items_are_paired():
    """Ours is 0.1 above theirs on every item: the spread between items cancels.

    For binary values the interval keeps a width even then.
    """
    values = np.linspace(0.0, 0.9, 10)
    ours = TaskMetric(mean_estimate(values + 0.1), values + 0.1)
    theirs = TaskMetric(mean_estimate(values), values)
    paired = metric_difference(ours, theirs)
    unpaired = subtract_estimates(ours.estimate, theirs.estimate)
    assert paired.value == pytest.approx(0.1)
    assert unpaired.value == pytest.approx(0.1)
    assert paired.high - paired.low < 1e-9
    assert unpaired.high - unpaired.low > 0.4
    assert metric_difference(TaskMetric(ours.estimate), theirs) == unpaired
    assert metric_difference(None, theirs) is None

    first = np.array([1, 1, 0, 0], bool)
    second = np.array([1, 0, 0, 0], bool)
    unknown = Estimate(0, 0, 0, 4)
    binary = metric_difference(TaskMetric(unknown, first), TaskMetric(unknown, second))
    assert binary == share_difference(first, second)
