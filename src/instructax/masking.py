"""Reductions over the real tokens of the whole (global) batch; `mask` is boolean, True
marks a real token."""

import jax.numpy as jnp

from instructax.types import Array

WHITEN_EPSILON = 1e-8  # added to the variance, as in lm-human-preferences


def token_count(mask: Array) -> Array:
    """Number of real tokens: b[...] → f32[]."""
    return jnp.sum(mask, dtype=jnp.float32)


def masked_sum(x: Array, mask: Array) -> Array:
    """Sum of `x` f32[...] where `mask` b[...] → f32[]; masked values, even NaN, never reach
    it nor its gradient."""
    return jnp.sum(jnp.where(mask, x, 0.0), dtype=jnp.float32)


def masked_mean(x: Array, mask: Array) -> Array:
    """Mean of `x` f32[...] where `mask` b[...] → f32[]; 0 if nothing is real."""
    return masked_sum(x, mask) / jnp.maximum(token_count(mask), 1.0)


def whiten(x: Array, mask: Array, *, shift_mean: bool) -> Array:
    """(x − mean) / √(variance + ε) over the real tokens, f32[...]; zero where masked.

    Population variance. With `shift_mean=False` the mean is added back, so that only the
    scale changes.
    """
    x = x.astype(jnp.float32)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) / jnp.sqrt(variance + WHITEN_EPSILON)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)
