"""Identities that hold in every correct iteration; a run that breaks one stops."""

from typing import Any

import jax.numpy as jnp


class InvariantError(RuntimeError):
    """An identity of a correct run is broken; the message says where to look."""


# Loss → the config field of the optimizer that minimizes it.
OPTIMIZERS = {
    "policy_loss": "optimizer",
    "value_loss": "value_optimizer",
    "ptx_loss": "optimizer",
}


def check_rollouts(metrics: dict[str, Any], *, first: bool, tolerance: float) -> None:
    """Checks that sampled and recomputed log-probabilities agree and that the first policy
    is the reference.

    Args:
      metrics: of `score`; without `sampler_gap` if log-probabilities were not recomputed.
      first: whether this is the first iteration.
      tolerance: nats, mean over tokens.

    Raises:
      InvariantError: with the gap and its likely causes.
    """
    # `not gap <= tolerance`, unlike `gap > tolerance`, is also true for NaN.
    # Sampler and scoring pass share parameters and tokens, so they must agree up to
    # rounding.
    if "sampler_gap" in metrics:
        # A mean, because single tokens may differ by much more in 16 bits.
        gap = float(metrics["sampler_gap"])
        if not gap <= tolerance:
            raise InvariantError(
                f"sampled and recomputed log-probabilities differ by {gap:.3g} (tolerance "
                f"{tolerance:g}): look for a difference in temperature, dropout, "
                "positions, masks or dtype between the two; if config.compute.dtype or "
                "config.compute.decoding_dtype has 16 bits, config.tolerance = 0.03 "
                "allows for their rounding"
            )
    # The reference is the policy's parent, so before the first update their KL is zero.
    gap = float(metrics["ref_gap"])
    if first and not gap <= tolerance:
        raise InvariantError(
            "before the first update the log-probabilities of policy and reference differ "
            f"by {gap:.3g} (tolerance {tolerance:g}): they are not the same parameters; "
            "look at policy_parent and its step, or, with old_logprobs = 'sampled', "
            "at config.compute.decoding_dtype, which must equal config.compute.dtype"
        )


def check_update(metrics: dict[str, Any], *, tolerance: float) -> None:
    """Checks that the first optimizer step saw ratio 1 with nothing clipped, and that all
    losses are finite.

    Raises:
      InvariantError: with the value and its likely causes.
    """
    # Old log-probabilities were computed with the parameters that the first step starts
    # from. A mismatch does not crash PPO; it silently biases every update.
    gap = float(metrics["first_ratio_gap"])
    clipped = float(metrics["first_clipped_fraction"])
    if not (gap <= tolerance and clipped <= tolerance):
        raise InvariantError(
            f"at the first optimizer step the ratio differs from 1 by {gap:.3g} (tolerance "
            f"{tolerance:g}) and {clipped:.3g} of the tokens are clipped: old_logprobs and "
            "the update disagree; check parameters, temperature, dropout and dtype of the "
            "pass (or, with old_logprobs = 'sampled', the sampler) that produced them"
        )
    # "ptx_loss" is missing if there is no pretraining text.
    for name, optimizer in OPTIMIZERS.items():
        if name in metrics and not jnp.isfinite(metrics[name]):
            raise InvariantError(
                f"{name} is {metrics[name]}, which must be finite: lower "
                f"config.{optimizer}.learning_rate or look at the scale of the scores"
            )
