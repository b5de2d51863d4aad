"""From scored rollouts to what the PPO update reads: rewards, advantages, minibatches, and
the metrics of one iteration.

The paper leaves λ, whitening and the treatment of responses without an end token open; here
they are settings.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructax.advantages import generalized_advantages, kl_penalized_rewards
from instructax.masking import masked_mean, token_count, whiten
from instructax.models.config import ComputeConfig
from instructax.models.scoring import rollout_sequences
from instructax.models.sequence_packing import PackedLayout, pack, plan_packing
from instructax.training.accumulation import split_microbatches
from instructax.types import Array, Experience, LmBatch, Scored, pytree

# Metrics that compare the sampler with a second pass of the policy.
SAMPLER_GAPS = ("sampler_gap", "sampler_gap_max")

# Largest −log ratio that enters the k3 estimate, so that one sampled token which the policy
# all but excludes cannot turn the mean into infinity: e³⁰ is 1e13.
MAX_LOG_RATIO = 30.0


@pytree
class AdvantageSettings:
    """What turns scores into advantages; arrays, so that a sweep compiles once."""

    # All f32[] scalars, or f32[runs] under a sweep's vmap.
    kl_coef: Array  # f32[], β of Eq. 2
    discount: Array  # f32[]
    lambda_: Array  # f32[], of generalized advantage estimation
    no_eos_penalty: Array  # f32[], see `penalized_scores`


def penalized_scores(
    scores: Array,
    ended: Array,
    penalty: Array | float,
    rule: Literal["subtract", "replace"],
) -> Array:
    """Scores with the penalty for responses that were cut off before an end token.

    The paper does not say what it does. Its ancestors (Ziegler et al. 2019, Stiennon et al.
    2020) replace the score by a constant, −1. The default here, which all experiments use,
    subtracts from the score instead, so that cut-off responses are still ranked.

    Args:
      scores: f32[B], from the reward model.
      ended: b[B], whether the response has an end token.
      penalty: f32[], `no_eos_penalty`.
      rule: "subtract" gives score − penalty, "replace" gives −penalty.

    Returns:
      f32[B]
    """
    # Where the response ended both rules return the score itself.
    if rule == "replace":
        return jnp.where(ended, scores, -penalty)
    return scores - penalty * (~ended)


def make_experience(
    scored: Scored,
    logprobs: Array,
    settings: AdvantageSettings,
    *,
    no_eos_rule: Literal["subtract", "replace"],
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> tuple[Experience, Array]:
    """Rewards, advantages and returns of one batch of rollouts.

    Args:
      scored: rollouts with reference log-probabilities, values and scores.
      logprobs: f32[B, R], the policy's; they become the `old_logprobs` of the ratio. When
        recomputed they equal what the update computes first; when sampled they differ by
        the sampler's rounding.
      settings: coefficients.
      no_eos_rule: see `penalized_scores`.
      whiten_rewards: scale rewards to variance 1, keeping their mean.
      whiten_advantages: shift and scale advantages to mean 0 and variance 1.

    Returns:
      (experience, rewards f32[B, R] before whitening)
    """
    rollouts = scored.rollouts
    mask = rollouts.mask
    rewards = _token_rewards(scored, logprobs, settings, no_eos_rule)

    # Whitening keeps the mean of the rewards: a shift would be a bonus for length.
    scaled_rewards = rewards
    if whiten_rewards:
        scaled_rewards = whiten(rewards, mask, shift_mean=False)
    # Returns are the target of the value loss: advantages before whitening + values.
    advantages, returns = generalized_advantages(
        scaled_rewards,
        scored.values,
        mask,
        discount=settings.discount,
        lambda_=settings.lambda_,
    )
    if whiten_advantages:
        advantages = whiten(advantages, mask, shift_mean=True)
    experience = Experience(
        rollouts=rollouts,
        old_logprobs=logprobs,
        values=scored.values,
        advantages=advantages,
        returns=returns,
    )
    return experience, rewards


def _token_rewards(
    scored: Scored,
    logprobs: Array,
    settings: AdvantageSettings,
    no_eos_rule: Literal["subtract", "replace"],
) -> Array:
    """The reward of each token, f32[B, R]: −β · log(π / π_ref) everywhere, and the score,
    with the penalty for a missing end token, at the last one (paper, Eq. 2)."""
    rollouts = scored.rollouts
    scores = penalized_scores(
        scored.scores, rollouts.ended, settings.no_eos_penalty, no_eos_rule
    )
    return kl_penalized_rewards(
        scores, logprobs, scored.ref_logprobs, rollouts.mask, kl_coef=settings.kl_coef
    )


@pytree
class Minibatch:
    """The rollouts of one optimizer step in packed rows; per-token arrays are aligned with
    the response tokens."""

    # Prompts are in the rows too, since responses attend to them, but have no loss.
    rows: LmBatch  # [rows, shards, W], the loss mask marks response tokens
    old_logprobs: Array  # f32[rows, shards, W], like the next three
    values: Array
    advantages: Array
    returns: Array
    layout: PackedLayout


def shuffled_minibatches(
    experience: Experience, key: Array, *, epochs: int, minibatches: int, mesh: Mesh
) -> Experience:
    """The rollouts in a new random order for each epoch.

    [B, ...] → [epochs · minibatches, B / minibatches, ...]
    """
    # [epochs] keys, one permutation of B rollouts each.
    count = experience.advantages.shape[0]
    epoch_keys = jax.random.split(key, epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, count))(epoch_keys)
    order = order.reshape(-1)  # i32[epochs · B]
    # Every rollout occurs once per epoch, since B is a multiple of the number of
    # minibatches.
    shuffled = jax.tree.map(lambda x: jnp.take(x, order, axis=0), experience)
    return split_microbatches(shuffled, epochs * minibatches, mesh)


def pack_minibatch(
    experience: Experience, *, width: int, compute: ComputeConfig, mesh: Mesh
) -> Minibatch:
    """Packs the rollouts of one minibatch into rows of `width` tokens."""
    # Each minibatch is packed anew: the rollouts that share a row change with the order.
    sequences = rollout_sequences(experience.rollouts)
    layout = plan_packing(sequences.segments != 0, width=width, compute=compute, mesh=mesh)
    start = experience.rollouts.prompts.tokens.shape[1]  # P, where responses begin

    # The prompt's columns are zero-filled; the loss mask excludes them.
    def spread(per_token: Array) -> Array:
        """f32[B, R] → f32[rows, shards, W]"""
        return layout.scatter(jnp.pad(per_token, ((0, 0), (start, 0))))

    return Minibatch(
        rows=pack(sequences, layout),
        old_logprobs=spread(experience.old_logprobs),
        values=spread(experience.values),
        advantages=spread(experience.advantages),
        returns=spread(experience.returns),
        layout=layout,
    )


def diagnostics(
    scored: Scored, logprobs: Array, entropy: Array, rewards: Array, returns: Array
) -> dict[str, Array]:
    """Metrics of one iteration, f32[] each, in nats.

    `kl` is Σ_t log(π / π_ref), the k1 estimate on sampled tokens; `kl_k3` is
    Σ_t (π_ref / π − 1 − log(π_ref / π)), which is never negative; both are means over
    responses. Gaps are means over tokens of the absolute difference between two
    log-probabilities: sampled and recomputed (`sampler_gap`), policy and reference
    (`ref_gap`). A mean stays small under 16-bit rounding; the largest token need not.

    Args:
      scored: rollouts with reference log-probabilities, values and scores.
      logprobs: f32[B, R], the policy's.
      entropy: f32[B, R], the policy's before each token.
      rewards: f32[B, R], before whitening.
      returns: f32[B, R].
    """
    rollouts = scored.rollouts
    mask = rollouts.mask
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)

    # Both KL estimates have the same expectation; k3 has less variance (Schulman 2020).
    log_ratios = jnp.where(mask, logprobs - scored.ref_logprobs, 0.0)
    kl = jnp.sum(log_ratios, axis=1)  # f32[B]
    capped = jnp.minimum(-log_ratios, MAX_LOG_RATIO)
    k3 = jnp.where(mask, jnp.expm1(capped) + log_ratios, 0.0)
    # Not zero in a correct run either: the sampler rounds differently.
    sampler_gaps = jnp.abs(logprobs - rollouts.logprobs)

    residual = _variance(returns - scored.values, mask)
    unexplained = residual / jnp.maximum(_variance(returns, mask), 1e-8)
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
        "explained_variance": 1.0 - unexplained,
        "response_length": jnp.mean(lengths),
        "response_length_max": jnp.max(lengths),
        "ended_share": jnp.mean(rollouts.ended, dtype=jnp.float32),
        "tokens": token_count(mask) + token_count(rollouts.prompts.mask),
    }


def _variance(x: Array, mask: Array) -> Array:
    # Population variance over real tokens.
    mean = masked_mean(x, mask)
    return masked_mean((x - mean) ** 2, mask)
