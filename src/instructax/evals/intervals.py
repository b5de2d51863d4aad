"""Means, shares and ratios with 95% confidence intervals, in numpy on the host."""

import dataclasses

import numpy as np

# 97.5% quantile of the standard normal distribution.
Z_95 = 1.959964


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float
    # Independent units.
    count: int

    def __str__(self) -> str:
        """The value, and its interval unless it is known exactly."""
        text = f"{self.value:.3f}"
        if self.low < self.high:
            text += f" [{self.low:.3f}, {self.high:.3f}]"
        return text


# Of no units at all nothing is known.
_UNKNOWN = Estimate(np.nan, -np.inf, np.inf, 0)


def mean_estimate(x: np.ndarray) -> Estimate:
    """Mean of independent values f[n], with a normal interval.

    The interval is infinite for n < 2, and the mean NaN for n = 0. Booleans get the
    interval of `share_estimate`.
    """
    x = np.asarray(x)
    if x.dtype == bool:
        return share_estimate(x)
    x = x.astype(np.float64)
    if not len(x):
        return _UNKNOWN
    # One value says nothing about the spread.
    half_width = np.inf
    if len(x) > 1:
        # The sample standard deviation (n − 1), since the mean is estimated too.
        half_width = Z_95 * float(np.std(x, ddof=1)) / np.sqrt(len(x))
    mean = x.mean()
    return Estimate(float(mean), float(mean - half_width), float(mean + half_width), len(x))


def share_estimate(x: np.ndarray) -> Estimate:
    """Mean of independent values f[n] between 0 and 1, with Wilson's interval (1927).

    Unlike a normal interval it has a positive width where all values are 0 or all are 1. It
    assumes values of 0 and 1; for values in between, such as ties, it is too wide. NaN and
    infinite for n = 0.
    """
    x = np.asarray(x, np.float64)
    n = len(x)
    if not n:
        return _UNKNOWN
    # Wilson's interval inverts the test of a share, so it never leaves [0, 1].
    share = float(x.mean())
    # Wilson's center and half-width, both divided by the same scale.
    center = share + Z_95**2 / (2 * n)
    half_width = Z_95 * np.sqrt(share * (1 - share) / n + (Z_95 / (2 * n)) ** 2)
    scale = 1 + Z_95**2 / n
    low = float((center - half_width) / scale)
    high = float((center + half_width) / scale)
    # Rounding must not put a share of 0 or 1 outside of its own interval.
    return Estimate(share, min(low, share), max(high, share), n)


def share_difference(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Difference of two shares over the same units: mean of `ours` b[n] − `theirs` b[n].

    The interval is that of Bonett and Price (2012): a normal interval after one unit of
    each of the two disagreements is added, so that its width is positive even if the shares
    agree everywhere.
    """
    # 1, 0 or −1 per unit.
    gap = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    if not len(gap):
        return _UNKNOWN
    # The value is the plain difference; only the interval uses the two added units.
    widened = np.append(gap, [1.0, -1.0])
    center = widened.mean()
    half_width = Z_95 * float(np.std(widened)) / np.sqrt(len(widened))
    return Estimate(
        float(gap.mean()),
        float(center - half_width),
        float(center + half_width),
        len(gap),
    )


def ratio_estimate(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """Σ numerators / Σ denominators over independent units.

    An example are the correctly ordered pairs and all pairs of each prompt. The interval
    linearizes the ratio: values within a unit may depend on each other, units must not.

    Args:
      numerators: one value per unit, f[n].
      denominators: one value per unit, f[n], at least 0; units with 0 do not count.
    """
    numerators = np.asarray(numerators, np.float64)
    denominators = np.asarray(denominators, np.float64)
    total = denominators.sum()
    units = int((denominators > 0).sum())
    if not units:
        return _UNKNOWN
    ratio = float(numerators.sum() / total)
    # Linearization: the ratio's error is the sum of these over the total.
    residuals = numerators - ratio * denominators
    # A single unit always has the residual 0, which says nothing about the spread.
    half_width = np.inf
    if units > 1:
        # Units with a denominator of 0 have the residual 0 and are not counted.
        variance = units / (units - 1) * (residuals**2).sum()
        half_width = Z_95 * float(np.sqrt(variance)) / total
    return Estimate(ratio, float(ratio - half_width), float(ratio + half_width), units)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Share of prompts where `ours` f[n] beats `theirs` f[n]; a tie counts one half."""
    ours = np.asarray(ours)
    theirs = np.asarray(theirs)
    # Values of 0, ½ and 1.
    return mean_estimate((ours > theirs) + 0.5 * (ours == theirs))
