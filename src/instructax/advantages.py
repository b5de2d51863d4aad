"""From a score per response to an advantage per token: arrays in, float32 arrays out, zero
where masked."""

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
    """Reward of each token: the KL penalty everywhere, the score at the end.

    r_t = −kl_coef · (logprobs_t − ref_logprobs_t) + [t is the row's last real token] ·
    score

    `scores` f32[B]; `logprobs`, `ref_logprobs` f32[B, R]; `mask` b[B, R] → f32[B, R].
    Paper, Eq. 2 with γ = 0, the penalty per token as in Stiennon et al. (2020).
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

    δ_t = r_t + discount · v_{t+1} − v_t,  A_t = δ_t + discount · λ · A_{t+1},  returns = A
    + v

    with v = A = 0 after the last real token. `rewards`, `values` f32[B, R], `mask` b[B, R]
    → (advantages f32[B, R], returns f32[B, R]). Nothing is whitened here. The paper uses
    discount 1 and leaves λ open.
    """
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + discount * next_values - values

    def backwards(advantage: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + discount * lambda_ * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(
        backwards, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True
    )
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, jnp.where(mask, advantages + values, 0.0)


def last_real(mask: Array) -> Array:
    """Marks each row's last real token: b[B, R] → b[B, R]; nothing in a row without one."""
    columns = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, columns[None, :], -1), axis=1)
    return columns[None, :] == last[:, None]
