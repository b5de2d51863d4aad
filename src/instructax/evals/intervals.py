"""Means, shares and ratios with 95% intervals; plain numpy, on the host."""

import dataclasses

import numpy as np

Z = 1.959964  # the normal distribution's 97.5% point


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float
    count: int  # independent units behind it

    def __str__(self) -> str:
        """The figure, and its interval unless it is known exactly."""
        return f"{self.value:.3f}" + (
            f" [{self.low:.3f}, {self.high:.3f}]" if self.low < self.high else ""
        )


def mean_estimate(x: np.ndarray) -> Estimate:
    """Mean of independent values f[n], with a normal interval; it is infinite for n < 2,
    and the mean NaN for n = 0. Of b[n] it is `share_estimate`."""
    x = np.asarray(x)
    if x.dtype == bool:
        return share_estimate(x)
    x = x.astype(np.float64)
    if not len(x):
        return Estimate(np.nan, -np.inf, np.inf, 0)
    half = Z * float(np.std(x, ddof=1)) / np.sqrt(len(x)) if len(x) > 1 else np.inf
    return Estimate(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def share_estimate(x: np.ndarray) -> Estimate:
    """Mean of independent values f[n] from 0 to 1, with Wilson's interval (1927); as
    `mean_estimate` for n = 0.

    Unlike a normal interval it leaves a doubt where all values are 0, or all 1. It is that
    of shares: of values between 0 and 1 too, ties or means of several shares, it is too
    wide.
    """
    x = np.asarray(x, np.float64)
    n, share = len(x), float(x.mean()) if len(x) else np.nan
    if not n:
        return Estimate(np.nan, -np.inf, np.inf, 0)
    middle, half = (
        share + Z**2 / (2 * n),
        Z * np.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2),
    )
    low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    # Rounding must not put a share of 0 or 1 outside of its own interval.
    return Estimate(share, min(float(low), share), max(float(high), share), n)


def share_difference(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Share of `ours` b[n] − share of `theirs` b[n] over the same units, with the interval
    of Bonett and Price (2012): the normal one after a unit of each of the two disagreements
    is added, so that to agree everywhere leaves a doubt.
    """
    gap = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    if not len(gap):
        return Estimate(np.nan, -np.inf, np.inf, 0)
    widened = np.append(gap, [1.0, -1.0])
    half = Z * float(np.std(widened)) / np.sqrt(len(widened))
    return Estimate(
        float(gap.mean()),
        float(widened.mean() - half),
        float(widened.mean() + half),
        len(gap),
    )


def ratio_estimate(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """Σ numerators / Σ denominators over independent units, such as the pairs ordered
    rightly of each prompt.

    The interval linearises the ratio: what comes from one unit may depend on each other,
    units do not.
    """
    numerators, denominators = (
        np.asarray(numerators, np.float64),
        np.asarray(denominators, np.float64),
    )
    total, units = denominators.sum(), int((denominators > 0).sum())
    if not units:
        return Estimate(np.nan, -np.inf, np.inf, 0)
    ratio = float(numerators.sum() / total)
    residuals = numerators - ratio * denominators
    # One unit always lies on its own ratio, and says nothing of the spread.
    half = (
        Z * float(np.sqrt(units / (units - 1) * (residuals**2).sum())) / total
        if units > 1
        else np.inf
    )
    return Estimate(ratio, float(ratio - half), float(ratio + half), units)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Share of prompts where `ours` f[n] is better than `theirs` f[n], a tie counting half."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return mean_estimate((ours > theirs) + 0.5 * (ours == theirs))
