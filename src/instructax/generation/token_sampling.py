"""Draws one token per row from logits."""

import jax
import jax.numpy as jnp
import numpy as np

from instructax.models.logprobs import scaled_logits
from instructax.types import Array


def float32_temperature(temperature: float) -> np.float32:
    """The temperature as the sampler reads it.

    Positive temperatures below the smallest normal float32 are raised to it. As 0 they
    would be greedy too, but with the log-probabilities of temperature 1.
    """
    if temperature > 0:
        return np.float32(max(temperature, float(np.finfo(np.float32).tiny)))
    return np.float32(0)


def sample_token(logits: Array, keys: Array, temperature: Array) -> tuple[Array, Array]:
    """Samples one token per row.

    Inverts the cumulative distribution at one uniform number per row. (Gumbel noise for the
    whole vocabulary would cost a quarter of a decoding step on a CPU.) Probabilities below
    2⁻²⁴ are beyond the resolution of the uniform number and of the cumulative sum; a token
    of probability zero is never drawn. Temperature 0 takes the most likely token and
    reports its log-probability at temperature 1.

    Args:
      logits: f32[B, V].
      keys: key[B].
      temperature: f32[] or f32[B].

    Returns:
      The tokens i32[B] and their log-probabilities f32[B].
    """
    # Temperature 0 would divide by zero; it takes the other branch at the end.
    divisors = jnp.reshape(jnp.where(temperature > 0, temperature, 1.0), (-1, 1))
    # [B, V]
    logprobs = jax.nn.log_softmax(scaled_logits(logits, divisors), axis=-1)
    probabilities = jnp.exp(logprobs)

    # A parallel cumulative sum is rounded in no fixed order, so it can rise even at a token
    # of probability zero. Such tokens are masked out.
    cumulative = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0.0)
    total = jnp.max(cumulative, axis=-1, keepdims=True)

    # One uniform number per row, [B, 1], whatever the other rows are.
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (1,)))(keys)
    # Strictly below the total: after rounding, no token might exceed the total itself.
    points = jnp.minimum(uniforms * total, jnp.nextafter(total, jnp.zeros_like(total)))
    # argmax of booleans: the first token whose cumulative probability passes the point.
    sampled = jnp.argmax(cumulative > points, axis=-1).astype(jnp.int32)
    most_likely = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = jnp.where(temperature > 0, sampled, most_likely)
    # [B, V] → [B]
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
