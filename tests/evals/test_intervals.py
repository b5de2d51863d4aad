"""Estimates against worked numbers, and the coverage of the intervals."""

import math

import numpy as np
import pytest

from instructax.evals.intervals import (
    Estimate,
    mean_estimate,
    ratio_estimate,
    share_difference,
    share_estimate,
    win_rate,
)

Z_95 = 1.959964


def test_mean_by_hand():
    """1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3.

    The standard error is √(14/12).
    """
    estimate = mean_estimate(np.array([1, 2, 3, 6]))
    half = Z_95 * math.sqrt(14 / 12)
    assert (estimate.value, estimate.count) == (3.0, 4)
    assert (estimate.low, estimate.high) == pytest.approx((3 - half, 3 + half))


def test_the_mean_of_one_value_has_an_infinite_interval():
    assert mean_estimate(np.array([5.0])) == Estimate(5.0, -math.inf, math.inf, 1)


def test_ratio_by_hand():
    """Both ratios are (1 + 2) / (2 + 4) = 1/2.

    The residuals of the first are 1 − 1 = 0 and 2 − 2 = 0; those of the second are 1 and
    −1: Σ r² = 2, times units / (units − 1) = 2, its root 2, over the total 6, is one third.
    """
    exact = ratio_estimate(np.array([1, 2]), np.array([2, 4]))
    assert (exact.value, exact.low, exact.high, exact.count) == (0.5, 0.5, 0.5, 2)
    spread = ratio_estimate(np.array([2, 1]), np.array([2, 4]))
    assert (spread.value, spread.low, spread.high) == pytest.approx(
        (0.5, 0.5 - Z_95 / 3, 0.5 + Z_95 / 3)
    )


def test_a_unit_with_denominator_zero_is_ignored():
    assert ratio_estimate(np.array([2, 1, 0]), np.array([2, 4, 0])) == ratio_estimate(
        np.array([2, 1]), np.array([2, 4])
    )


def test_a_ratio_with_equal_denominators_is_a_mean():
    x = np.random.default_rng(0).normal(size=50)
    ratio = ratio_estimate(x * 3, np.full(50, 3.0))
    mean = mean_estimate(x)
    assert (ratio.value, ratio.low, ratio.high, ratio.count) == pytest.approx(
        (mean.value, mean.low, mean.high, 50)
    )


def test_a_ratio_without_units_is_nan_and_unbounded():
    empty = ratio_estimate(np.zeros(3), np.zeros(3))
    assert math.isnan(empty.value)
    assert (empty.low, empty.high, empty.count) == (-math.inf, math.inf, 0)
    one = ratio_estimate(np.array([1.0]), np.array([2.0]))
    assert one == Estimate(0.5, -math.inf, math.inf, 1)


def test_a_mean_without_values_is_nan_and_unbounded():
    empty = mean_estimate(np.zeros(0))
    assert math.isnan(empty.value)
    assert (empty.low, empty.high, empty.count) == (-math.inf, math.inf, 0)


def test_share_by_hand():
    """Wilson for 2 of 8: (1/4 + z²/16 ± z √(3/16/8 + z²/256)) / (1 + z²/8).

    For 0 of 10: from 0 to z² / (10 + z²).
    """
    estimate = share_estimate(np.array([1, 1, 0, 0, 0, 0, 0, 0]))
    center = 0.25 + Z_95**2 / 16
    half = Z_95 * math.sqrt(3 / 128 + Z_95**2 / 256)
    assert (estimate.value, estimate.count) == (0.25, 8)
    scale = 1 + Z_95**2 / 8
    assert estimate.low == pytest.approx((center - half) / scale)
    assert estimate.high == pytest.approx((center + half) / scale)

    none = share_estimate(np.zeros(10))
    every = share_estimate(np.ones(10))
    assert (none.value, none.low, none.high) == pytest.approx(
        (0, 0, Z_95**2 / (10 + Z_95**2))
    )
    assert (every.value, every.low, every.high) == pytest.approx(
        (1, 10 / (10 + Z_95**2), 1)
    )
    assert none.low <= 0 and every.high >= 1
    assert mean_estimate(np.zeros(10, bool)) == none
    assert math.isnan(share_estimate(np.zeros(0)).value)


def test_difference_of_shares_by_hand():
    """One of four units differs: center (1 + 1 − 1) / 6, variance (3/6 − 1/36) / 6."""
    estimate = share_difference(np.array([1, 1, 0, 0], bool), np.array([1, 0, 0, 0], bool))
    half = Z_95 * math.sqrt((1 / 2 - 1 / 36) / 6)
    assert (estimate.value, estimate.count) == (0.25, 4)
    assert (estimate.low, estimate.high) == pytest.approx((1 / 6 - half, 1 / 6 + half))
    alike = share_difference(np.ones(30, bool), np.ones(30, bool))
    assert alike.value == 0 and (alike.low, alike.high) == pytest.approx(
        (-alike.high, Z_95 * math.sqrt(2) / 32)
    )
    assert math.isnan(share_difference(np.zeros(0, bool), np.zeros(0, bool)).value)


def test_win_rate_counts_a_tie_as_half():
    estimate = win_rate(np.array([2.0, 1.0, 0.0, 3.0]), np.array([1.0, 1.0, 5.0, 2.0]))
    assert (estimate.value, estimate.count) == (2.5 / 4, 4)
    assert win_rate(np.arange(5), np.arange(5)).value == 0.5
    assert estimate.high - estimate.value == pytest.approx(
        Z_95 * math.sqrt((2 * 0.375**2 + 0.125**2 + 0.625**2) / 3 / 4)
    )


def test_intervals_cover_about_95_of_100():
    """2000 samples of 40 clustered units.

    A binomial share with p = 0.95 is outside 0.93 … 0.97 less often than once in 10^4. The
    lower bound is looser, because 40 units are few for a linearized interval and clipping
    moves the mean of 0.7 a little.
    """
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        pairs = rng.integers(1, 30, size=40)
        correct = rng.binomial(pairs, np.clip(rng.normal(0.7, 0.15, size=40), 0, 1))
        estimate = ratio_estimate(correct, pairs)
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.91 < covered / 2000 < 0.97


def test_str_shows_an_interval_unless_it_is_a_point():
    assert str(Estimate(0.12345, -1.0, 2.00049, 9)) == "0.123 [-1.000, 2.000]"
    assert str(Estimate(0.5, 0.5, 0.5, 9)) == "0.500"
