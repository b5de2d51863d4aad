"""From scored rollouts to what the PPO update reads: rewards, advantages, minibatches, and
the metrics of one iteration.

The paper leaves λ, whitening and the treatment of responses without an end token open; here
they are config fields. Whitened advantages are not in the paper; they are in Ziegler et al.
(2019).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructax.advantages import generalized_advantages, kl_penalized_rewards
from instructax.masking import masked_mean, masked_variance, token_count, whiten
from instructax.models.config import ComputeConfig
from instructax.models.scoring import rollout_sequences
from instructax.models.sequence_packing import PackedLayout, pack, plan_packing
from instructax.stages.ppo.program import AdvantageSettings
from instructax.training.accumulation import split_microbatches
from instructax.types import Array, Experience, LmBatch, Scored, pytree

# Metrics that compare the sampler with a second pass of the policy.
SAMPLER_GAPS = ("sampler_gap", "sampler_gap_max")

# Largest log ratio of two policies that enters the exponential of a metric. A token that
# one policy all but excludes then cannot turn a mean into infinity: e³⁰ is 1e13.
MAX_METRIC_LOG_RATIO = 30.0

# Smallest variance of the returns in the denominator of `explained_variance`.
MIN_VARIANCE = 1e-8


def subtract_penalty(scores: Array, ended: Array, penalty: Array | float) -> Array:
    """score − penalty for a response without an end token, the score for all others.

    Unlike a constant, it still ranks the responses that were cut off.

    Args:
      scores: f32[B], from the reward model.
      ended: b[B], whether the response has an end token.
      penalty: f32[], `no_eos_penalty`.

    Returns:
      f32[B]
    """
    return scores - penalty * (~ended)


def replace_by_penalty(scores: Array, ended: Array, penalty: Array | float) -> Array:
    """−penalty for a response without an end token, the score for all others.

    As in Ziegler et al. (2019) and Stiennon et al. (2020), where the penalty is 1.
    Arguments and result are those of `subtract_penalty`.
    """
    return jnp.where(ended, scores, -penalty)


# The paper does not say what happens to responses that are cut off before an end token. All
# experiments use "subtract".
NO_EOS_RULES = {"subtract": subtract_penalty, "replace": replace_by_penalty}


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
      logprobs: f32[B, R], the policy's, recomputed or sampled; the later `old_logprobs`.
      settings: coefficients.
      no_eos_rule: name of a function in `NO_EOS_RULES`.
      whiten_rewards, whiten_advantages: scale to variance 1; advantages to mean 0 too.

    Returns:
      (experience, rewards f32[B, R] before whitening)
    """
    rollouts = scored.rollouts
    mask = rollouts.mask
    penalize = NO_EOS_RULES[no_eos_rule]
    scores = penalize(scored.scores, rollouts.ended, settings.no_eos_penalty)
    # −β · log(π / π_ref) at every token, and the score at the last one (paper, Eq. 2).
    rewards = kl_penalized_rewards(
        scores, logprobs, scored.ref_logprobs, mask, kl_coef=settings.kl_coef
    )

    # Whitening keeps the mean of the rewards: a shift would be a bonus for length.
    whitened = whiten(rewards, mask, shift_mean=False) if whiten_rewards else rewards
    # Returns are the target of the value loss: advantages before whitening + values.
    advantages, returns = generalized_advantages(
        whitened,
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


@pytree
class Minibatch:
    """The rollouts of one optimizer step in packed rows; per-token arrays are aligned with
    the response tokens."""

    # Prompts are in the rows too, since responses attend to them, but have no loss.
    rows: LmBatch  # [rows, shards, W], the loss mask marks response tokens
    old_logprobs: Array  # f32[rows, shards, W]
    values: Array  # f32[rows, shards, W]
    advantages: Array  # f32[rows, shards, W]
    returns: Array  # f32[rows, shards, W]
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
    capped = jnp.minimum(-log_ratios, MAX_METRIC_LOG_RATIO)
    k3 = jnp.where(mask, jnp.expm1(capped) + log_ratios, 0.0)
    # Not zero in a correct run either: the sampler rounds differently.
    sampler_gaps = jnp.abs(logprobs - rollouts.logprobs)

    residual = masked_variance(returns - scored.values, mask)
    # Equal returns have no variance to explain; the bound avoids 0 / 0.
    variance = jnp.maximum(masked_variance(returns, mask), MIN_VARIANCE)
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
        "rewards": jnp.mean(jnp.sum(rewards, axis=1, where=mask)),
        "values": masked_mean(scored.values, mask),
        "explained_variance": 1.0 - residual / variance,
        "response_length": jnp.mean(lengths),
        "response_length_max": jnp.max(lengths),
        "ended_share": jnp.mean(rollouts.ended, dtype=jnp.float32),
        "tokens": token_count(mask) + token_count(rollouts.prompts.mask),
    }
