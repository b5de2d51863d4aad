"""From rollouts to what the PPO update reads, with the figures and the invariants of one
iteration.

Departures from the paper, which leaves them open: λ, whitening and the penalty for
responses that never end are settings.
"""

from typing import Any

import jax.numpy as jnp

from instructax.advantages import generalized_advantages, kl_penalized_rewards
from instructax.masking import masked_mean, token_count, whiten
from instructax.types import Array, Experience, Scored, pytree


@pytree
class AdvantageSettings:
    """What turns scores into advantages; arrays, so that a sweep over them compiles once."""

    kl_coef: Array  # f32[], β of Eq. 2
    discount: Array  # f32[]
    lambda_: Array  # f32[]
    no_eos_penalty: Array  # f32[], taken off the score of a response that did not end


def make_experience(
    scored: Scored,
    logprobs: Array,
    settings: AdvantageSettings,
    *,
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> tuple[Experience, Array]:
    """Rewards, advantages and returns of one batch of rollouts.

    `logprobs` f32[B, R]: the policy's own, the `old_logprobs` of the ratio. By the scorer
    they start at exactly what the update computes, by the sampler within its rounding.
    Returns (experience, rewards f32[B, R]).
    """
    rollouts = scored.rollouts
    scores = scored.scores - settings.no_eos_penalty * (~rollouts.ended)
    rewards = kl_penalized_rewards(
        scores, logprobs, scored.ref_logprobs, rollouts.mask, kl_coef=settings.kl_coef
    )
    used = whiten(rewards, rollouts.mask, shift_mean=False) if whiten_rewards else rewards
    advantages, returns = generalized_advantages(
        used,
        scored.values,
        rollouts.mask,
        discount=settings.discount,
        lambda_=settings.lambda_,
    )
    if whiten_advantages:
        advantages = whiten(advantages, rollouts.mask, shift_mean=True)
    experience = Experience(
        rollouts=rollouts,
        old_logprobs=logprobs,
        values=scored.values,
        advantages=advantages,
        returns=returns,
    )
    return experience, rewards


def diagnostics(
    scored: Scored, logprobs: Array, entropy: Array, rewards: Array, returns: Array
) -> dict[str, Array]:
    """Figures of one iteration, f32[]; sums over a response's tokens, means over responses,
    nats.

    kl: Σ_t log(π / π_ref), the k1 estimate on sampled tokens; kl_k3: Σ_t (π_ref / π − 1 −
    log(π_ref / π)), never negative. Gaps are means over tokens of the absolute difference
    between two log-probabilities: as sampled and as scored, and by policy and reference. A
    mean stays small under the rounding of 16 bits; one token of many does not.
    """
    rollouts = scored.rollouts
    mask = rollouts.mask
    log_ratios = jnp.where(mask, logprobs - scored.ref_logprobs, 0.0)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    kl = jnp.sum(log_ratios, axis=1)
    # Capped, so that one sampled token that the policy all but excludes cannot turn the
    # average into infinity.
    k3 = jnp.where(mask, jnp.expm1(jnp.minimum(-log_ratios, 30.0)) + log_ratios, 0.0)
    sampler_gaps = jnp.abs(logprobs - rollouts.logprobs)
    residual = _variance(returns - scored.values, mask)
    return {
        "kl": jnp.mean(kl),
        "kl_standard_error": jnp.std(kl) / jnp.sqrt(kl.shape[0]),
        "kl_k3": jnp.mean(jnp.sum(k3, axis=1)),
        "ref_gap": masked_mean(jnp.abs(log_ratios), mask),
        "sampler_gap": masked_mean(sampler_gaps, mask),
        "sampler_gap_max": jnp.max(jnp.where(mask, sampler_gaps, 0.0)),
        "entropy": masked_mean(entropy, mask),
        "scores": jnp.mean(scored.scores),
        "scores_std": jnp.std(scored.scores),
        "rewards": jnp.mean(jnp.sum(rewards, axis=1)),
        "values": masked_mean(scored.values, mask),
        "explained_variance": 1.0 - residual / jnp.maximum(_variance(returns, mask), 1e-8),
        "response_length": jnp.mean(lengths),
        "response_length_max": jnp.max(lengths),
        "ended_share": jnp.mean(rollouts.ended, dtype=jnp.float32),
        "tokens": token_count(mask) + token_count(rollouts.prompts.mask),
    }


def _variance(x: Array, mask: Array) -> Array:
    mean = masked_mean(x, mask)
    return masked_mean((x - mean) ** 2, mask)


class InvariantError(RuntimeError):
    """An identity that holds in a correct run does not; the message names the cause to look
    for."""


def check_rollouts(metrics: dict[str, Any], *, first: bool, tolerance: float) -> None:
    """Raises InvariantError unless sampler and scorer, if both were run, agree and, with
    `first`, the policy is still the reference."""
    if "sampler_gap" in metrics and not (gap := float(metrics["sampler_gap"])) <= tolerance:
        raise InvariantError(
            f"log-probabilities as sampled and as scored differ by {gap:.3g} (tolerance {tolerance:g}): look for "
            "another temperature, dropout, positions, masks or dtype in one of the two; if config.compute.dtype or "
            "config.compute.decoding_dtype has 16 bits, config.tolerance = 0.03 allows for their rounding"
        )
    gap = float(metrics["ref_gap"])
    if first and not gap <= tolerance:
        raise InvariantError(
            f"before the first update the log-probabilities of policy and reference differ by {gap:.3g} (tolerance "
            f"{tolerance:g}): they are not the same parameters, so look at policy_parent and its step, or, with "
            "old_logprobs = 'sampler', config.compute.decoding_dtype is not config.compute.dtype"
        )


def check_update(metrics: dict[str, Any], *, tolerance: float) -> None:
    """Raises InvariantError unless the first inner step saw ratio 1 and nothing clipped,
    both within the tolerance, and all losses are finite."""
    gap, clipped = (
        float(metrics["first_ratio_gap"]),
        float(metrics["first_clipped_fraction"]),
    )
    if not (gap <= tolerance and clipped <= tolerance):
        raise InvariantError(
            f"at the first inner step the ratio is off 1 by {gap:.3g} (tolerance {tolerance:g}) and {clipped:.3g} of "
            "the tokens are clipped: scorer (sampler, if old_logprobs are its) and update run different "
            "parameters, temperature, dropout or dtype"
        )
    for name in ("policy_loss", "value_loss", "ptx_loss"):
        if name in metrics and not jnp.isfinite(metrics[name]):
            raise InvariantError(
                f"{name} is {metrics[name]}: lower the learning rate or look at the scores' scale"
            )
