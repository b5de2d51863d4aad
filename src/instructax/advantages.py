"""From a score per response to an advantage per token.

Arrays in, float32 arrays out, zero where masked.
"""

import jax
import jax.numpy as jnp

from instructax.types import Array


def kl_penalized_rewards(
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array,
    mask: Array,
    *,
    kl_coef: Array | float,
) -> Array:
    """The reward of each token: the KL penalty everywhere, the score at the end.

    r_t = −kl_coef · (logprobs_t − ref_logprobs_t) + s_t
    s_t = the row's score at its last real token, 0 elsewhere

    Paper, Eq. 2 with γ = 0, with the penalty per token as in Stiennon et al. (2020).

    Args:
      scores: f32[B], the reward model's score of each response.
      logprobs: f32[B, R], log-probabilities under the policy.
      ref_logprobs: f32[B, R], log-probabilities under the reference policy.
      mask: b[B, R].
      kl_coef: β of the paper.

    Returns:
      f32[B, R].
    """
    log_ratios = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    rewards = -kl_coef * log_ratios + jnp.where(
        last_real(mask), scores.astype(jnp.float32)[:, None], 0.0
    )
    return jnp.where(mask, rewards, 0.0)


def generalized_advantages(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    discount: Array | float,
    lambda_: Array | float,
) -> tuple[Array, Array]:
    """Generalized advantage estimation (Schulman et al., 2016) over each row's real tokens.

    δ_t = r_t + discount · v_{t+1} − v_t
    A_t = δ_t + discount · λ · A_{t+1}
    returns = A + v

    with v = A = 0 after the last real token. Nothing is whitened here.

    Args:
      rewards: f32[B, R].
      values: f32[B, R], the estimate before each token.
      mask: b[B, R].
      discount: 1 in the paper.
      lambda_: not given in the paper.

    Returns:
      (advantages f32[B, R], returns f32[B, R]).
    """
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + discount * next_values - values

    def backwards(advantage: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + discount * lambda_ * advantage
        return advantage, advantage

    # Time is the leading axis of a scan: [R, B].
    _, advantages = jax.lax.scan(
        backwards, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True
    )
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, jnp.where(mask, advantages + values, 0.0)


def last_real(mask: Array) -> Array:
    """Marks the last real token of each row that has one: b[B, R] → b[B, R]."""
    columns = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, columns[None, :], -1), axis=1)  # -1 matches no column
    return columns[None, :] == last[:, None]
