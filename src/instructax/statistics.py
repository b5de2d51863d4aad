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
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_estimate(x: np.ndarray) -> Estimate:
    """Mean of independent values f[n], with a normal interval; it is infinite for n < 2, and the mean NaN for n = 0."""
    x = np.asarray(x, np.float64)
    if not len(x):
        return Estimate(np.nan, -np.inf, np.inf, 0)
    half = Z * float(np.std(x, ddof=1)) / np.sqrt(len(x)) if len(x) > 1 else np.inf
    return Estimate(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def ratio_estimate(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """Σ numerators / Σ denominators over independent units, such as the pairs ordered rightly of each prompt.

    The interval linearises the ratio: what comes from one unit may depend on each other, units do not.
    """
    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    total, units = denominators.sum(), int((denominators > 0).sum())
    if not units:
        return Estimate(np.nan, -np.inf, np.inf, 0)
    ratio = float(numerators.sum() / total)
    residuals = numerators - ratio * denominators
    # One unit always lies on its own ratio, and says nothing of the spread.
    half = Z * float(np.sqrt(units / (units - 1) * (residuals**2).sum())) / total if units > 1 else np.inf
    return Estimate(ratio, float(ratio - half), float(ratio + half), units)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Share of prompts where `ours` f[n] is better than `theirs` f[n], a tie counting half."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return mean_estimate((ours > theirs) + 0.5 * (ours == theirs))
