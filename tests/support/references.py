"""Slow, plain references for the losses, the advantages and the masked statistics: loops
over Python floats, no JAX.

They are written from the definitions, not from the library: sums where the library scans,
lists of the real numbers where the library masks. A masked cell is never read, so it may
hold anything.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np


def ragged_mask(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """b[rows, columns]: right-padded rows of random length, the first one full, the last
    one empty, none else empty."""
    lengths = rng.integers(1, columns + 1, size=rows)
    lengths[0], lengths[-1] = columns, 0
    return np.arange(columns)[None, :] < lengths[:, None]


def gradient(
    function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5
) -> np.ndarray:
    """Central differences of a scalar function at each cell of x, in float64."""
    result = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        above, below = x.astype(np.float64), x.astype(np.float64)
        above[index] += step
        below[index] -= step
        result[index] = (function(above) - function(below)) / (2 * step)
    return result


def mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def real(mask: np.ndarray, *arrays: np.ndarray) -> list[tuple[float, ...]]:
    """One tuple of floats per real cell, in reading order."""
    return [
        tuple(float(array[index]) for array in arrays)
        for index in np.ndindex(mask.shape)
        if mask[index]
    ]


def masked_mean(x: np.ndarray, mask: np.ndarray) -> float:
    return mean([value for (value,) in real(mask, x)])


def whiten(x: np.ndarray, mask: np.ndarray, *, shift_mean: bool) -> np.ndarray:
    numbers = [value for (value,) in real(mask, x)]
    center = mean(numbers)
    scale = 1 / math.sqrt(mean([(number - center) ** 2 for number in numbers]) + 1e-8)
    result = np.zeros(mask.shape)
    for index in np.ndindex(mask.shape):
        if mask[index]:
            result[index] = (float(x[index]) - center) * scale + (
                0.0 if shift_mean else center
            )
    return result


def next_token_loss(logprobs: np.ndarray, loss_mask: np.ndarray) -> float:
    return -masked_mean(logprobs, loss_mask)


def pairwise_ranking_loss(
    scores: np.ndarray, ranks: np.ndarray, valid: np.ndarray
) -> tuple[float, float]:
    losses_of_prompts, correct = [], []
    for row in range(len(scores)):
        answers = [
            (float(scores[row, k]), int(ranks[row, k]))
            for k in range(scores.shape[1])
            if valid[row, k]
        ]
        pairs = [
            (better, worse)
            for better, high in answers
            for worse, low in answers
            if high < low
        ]
        correct += [float(better > worse) for better, worse in pairs]
        if pairs:
            losses_of_prompts.append(
                mean([math.log(1 + math.exp(worse - better)) for better, worse in pairs])
            )
    return mean(losses_of_prompts), mean(correct)


def clipped_policy_loss(
    logprobs: np.ndarray,
    old_logprobs: np.ndarray,
    advantages: np.ndarray,
    mask: np.ndarray,
    *,
    clip: float,
) -> tuple[float, float]:
    terms = []
    for logprob, old_logprob, advantage in real(mask, logprobs, old_logprobs, advantages):
        ratio = math.exp(logprob - old_logprob)
        terms.append((-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip)))
    return mean([max(pair) for pair in terms]), mean(
        [float(second > first) for first, second in terms]
    )


def clipped_value_loss(
    values: np.ndarray,
    old_values: np.ndarray,
    returns: np.ndarray,
    mask: np.ndarray,
    *,
    clip: float | None,
) -> tuple[float, float]:
    terms = []
    for value, old_value, target in real(mask, values, old_values, returns):
        near = (
            value if clip is None else min(max(value, old_value - clip), old_value + clip)
        )
        terms.append(((value - target) ** 2, (near - target) ** 2))
    return mean([max(pair) for pair in terms]) / 2, mean(
        [float(second > first) for first, second in terms]
    )


def kl_penalized_rewards(
    scores: np.ndarray,
    logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    mask: np.ndarray,
    *,
    kl_coef: float,
) -> np.ndarray:
    rewards = np.zeros(mask.shape)
    for row, real_tokens in enumerate(mask):
        columns = [column for column, is_real in enumerate(real_tokens) if is_real]
        for column in columns:
            rewards[row, column] = -kl_coef * (
                float(logprobs[row, column]) - float(ref_logprobs[row, column])
            )
        if columns:
            rewards[row, columns[-1]] += float(scores[row])
    return rewards


def generalized_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    *,
    discount: float,
    lambda_: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The sum A_t = Σ_k (discount·λ)^k δ_{t+k} over the real tokens of the row, which stand
    together; no recursion."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row, real_tokens in enumerate(mask):
        columns = [column for column, is_real in enumerate(real_tokens) if is_real]
        value = [float(values[row, column]) for column in columns] + [0.0]
        deltas = [
            float(rewards[row, columns[t]]) + discount * value[t + 1] - value[t]
            for t in range(len(columns))
        ]
        for t, column in enumerate(columns):
            advantages[row, column] = sum(
                (discount * lambda_) ** k * delta for k, delta in enumerate(deltas[t:])
            )
            returns[row, column] = advantages[row, column] + value[t]
    return advantages, returns
