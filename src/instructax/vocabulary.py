"""From hidden states to log-probabilities of tokens, a few sequence positions at a time.

Scores over the whole vocabulary exist for `chunk` positions only, in the forward and (by recomputation) in the backward
pass: no buffer of shape [B, T, V] is ever made.
"""

from functools import partial

import jax
import jax.numpy as jnp

from instructax.types import Array


def logits_of(hidden: Array, kernel: Array) -> Array:
    """Scores over the vocabulary: dtype[..., D], f32[V, D] → f32[..., V], accumulated in float32."""
    contract = (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(hidden, kernel.astype(hidden.dtype), contract, preferred_element_type=jnp.float32)


def sequence_logprobs(hidden: Array, kernel: Array, targets: Array, *, temperature: Array | float, chunk: int) -> Array:
    """log softmax(logits / temperature) at the targets.

    `hidden` dtype[B, T, D], `kernel` f32[V, D], `targets` i32[B, T] → f32[B, T]. Differentiable.
    """
    return _by_chunks(partial(_logprobs, temperature=temperature), hidden, kernel, targets, chunk)


def sequence_logprobs_and_entropy(
    hidden: Array, kernel: Array, targets: Array, *, temperature: Array | float, chunk: int
) -> tuple[Array, Array]:
    """As `sequence_logprobs`, and the entropy in nats of the distribution at each position: (f32[B, T], f32[B, T])."""
    return _by_chunks(partial(_logprobs_and_entropy, temperature=temperature), hidden, kernel, targets, chunk)


def _logprobs(hidden, kernel, targets, *, temperature):
    logits = logits_of(hidden, kernel) / temperature
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _logprobs_and_entropy(hidden, kernel, targets, *, temperature):
    logprobs = jax.nn.log_softmax(logits_of(hidden, kernel) / temperature, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def _by_chunks(function, hidden: Array, kernel: Array, targets: Array, chunk: int):
    """Applies `function(hidden, kernel, targets)` to slices of `chunk` positions and joins the results to [B, T]."""
    batch, length, width = hidden.shape
    chunk = min(chunk, length)
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    slices = (length + padding) // chunk
    hidden = hidden.reshape(batch, slices, chunk, width).swapaxes(0, 1)
    targets = targets.reshape(batch, slices, chunk).swapaxes(0, 1)
    # The checkpoint makes the backward pass recompute the scores instead of keeping them.
    step = jax.checkpoint(lambda _, inputs: (None, function(inputs[0], kernel, inputs[1])), prevent_cse=False)
    _, results = jax.lax.scan(step, None, (hidden, targets))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length], results)
