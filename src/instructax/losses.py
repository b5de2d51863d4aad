"""The losses of the three stages: arrays in, float32 scalars out.

No model, parameters, configuration or random key is seen here. Every mean is over the real
tokens of the whole batch and is 0, with zero gradient, when no token is real.
"""

import jax
import jax.numpy as jnp

from instructax.masking import masked_mean
from instructax.types import Array

LARGEST_LOG_RATIO = 80.0  # e⁸⁰ ≈ 5.5e34; float32 ends at 3.4e38


def next_token_loss(logprobs: Array, loss_mask: Array) -> Array:
    """Cross-entropy per trained token, in nats: −mean of log p(x_t | x_<t).

    `logprobs` f32[B, T] of the tokens that stand in the batch, `loss_mask` b[B, T] → f32[].
    Supervised fine-tuning (paper, section 3.5) and the pretraining term of Eq. 2.
    """
    return -masked_mean(logprobs.astype(jnp.float32), loss_mask)


def pairwise_ranking_loss(scores: Array, ranks: Array, valid: Array) -> tuple[Array, Array]:
    """Bradley–Terry loss over all pairs of each prompt's K responses, and the share of
    pairs ordered rightly.

    loss = mean over prompts of  mean over pairs (w better than l) of  −log σ(s_w − s_l)

    `scores` f32[B, K], `ranks` i32[B, K] (0 is best), `valid` b[B, K] → (loss f32[],
    accuracy f32[]). Tied pairs are dropped, the inner mean is over the pairs that are left
    (the paper's 1 / C(K, 2) when there is no tie), and prompts without a pair have no
    weight. Accuracy is over all pairs of the batch, equal scores counting as wrong. Paper,
    Eq. 1 and appendix C.2.
    """
    scores = scores.astype(jnp.float32)
    pairs = ordered_pairs(ranks, valid)
    # An invalid response's score may be anything, NaN too: it must not reach the
    # difference.
    scores = jnp.where(valid, scores, 0.0)
    margins = scores[:, :, None] - scores[:, None, :]
    pairs_of_prompt = jnp.sum(pairs, axis=(1, 2), dtype=jnp.float32)
    losses = jnp.sum(jnp.where(pairs, -jax.nn.log_sigmoid(margins), 0.0), axis=(1, 2))
    losses = losses / jnp.maximum(pairs_of_prompt, 1.0)
    return masked_mean(losses, pairs_of_prompt > 0), masked_mean(margins > 0, pairs)


def ordered_pairs(ranks: Array, valid: Array) -> Array:
    """Marks the pairs (w, l) of valid responses with w strictly better than l: i32[B, K],
    b[B, K] → b[B, K, K]."""
    return (ranks[:, :, None] < ranks[:, None, :]) & valid[:, :, None] & valid[:, None, :]


def clipped_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip: Array | float,
) -> tuple[Array, Array]:
    """PPO's clipped surrogate (Schulman et al., 2017, Eq. 7), negated.

    ρ_t = exp(logprobs_t − old_logprobs_t);  loss = mean of max(−A_t ρ_t, −A_t clip(ρ_t, 1 −
    clip, 1 + clip))

    All f32[B, R], `mask` b[B, R] → (loss f32[], clipped fraction f32[]): the share of real
    tokens where the clipped term is strictly the larger, that is, where the gradient
    vanishes.
    """
    # Masked cells are replaced before exp, and the exponent is kept where exp is finite in
    # float32: an infinite ratio would turn the gradient into NaN even where the clipped
    # term is the larger.
    log_ratios = jnp.where(
        mask, logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32), 0.0
    )
    log_ratios = jnp.minimum(log_ratios, LARGEST_LOG_RATIO)
    advantages = jnp.where(mask, advantages.astype(jnp.float32), 0.0)
    ratios = jnp.exp(log_ratios)
    unclipped = -advantages * ratios
    clipped = -advantages * jnp.clip(ratios, 1.0 - clip, 1.0 + clip)
    return masked_mean(jnp.maximum(unclipped, clipped), mask), masked_mean(
        clipped > unclipped, mask
    )


def clipped_value_loss(
    values: Array,
    old_values: Array,
    returns: Array,
    mask: Array,
    *,
    clip: Array | float | None,
) -> tuple[Array, Array]:
    """Half the squared error of the value estimates, their change since the rollout
    clipped.

    loss = ½ · mean of max((v − R)², (clip(v, v_old − clip, v_old + clip) − R)²);
    `clip=None`: ½ · mean of (v − R)²

    All f32[B, R], `mask` b[B, R] → (loss f32[], clipped fraction f32[]). Not in the paper;
    as in its ancestors (Ziegler et al., 2019).
    """
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    old_values = jnp.where(mask, old_values.astype(jnp.float32), 0.0)
    returns = jnp.where(mask, returns.astype(jnp.float32), 0.0)
    errors = (values - returns) ** 2
    if clip is None:
        return 0.5 * masked_mean(errors, mask), jnp.zeros((), jnp.float32)
    clipped_errors = (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
    return 0.5 * masked_mean(jnp.maximum(errors, clipped_errors), mask), masked_mean(
        clipped_errors > errors, mask
    )
