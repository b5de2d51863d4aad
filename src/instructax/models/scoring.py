"""Scoring of what is there: log-probabilities of tokens, values before them, scores of
responses; and the gradients of losses on log-probabilities.

All of it is done on rows of tokens with segments and positions (`LmBatch`), packed or not;
rollouts and comparisons are put into rows first, and nothing is ever turned into text on
the way. The sampler is in `sampling`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from instructax.models import (
    Dropout,
    Transformer,
    head_kernel,
    merge_trees,
    positions_from_mask,
    trainable,
)
from instructax.models.logprobs import (
    TokenLoss,
    loss_and_gradients,
    sequence_logprobs,
    sequence_logprobs_and_entropy,
)
from instructax.models.ops import materialized
from instructax.types import Array, Comparisons, LmBatch, Params, Rollouts


def rollout_sequences(rollouts: Rollouts) -> LmBatch:
    """Prompt and response of each rollout as a row [B, P + R]; the loss mask marks the
    response."""
    real = jnp.concatenate([rollouts.prompts.mask, rollouts.mask], axis=1)
    return LmBatch(
        tokens=jnp.concatenate([rollouts.prompts.tokens, rollouts.responses], axis=1),
        segments=real.astype(jnp.int32),
        positions=positions_from_mask(real),
        loss_mask=jnp.concatenate(
            [jnp.zeros_like(rollouts.prompts.mask), rollouts.mask], axis=1
        ),
    )


def comparison_sequences(comparisons: Comparisons) -> LmBatch:
    """Each prompt once and its K responses after it as a row [B, P + K · R], the responses
    at the positions that each would have alone and blind to each other; the loss mask marks
    them."""
    prompts, (batch, count, length) = comparisons.prompts, comparisons.responses.shape
    mask = comparisons.mask & comparisons.valid[:, :, None]
    numbers, columns = (
        jnp.arange(1, count + 1, dtype=jnp.int32),
        jnp.arange(length, dtype=jnp.int32),
    )
    positions = (
        jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)[:, None, None]
        + columns[None, None, :]
    )

    def joined(of_prompts: Array, of_responses: Array) -> Array:
        return jnp.concatenate([of_prompts, of_responses.reshape(batch, -1)], axis=1)

    return LmBatch(
        tokens=joined(prompts.tokens, comparisons.responses),
        segments=joined(
            -prompts.mask.astype(jnp.int32), jnp.where(mask, numbers[None, :, None], 0)
        ),
        positions=joined(
            positions_from_mask(prompts.mask), jnp.broadcast_to(positions, mask.shape)
        ),
        loss_mask=joined(jnp.zeros_like(prompts.mask), mask),
    )


def last_token_columns(mask: Array, prompt_columns: int) -> Array:
    """Where in the rows above the last token of each response stands, or of its prompt if
    it has none: b[B, K, R] → i32[B, K]."""
    lengths = jnp.sum(mask, axis=2, dtype=jnp.int32)
    starts = prompt_columns + jnp.arange(mask.shape[1], dtype=jnp.int32) * mask.shape[2]
    return jnp.where(lengths > 0, starts[None, :] + lengths, prompt_columns) - 1


def _hidden_before(
    model: Transformer, params: Params, batch: LmBatch, dropout: Dropout | None
) -> tuple[Any, ...]:
    """(hidden states [B, T − 1, D], the head's kernel, the tokens that follow and their
    loss mask, both [B, T − 1])."""
    hidden, _ = model.apply(
        {"params": params}, batch.tokens, batch.segments, batch.positions, dropout=dropout
    )
    return (
        materialized(hidden[:, :-1]),
        head_kernel(model.config, params),
        batch.tokens[:, 1:],
        batch.loss_mask[:, 1:],
    )


def _shift_right(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (1, 0)))


def packed_logprobs(
    model: Transformer, params: Params, batch: LmBatch, *, temperature: Array | float
) -> Array:
    """Log-probability of each token of the loss mask given its segment so far, at
    `temperature`, else 0: LmBatch [B, T] → f32[B, T]. Nothing predicts column 0, and no
    loss mask marks it."""
    inputs = _hidden_before(model, params, batch, None)
    chunk, cap = model.compute.head_chunk, model.config.final_logit_softcap
    return _shift_right(
        sequence_logprobs(*inputs, temperature=temperature, chunk=chunk, cap=cap)
    )


def packed_logprobs_and_entropy(
    model: Transformer, params: Params, batch: LmBatch, *, temperature: Array | float
) -> tuple[Array, Array]:
    """As `packed_logprobs`, and the policy's entropy in nats before each of these tokens,
    else 0; both f32[B, T]."""
    inputs = _hidden_before(model, params, batch, None)
    chunk, cap = model.compute.head_chunk, model.config.final_logit_softcap
    logprobs, entropy = sequence_logprobs_and_entropy(
        *inputs, temperature=temperature, chunk=chunk, cap=cap
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
    """A loss that is a mean over the loss mask of packed rows, its metrics, and its
    gradient by what is trained of the parameters.

    `loss_of` and `extras` as in `vocabulary.loss_and_gradients`, the extras [B, T] beside
    the tokens that they belong to. Head and loss run together, chunk by chunk, between the
    forward and the backward pass of the layers.
    """

    def trunk(part: Params) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        hidden, kernel, *rest = _hidden_before(
            model, merge_trees(part, params), batch, dropout
        )
        return (hidden, kernel), tuple(rest)

    (hidden, kernel), pull, (targets, mask) = jax.vjp(
        trunk, trainable(params), has_aux=True
    )
    loss, metrics, *by_outputs = loss_and_gradients(
        loss_of,
        hidden,
        kernel,
        targets,
        mask,
        jax.tree.map(lambda x: x[:, 1:], extras),
        temperature=temperature,
        chunk=model.compute.head_chunk,
        cap=model.config.final_logit_softcap,
    )
    return loss, metrics, pull(tuple(by_outputs))[0]


def packed_outputs(model: Transformer, params: Params, batch: LmBatch) -> Array:
    """The scalar head at each token: f32[B, T]."""
    outputs, _ = model.apply(
        {"params": params}, batch.tokens, batch.segments, batch.positions
    )
    return outputs


def packed_values(model: Transformer, params: Params, batch: LmBatch) -> Array:
    """The value network's estimate before each token of the loss mask, else 0: f32[B, T]."""
    return jnp.where(
        batch.loss_mask, _shift_right(packed_outputs(model, params, batch)[:, :-1]), 0.0
    )


