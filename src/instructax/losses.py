"""The losses of all stages: arrays in, float32 scalars out.

No model, parameters, config or random key appears here. Every mean runs over the real
tokens of the whole (global) batch, and is 0 with zero gradient if no token is real.
"""

import jax
import jax.numpy as jnp

from instructax.masking import masked_mean
from instructax.types import Array

# e⁸⁰ ≈ 5.5e34; the largest float32 is 3.4e38.
LARGEST_LOG_RATIO = 80.0


def next_token_loss(logprobs: Array, loss_mask: Array) -> Array:
    """Cross-entropy per trained token, in nats: −mean of log p(x_t | x_<t).

    Used for supervised fine-tuning (paper, section 3.5) and the pretraining term of Eq. 2.

    Args:
      logprobs: f32[B, T], log-probabilities of the batch's own tokens.
      loss_mask: b[B, T], the tokens that are trained on.

    Returns:
      f32[].
    """
    return -masked_mean(logprobs.astype(jnp.float32), loss_mask)


def pairwise_ranking_loss(scores: Array, ranks: Array, valid: Array) -> tuple[Array, Array]:
    """Bradley–Terry loss over all pairs of each prompt's K responses (paper, Eq. 1, C.2).

    loss = mean over prompts of  mean over pairs (w better than l) of  −log σ(s_w − s_l)

    Tied pairs are dropped. The inner mean runs over the remaining pairs, which is the
    paper's 1 / C(K, 2) if there is no tie. Prompts without a pair have no weight.

    Args:
      scores: f32[B, K].
      ranks: i32[B, K], 0 is best.
      valid: b[B, K].

    Returns:
      (loss f32[], accuracy f32[]), where accuracy is the fraction of all pairs of the batch
      with s_w > s_l.
    """
    scores = scores.astype(jnp.float32)
    pairs = ordered_pairs(ranks, valid)
    # The score of an invalid response can be anything, even NaN: keep it out of the
    # margins.
    scores = jnp.where(valid, scores, 0.0)
    margins = scores[:, :, None] - scores[:, None, :]
    pairs_of_prompt = jnp.sum(pairs, axis=(1, 2), dtype=jnp.float32)
    losses = jnp.sum(jnp.where(pairs, -jax.nn.log_sigmoid(margins), 0.0), axis=(1, 2))
    losses = losses / jnp.maximum(pairs_of_prompt, 1.0)
    return masked_mean(losses, pairs_of_prompt > 0), masked_mean(margins > 0, pairs)


def ordered_pairs(ranks: Array, valid: Array) -> Array:
    """Marks the pairs (w, l) of valid responses where w is strictly better than l.

    i32[B, K], b[B, K] → b[B, K, K].
    """
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

    ρ_t = exp(logprobs_t − old_logprobs_t)
    loss = mean of max(−A_t ρ_t, −A_t clip(ρ_t, 1 − clip, 1 + clip))

    Args:
      logprobs: f32[B, R], log-probabilities under the policy that is trained.
      old_logprobs: f32[B, R], log-probabilities under the policy that sampled.
      advantages: f32[B, R].
      mask: b[B, R].
      clip: ε of PPO.

    Returns:
      (loss f32[], clipped fraction f32[]), where the clipped fraction is that of the real
      tokens whose clipped term is strictly larger, so that their gradient vanishes.
    """
    # Masked entries are replaced before exp, and the exponent is limited so that exp stays
    # finite: an infinite ratio would turn the gradient into NaN even where the clipped term
    # is larger.
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
    """Half the squared error of the value estimates, clipped around the rollout's values.

    loss = ½ · mean of max((v − R)², (clip(v, v_old − clip, v_old + clip) − R)²)

    Not in the paper; as in Ziegler et al. (2019).

    Args:
      values: f32[B, R], estimates of the value model that is trained.
      old_values: f32[B, R], estimates at the time of the rollout.
      returns: f32[B, R], the targets.
      mask: b[B, R].
      clip: None trains on ½ · mean of (v − R)², without clipping.

    Returns:
      (loss f32[], clipped fraction f32[]), where the clipped fraction is that of the real
      tokens whose clipped error is strictly larger.
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
