"""Gradients of PPO's three losses over one minibatch: policy, value and pretraining."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructax.losses import clipped_policy_loss, clipped_value_loss
from instructax.masking import masked_mean, token_count
from instructax.models.lora import merge_trees, trainable
from instructax.models.scoring import packed_loss_and_gradients, packed_values
from instructax.models.transformer import Transformer
from instructax.stages.ppo.experience import MAX_METRIC_LOG_RATIO, Minibatch
from instructax.training.accumulation import (
    accumulate,
    accumulate_packed,
    microbatch_count,
    microbatch_weights,
    next_token_gradients,
    scale_tree,
    split_microbatches,
)
from instructax.types import Array, LmBatch, Params

# Rows [rows, columns] and the arrays of the same shape that a loss reads beside them.
Microbatch = tuple[LmBatch, Any]


def policy_loss_gradients(
    policy: Transformer,
    params: Params,
    minibatch: Minibatch,
    *,
    clip: Array,
    temperature: Array,
) -> tuple[Params, dict[str, Array]]:
    """Gradient and metrics of the clipped policy loss.

    Args:
      policy: the policy's architecture.
      params: the policy's parameters.
      minibatch: the rollouts of one optimizer step.
      clip: f32[], of the probability ratio.
      temperature: f32[], of the rollouts.

    Returns:
      (gradients of the trainable parameters, metrics f32[])
    """

    # Called chunk by chunk with f32[rows, chunk]: whole logits [rows, W, V] never exist.
    def loss_of(
        logprobs: Array, mask: Array, extras: tuple[Array, Array]
    ) -> tuple[Array, dict[str, Array]]:
        old_logprobs, advantages = extras
        loss, clipped_fraction = clipped_policy_loss(
            logprobs, old_logprobs, advantages, mask, clip=clip
        )
        metrics = _ratio_metrics(logprobs, old_logprobs, mask)
        return loss, {"clipped_fraction": clipped_fraction, **metrics}

    def gradients_of(microbatch: Microbatch) -> tuple[Params, dict[str, Array]]:
        rows, extras = microbatch
        loss, metrics, gradients = packed_loss_and_gradients(
            policy, params, rows, loss_of, extras, temperature=temperature
        )
        return gradients, {"policy_loss": loss, **metrics}

    # Constants of the loss: no gradient flows into them.
    extras = (minibatch.old_logprobs, minibatch.advantages)
    return _accumulate_minibatch(gradients_of, minibatch, extras)


def _ratio_metrics(logprobs: Array, old_logprobs: Array, mask: Array) -> dict[str, Array]:
    """How far the policy has moved from the one that sampled; arrays f32[rows, chunk]."""
    # log(π / π_old); masked first, since the exponential of padding could overflow.
    log_ratios = jnp.where(mask, logprobs - old_logprobs, 0.0)
    ratios_minus_one = jnp.expm1(jnp.minimum(log_ratios, MAX_METRIC_LOG_RATIO))
    return {
        # The k3 estimate of KL(old policy ‖ policy): E_old[ratio − 1 − log ratio].
        "update_kl": masked_mean(ratios_minus_one - log_ratios, mask),
        # Mean of |ratio − 1|, zero (up to rounding) at the first step of an iteration.
        "ratio_gap": masked_mean(jnp.abs(ratios_minus_one), mask),
    }


def value_loss_gradients(
    value_model: Transformer, params: Params, minibatch: Minibatch, *, clip: Array | None
) -> tuple[Params, dict[str, Array]]:
    """Gradient and metrics of the value loss.

    Args:
      value_model: the value model's architecture.
      params: the value model's parameters.
      minibatch: the rollouts of one optimizer step.
      clip: f32[], of the change of an estimate, or None for no clipping.

    Returns:
      (gradients of the trainable parameters, metrics f32[])
    """

    def gradients_of(microbatch: Microbatch) -> tuple[Params, dict[str, Array]]:
        rows, (old_values, returns) = microbatch

        def loss_of(trained: Params) -> tuple[Array, dict[str, Array]]:
            # With adapters `trained` is a small part of the tree; the rest is not
            # differentiated.
            values = packed_values(value_model, merge_trees(trained, params), rows)
            loss, clipped_fraction = clipped_value_loss(
                values, old_values, returns, rows.loss_mask, clip=clip
            )
            return loss, {"value_loss": loss, "value_clipped_fraction": clipped_fraction}

        # The scalar head is small, so the whole microbatch is differentiated at once.
        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        (_, metrics), gradients = differentiate(trainable(params))
        return gradients, metrics

    # The values from before the update, around which the new ones are clipped.
    extras = (minibatch.values, minibatch.returns)
    return _accumulate_minibatch(gradients_of, minibatch, extras)


def ptx_loss_gradients(
    policy: Transformer, params: Params, text: LmBatch, *, mesh: Mesh
) -> tuple[Params, Array]:
    """Gradient of the pretraining loss over one optimizer step's text, before `ptx_coef`,
    and the loss f32[]."""
    # The number of text rows is static, so they need no packing on the device.
    rows = text.tokens.shape[0]
    count = microbatch_count(rows, policy.compute.microbatch_rows, mesh)
    microbatches = split_microbatches(text, count, mesh)
    # f32[count], trained tokens of each microbatch.
    token_counts = jnp.sum(microbatches.loss_mask, axis=(1, 2), dtype=jnp.float32)
    weights = microbatch_weights(token_counts)
    gradients, metrics = accumulate(
        partial(next_token_gradients, policy, params), microbatches, weights
    )
    return gradients, jnp.sum(weights * metrics["loss"])


def _accumulate_minibatch(
    gradients_of: Callable[[Microbatch], tuple[Params, dict[str, Array]]],
    minibatch: Minibatch,
    extras: Any,
) -> tuple[Params, dict[str, Array]]:
    """Gradient and metrics of a loss that is a mean over a minibatch's response tokens.

    Args:
      gradients_of: microbatch → (gradients, metrics).
      minibatch: the rows.
      extras: arrays [rows, shards, W] that the loss reads beside the rows.
    """
    # Weighted by tokens, not by microbatches, so the result does not depend on how rows are
    # split. At least 1: a minibatch without response tokens gives zeros, not NaN.
    total = jnp.maximum(token_count(minibatch.rows.loss_mask), 1.0)

    def weighted_gradients_of(microbatch: Microbatch) -> Any:
        # This microbatch's fraction of the minibatch's response tokens.
        weight = token_count(microbatch[0].loss_mask) / total
        return scale_tree(weight, gradients_of(microbatch))

    return accumulate_packed(
        weighted_gradients_of, (minibatch.rows, extras), minibatch.layout
    )
