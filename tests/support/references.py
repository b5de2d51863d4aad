"""Slow, plain references for the losses, the advantages and the masked statistics.

They loop over Python floats, without JAX, and follow the definitions rather than the
library: they sum where the library scans, and use lists of the real values where the
library masks. They never read a masked entry, so it may hold any value.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np


def ragged_mask(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """b[rows, columns]: right-padded rows of random length. Only the first row is full, and
    only the last one is empty."""
    lengths = rng.integers(1, columns + 1, size=rows)
    lengths[0] = columns
    lengths[-1] = 0
    return np.arange(columns)[None, :] < lengths[:, None]


def gradient(
    function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5
) -> np.ndarray:
    """Central differences of a scalar function at each entry of x, in float64."""
    result = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        above = x.astype(np.float64)
        below = x.astype(np.float64)
        above[index] += step
        below[index] -= step
        result[index] = (function(above) - function(below)) / (2 * step)
    return result


def mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def real(mask: np.ndarray, *arrays: np.ndarray) -> list[tuple[float, ...]]:
    """One tuple of floats per unmasked entry, in reading order."""
    entries = []
    for index in np.ndindex(mask.shape):
        if mask[index]:
            entries.append(tuple(float(array[index]) for array in arrays))
    return entries


def masked_mean(x: np.ndarray, mask: np.ndarray) -> float:
    return mean([value for (value,) in real(mask, x)])


def whiten(x: np.ndarray, mask: np.ndarray, *, shift_mean: bool) -> np.ndarray:
    numbers = [value for (value,) in real(mask, x)]
    center = mean(numbers)
    scale = 1 / math.sqrt(mean([(number - center) ** 2 for number in numbers]) + 1e-8)
    offset = 0.0 if shift_mean else center
    result = np.zeros(mask.shape)
    for index in np.ndindex(mask.shape):
        if mask[index]:
            result[index] = (float(x[index]) - center) * scale + offset
    return result


def next_token_loss(logprobs: np.ndarray, loss_mask: np.ndarray) -> float:
    return -masked_mean(logprobs, loss_mask)


def pairwise_ranking_loss(
    scores: np.ndarray, ranks: np.ndarray, valid: np.ndarray
) -> tuple[float, float]:
    prompt_losses = []
    correct = []
    for row in range(len(scores)):
        # (score, rank) of the responses to this prompt.
        responses = []
        for k in range(scores.shape[1]):
            if valid[row, k]:
                responses.append((float(scores[row, k]), int(ranks[row, k])))
        # Scores (better, worse) of the strictly ordered pairs.
        pairs = []
        for better, better_rank in responses:
            for worse, worse_rank in responses:
                if better_rank < worse_rank:
                    pairs.append((better, worse))
        correct += [float(better > worse) for better, worse in pairs]
        if pairs:
            losses = [math.log(1 + math.exp(worse - better)) for better, worse in pairs]
            prompt_losses.append(mean(losses))
    return mean(prompt_losses), mean(correct)


def clipped_policy_loss(
    logprobs: np.ndarray,
    old_logprobs: np.ndarray,
    advantages: np.ndarray,
    mask: np.ndarray,
    *,
    clip: float,
) -> tuple[float, float]:
    # (unclipped, clipped) of each token.
    terms = []
    for logprob, old_logprob, advantage in real(mask, logprobs, old_logprobs, advantages):
        ratio = math.exp(logprob - old_logprob)
        terms.append((-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip)))
    loss = mean([max(pair) for pair in terms])
    return loss, mean([float(clipped > unclipped) for unclipped, clipped in terms])


def clipped_value_loss(
    values: np.ndarray,
    old_values: np.ndarray,
    returns: np.ndarray,
    mask: np.ndarray,
    *,
    clip: float | None,
) -> tuple[float, float]:
    # (unclipped, clipped) of each token.
    terms = []
    for value, old_value, target in real(mask, values, old_values, returns):
        near = value
        if clip is not None:
            near = min(max(value, old_value - clip), old_value + clip)
        terms.append(((value - target) ** 2, (near - target) ** 2))
    loss = mean([max(pair) for pair in terms]) / 2
    return loss, mean([float(clipped > unclipped) for unclipped, clipped in terms])


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
        columns = np.flatnonzero(real_tokens).tolist()
        for column in columns:
            log_ratio = float(logprobs[row, column]) - float(ref_logprobs[row, column])
            rewards[row, column] = -kl_coef * log_ratio
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
    """A_t = Σ_k (discount·λ)^k δ_{t+k} over the real tokens of a row, without recursion."""
    advantages = np.zeros(mask.shape)
    returns = np.zeros(mask.shape)
    for row, real_tokens in enumerate(mask):
        columns = np.flatnonzero(real_tokens).tolist()
        # The value after the last real token is 0.
        value = [float(values[row, column]) for column in columns] + [0.0]
        deltas = []
        for t, column in enumerate(columns):
            deltas.append(float(rewards[row, column]) + discount * value[t + 1] - value[t])
        for t, column in enumerate(columns):
            advantages[row, column] = sum(
                (discount * lambda_) ** k * delta for k, delta in enumerate(deltas[t:])
            )
            returns[row, column] = advantages[row, column] + value[t]
    return advantages, returns
