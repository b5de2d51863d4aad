"""Reductions over the real tokens of the whole (global) batch.

A `mask` is boolean; True marks a real token.
"""

import jax.numpy as jnp

from instructax.types import Array

# Added to the variance before the square root, as in lm-human-preferences.
WHITEN_EPSILON = 1e-8


def token_count(mask: Array) -> Array:
    """The number of real tokens: b[...] → f32[]."""
    return jnp.sum(mask, dtype=jnp.float32)


def masked_sum(x: Array, mask: Array) -> Array:
    """The sum of `x` f32[...] where `mask` b[...] is True → f32[].

    Masked values, even NaN, reach neither the sum nor its gradient.
    """
    return jnp.sum(jnp.where(mask, x, 0.0), dtype=jnp.float32)


def masked_mean(x: Array, mask: Array) -> Array:
    """The mean of `x` f32[...] where `mask` b[...] is True → f32[]; 0 if it never is."""
    return masked_sum(x, mask) / jnp.maximum(token_count(mask), 1.0)


def masked_variance(x: Array, mask: Array) -> Array:
    """The variance of `x` f32[...] where `mask` b[...] is True → f32[].

    That of a population (divided by n), not of a sample (divided by n − 1).
    """
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Array, mask: Array, *, shift_mean: bool) -> Array:
    """(x − mean) / √(variance + ε) over the real tokens.

    Args:
      x: f32[...].
      mask: b[...].
      shift_mean: False adds the mean back, so only the scale changes.

    Returns:
      f32[...], zero where masked.
    """
    x = x.astype(jnp.float32)
    mean = masked_mean(x, mask)
    whitened = (x - mean) / jnp.sqrt(masked_variance(x, mask) + WHITEN_EPSILON)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)