def token_logprobs(
    model: Transformer, params: Params, rollouts: Rollouts, *, temperature: Array | float
) -> Array:
    """Log-probability of each response token given all before it, at `temperature`: f32[B,
    R], zero where masked."""
    logprobs = packed_logprobs(
        model, params, rollout_sequences(rollouts), temperature=temperature
    )
    return logprobs[:, rollouts.prompts.tokens.shape[1] :]


def token_values(model: Transformer, params: Params, rollouts: Rollouts) -> Array:
    """The value network's estimate before each response token: f32[B, R], zero where
    masked."""
    return packed_values(model, params, rollout_sequences(rollouts))[
        :, rollouts.prompts.tokens.shape[1] :
    ]


def sequence_scores(
    model: Transformer, params: Params, responses: Comparisons | Rollouts
) -> Array:
    """The scalar head's output at the last real token: f32[B] for Rollouts, f32[B, K] for
    Comparisons.

    A response without any real token is scored at the prompt's last token.
    """
    rows = (
        rollout_sequences(responses)
        if isinstance(responses, Rollouts)
        else comparison_sequences(responses)
    )
    return select_last_token(packed_outputs(model, params, rows), responses)


def select_last_token(outputs: Array, responses: Comparisons | Rollouts) -> Array:
    """Of outputs [B, P + R] or [B, P + K · R] of the rows of `responses`, those at their
    last real tokens."""
    prompt_columns = responses.prompts.tokens.shape[1]
    if isinstance(responses, Comparisons):
        return jnp.take_along_axis(
            outputs, last_token_columns(responses.mask, prompt_columns), axis=1
        )
    return jnp.take_along_axis(
        outputs, last_token_columns(responses.mask[:, None], prompt_columns), axis=1
    )[:, 0]
