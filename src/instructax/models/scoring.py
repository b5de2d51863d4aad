"""Scores existing token sequences: log-probabilities, values and reward scores, and the
gradients of losses on log-probabilities.

Everything works on rows of tokens with segments and positions (`LmBatch`), packed or not.
Rollouts and comparisons are laid out as such rows first; text never appears. The sampler is
in `instructax.generation`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from instructax.models.attention import positions_from_mask
from instructax.models.layers import Dropout
from instructax.models.logprobs import (
    TokenLoss,
    loss_and_gradients,
    sequence_logprobs,
    sequence_logprobs_and_entropy,
)
from instructax.models.lora import merge_trees, trainable
from instructax.models.ops import materialize
from instructax.models.transformer import Transformer, head_kernel
from instructax.types import Array, Comparisons, LmBatch, Params, Rollouts


def rollout_sequences(rollouts: Rollouts) -> LmBatch:
    """Each prompt followed by its response: LmBatch [B, P + R]. The loss mask covers the
    response."""
    prompts = rollouts.prompts
    # Prompts are padded on the left, responses on the right, so real tokens are adjacent.
    real = jnp.concatenate([prompts.mask, rollouts.mask], axis=1)
    no_prompt = jnp.zeros_like(prompts.mask)
    return LmBatch(
        tokens=jnp.concatenate([prompts.tokens, rollouts.responses], axis=1),
        # One sequence per row, segment 1; 0 is padding.
        segments=real.astype(jnp.int32),
        positions=positions_from_mask(real),
        loss_mask=jnp.concatenate([no_prompt, rollouts.mask], axis=1),
    )


def comparison_sequences(comparisons: Comparisons) -> LmBatch:
    """Each prompt once, followed by its K responses: LmBatch [B, P + K · R].

    Each response has the positions that it would have alone, sees the prompt and does not
    see the other responses. The loss mask covers the responses.
    """
    prompts = comparisons.prompts
    batch, count, length = comparisons.responses.shape
    # Responses that do not exist have no tokens.
    mask = comparisons.mask & comparisons.valid[:, :, None]  # [B, K, R]

    # Responses are segments 1 … K; the prompt is their shared prefix, segment −1.
    numbers = jnp.arange(1, count + 1, dtype=jnp.int32)[None, :, None]
    offsets = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    prompt_lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)[:, None, None]
    # [B, K, R]: all responses continue right after the prompt.
    positions = jnp.broadcast_to(prompt_lengths + offsets, mask.shape)

    # [B, P] and [B, K, R] → [B, P + K · R]
    def join(prompt: Array, responses: Array) -> Array:
        return jnp.concatenate([prompt, responses.reshape(batch, -1)], axis=1)

    return LmBatch(
        tokens=join(prompts.tokens, comparisons.responses),
        segments=join(-prompts.mask.astype(jnp.int32), jnp.where(mask, numbers, 0)),
        positions=join(positions_from_mask(prompts.mask), positions),
        loss_mask=join(jnp.zeros_like(prompts.mask), mask),
    )


def last_token_columns(mask: Array, prompt_columns: int) -> Array:
    """Column of each response's last token in the rows above, or of the prompt's last token
    if the response is empty: b[B, K, R] → i32[B, K]."""
    # Responses are padded on the right, so the length gives the last column.
    lengths = jnp.sum(mask, axis=2, dtype=jnp.int32)
    # [K], the first column of each response
    starts = prompt_columns + jnp.arange(mask.shape[1], dtype=jnp.int32) * mask.shape[2]
    return jnp.where(lengths > 0, starts[None, :] + lengths, prompt_columns) - 1


def select_last_token(outputs: Array, responses: Comparisons | Rollouts) -> Array:
    """The outputs at the responses' last tokens, in rows laid out as above.

    f32[B, P + K · R] → f32[B, K] for comparisons, f32[B, P + R] → f32[B] for rollouts.
    """
    prompt_columns = responses.prompts.tokens.shape[1]
    if isinstance(responses, Comparisons):
        columns = last_token_columns(responses.mask, prompt_columns)
        return jnp.take_along_axis(outputs, columns, axis=1)
    columns = last_token_columns(responses.mask[:, None], prompt_columns)
    return jnp.take_along_axis(outputs, columns, axis=1)[:, 0]


def _hidden_and_targets(
    model: Transformer, params: Params, batch: LmBatch, dropout: Dropout | None
) -> tuple[Array, Array, Array, Array]:
    """Hidden states [B, T − 1, D], the head's kernel, and the tokens that they predict with
    their loss mask, both [B, T − 1]."""
    hidden, _ = model.apply(
        {"params": params}, batch.tokens, batch.segments, batch.positions, dropout=dropout
    )
    # The chunks of the head all read it: compute it once.
    hidden = materialize(hidden[:, :-1])
    kernel = head_kernel(model.config, params)
    return hidden, kernel, batch.tokens[:, 1:], batch.loss_mask[:, 1:]


def _shift_right(x: Array) -> Array:
    """[B, T − 1] → [B, T] with a zero in front: from predicting to predicted positions."""
    return jnp.pad(x, ((0, 0), (1, 0)))


def packed_logprobs(
    model: Transformer, params: Params, batch: LmBatch, *, temperature: Array | float
) -> Array:
    """Log-probability of each token given its segment so far, at `temperature`: LmBatch
    [B, T] → f32[B, T], zero outside the loss mask. Nothing predicts column 0, which no loss
    mask covers."""
    # Position t predicts token t + 1, so the result has T − 1 columns until it is shifted.
    hidden, kernel, targets, mask = _hidden_and_targets(model, params, batch, None)
    logprobs = sequence_logprobs(
        hidden,
        kernel,
        targets,
        mask,
        temperature=temperature,
        chunk=model.compute.head_chunk,
        cap=model.config.final_logit_softcap,
    )
    return _shift_right(logprobs)


def packed_logprobs_and_entropy(
    model: Transformer, params: Params, batch: LmBatch, *, temperature: Array | float
) -> tuple[Array, Array]:
    """`packed_logprobs`, and the entropy in nats of the distribution that predicts each
    token: both f32[B, T], zero outside the loss mask."""
    hidden, kernel, targets, mask = _hidden_and_targets(model, params, batch, None)
    logprobs, entropy = sequence_logprobs_and_entropy(
        hidden,
        kernel,
        targets,
        mask,
        temperature=temperature,
        chunk=model.compute.head_chunk,
        cap=model.config.final_logit_softcap,
    )
    return _shift_right(logprobs), _shift_right(entropy)


def packed_loss_and_gradients(
    model: Transformer,
    params: Params,
    batch: LmBatch,
    loss_of: TokenLoss,
    extras: Any,
    *,
    temperature: Array | float,
    dropout: Dropout | None = None,
) -> tuple[Array, dict[str, Array], Params]:
    """A loss that is a mean over the loss mask, and its gradient.

    Head and loss run chunk by chunk between the forward and the backward pass of the
    layers.

    Args:
      model, params: the network; only `trainable(params)` gets a gradient.
      batch: LmBatch [B, T].
      loss_of: the loss and metrics of one chunk, as in `logprobs.loss_and_gradients`.
      extras: tree of [B, T] for `loss_of`, each value at the token it belongs to.
      temperature: divides the logits.
      dropout: residual dropout; None for none.

    Returns:
      (loss f32[], metrics, gradients of `trainable(params)`).
    """

    def forward(part: Params) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        merged = merge_trees(part, params)
        hidden, kernel, targets, mask = _hidden_and_targets(model, merged, batch, dropout)
        return (hidden, kernel), (targets, mask)

    # Only the trained part is differentiated; with LoRA that saves the kernels' gradients.
    (hidden, kernel), pull_back, (targets, mask) = jax.vjp(
        forward, trainable(params), has_aux=True
    )
    loss, metrics, hidden_gradient, kernel_gradient = loss_and_gradients(
        loss_of,
        hidden,
        kernel,
        targets,
        mask,
        # Extras belong to tokens; position t predicts token t + 1.
        jax.tree.map(lambda x: x[:, 1:], extras),
        temperature=temperature,
        chunk=model.compute.head_chunk,
        cap=model.config.final_logit_softcap,
    )
    (gradients,) = pull_back((hidden_gradient, kernel_gradient))
    return loss, metrics, gradients


def packed_outputs(model: Transformer, params: Params, batch: LmBatch) -> Array:
    """The scalar head at each token: LmBatch [B, T] → f32[B, T]."""
    # The scalar head needs no chunks: one number per token.
    outputs, _ = model.apply(
        {"params": params}, batch.tokens, batch.segments, batch.positions
    )
    return outputs


def packed_values(model: Transformer, params: Params, batch: LmBatch) -> Array:
    """The value model's estimate before each token: LmBatch [B, T] → f32[B, T], zero
    outside the loss mask."""
    # The output at t − 1 is the estimate before token t, as for log-probabilities.
    outputs = packed_outputs(model, params, batch)
    return jnp.where(batch.loss_mask, _shift_right(outputs[:, :-1]), 0.0)
