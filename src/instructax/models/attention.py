"""Attention masks, positions and dot-product attention, as functions of arrays.

A token carries a segment id. Segment 0 is padding; equal segments of a row attend to each
other causally. Several responses can share one prompt: the prompt has a negative segment,
and the responses, segments of their own, attend to it but not to each other.
"""

import jax.numpy as jnp
import numpy as np

from instructax.models.config import ModelConfig
from instructax.models.ops import einsum, softcap, softmax_weighted_sum
from instructax.types import Array

# Segments 1 … 1024 also attend to segment −1, the next 1024 to segment −2, and so on.
SEGMENTS_PER_PREFIX = 1024
# Finite, so that a padded query, which sees no key, gets a finite (and unused) output.
MASKED_SCORE = -1e30
# Causal attention is computed in blocks of at least this many queries…
MIN_QUERY_BLOCK = 128
# … and in at most this many blocks, to bound the size of the program.
MAX_QUERY_BLOCKS = 8


def positions_from_mask(mask: Array) -> Array:
    """Index of each real token among the real tokens of its row: b[B, T] → i32[B, T].

    Padding before the first real token gets position 0.
    """
    # Padding between real tokens repeats the position before it, which nothing reads.
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def attention_mask(
    query_segments: Array, key_segments: Array, first_column: Array | int
) -> Array:
    """Which keys each query sees: those of its own segment and of its shared prefix, except
    the keys of later queries.

    Columns that no query of this call writes belong to earlier calls, so they count as
    past wherever they are in the cache.

    Args:
      query_segments: i32[B, T].
      key_segments: i32[B, S], the segments in the cache after the queries' own are written.
      first_column: i32[] or i32[B], column of the first query's key.

    Returns:
      b[B, T, S].
    """
    # A query may not see the keys that later queries of this call wrote.
    queries = jnp.arange(query_segments.shape[1])[None, :, None]  # [1, T, 1]
    columns = jnp.arange(key_segments.shape[1])[None, :]
    # Index of the query that wrote each column, if one of this call did: [1 or B, 1, S].
    writer = (columns - jnp.reshape(first_column, (-1, 1)))[:, None, :]
    future = (writer > queries) & (writer < query_segments.shape[1])

    # Segment n attends to the prefix −⌈n / SEGMENTS_PER_PREFIX⌉; prefixes to themselves.
    prefix = -((query_segments - 1) // SEGMENTS_PER_PREFIX) - 1
    prefix = jnp.where(query_segments > 0, prefix, query_segments)
    keys = key_segments[:, None, :]
    # [B, T, S]. Comparing ids is all that is needed: causality is in `future`.
    same = (keys == query_segments[:, :, None]) | (keys == prefix[:, :, None])
    return ~future & same & (keys != 0)


def window_mask(query_positions: Array, key_positions: Array, window: int) -> Array:
    """Which keys are among the last `window` tokens up to each query,
    itself included: i32[B, T], i32[B, S] → b[B, T, S]."""
    # Positions, not columns: rows of a cache may contain padding.
    return key_positions[:, None, :] > query_positions[:, :, None] - window


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians that each pair of components rotates per position: f64[rotary_dim / 2]."""
    # One frequency per pair of components, computed in float64 at trace time.
    half = config.rotary_dim // 2
    frequencies = config.rotary_base ** (-np.arange(half) / half)
    scaling = config.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor

    # Llama 3.1: high frequencies are kept, low ones scaled, interpolated in between.
    # Rotations over the original context: few = low frequency.
    turns = scaling.original_max_length * frequencies / (2 * np.pi)
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    # 1 where the frequency is kept, 0 where it is divided by `factor`.
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def apply_rotary(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Applies rotary position embeddings (Su et al., 2021), halves convention.

    Args:
      x: dtype[B, T, H, d].
      positions: i32[B, T].
      frequencies: f64[n]; the first 2n components of each head are rotated.

    Returns:
      An array like `x`.
    """
    # Only some components of each head are rotated in GPT-NeoX.
    rotary_dim = 2 * len(frequencies)
    if rotary_dim < x.shape[-1]:
        rotated = apply_rotary(x[..., :rotary_dim], positions, frequencies)
        return jnp.concatenate([rotated, x[..., rotary_dim:]], axis=-1)

    per_position = jnp.asarray(frequencies, jnp.float32)
    # [B, T, 1, n], the same for all heads
    angles = (
        positions.astype(jnp.float32)[:, :, None, None] * per_position[None, None, None]
    )
    # Angles of thousands of radians need float32, whatever the dtype of x.
    cos = jnp.cos(angles)
    sin = jnp.sin(angles)
    # "Halves": component i is rotated with component i + rotary_dim / 2, as in GPT-NeoX and
    # Hugging Face's Llama. Meta's own files pair adjacent components.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x.dtype)


def attend(
    query: Array, key: Array, value: Array, mask: Array, matmul_dtype: str, cap: float = 0.0
) -> Array:
    """Scaled dot-product attention with grouped queries.

    Operands of the products are rounded to `matmul_dtype`; sums and softmax are float32.

    Args:
      query: dtype[B, heads, T, d].
      key, value: dtype[B, kv_heads, S, d].
      mask: b[B, T, S], True where a query sees a key.
      matmul_dtype: dtype of the operands.
      cap: soft cap of the scaled scores; 0 = off.

    Returns:
      dtype[B, heads, T, d].
    """
    batch, heads, length, head_dim = query.shape
    dtype = query.dtype
    # 1 in multi-head attention; more in grouped-query attention (Ainslie et al., 2023).
    group = heads // key.shape[1]  # query heads that share a key head

    # Stack the queries that share a key: with [B, kv_heads, group · T, d] against
    # [B, kv_heads, S, d], the one layout that XLA:CPU multiplies fast.
    query = query.reshape(batch, -1, group * length, head_dim)
    scores = einsum("bgqd,bgsd->bgqs", query.astype(jnp.float32), key, matmul_dtype)
    # In float32; the cap (Gemma 2) applies to scaled scores, before the mask.
    scores = softcap(scores / np.sqrt(head_dim), cap)

    visible = jnp.tile(mask, (1, group, 1))[:, None]  # [B, 1, group · T, S]
    scores = jnp.where(visible, scores, MASKED_SCORE)
    # Back from [B, kv_heads, group · T, d] to one entry per query head.
    output = softmax_weighted_sum(scores, value, matmul_dtype)
    return output.astype(dtype).reshape(batch, heads, length, head_dim)


def attend_causally(
    query: Array, key: Array, value: Array, mask: Array, matmul_dtype: str, cap: float = 0.0
) -> Array:
    """`attend` for S = T and a causal mask, computed in blocks of queries, so that most
    keys after a query are never multiplied."""
    # Later keys are half of all products in full attention; blocks skip most of these.
    length = query.shape[2]
    block = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        # Queries start … end − 1 see no key from `end` on.
        end = min(start + block, length)
        output = attend(
            query[:, :, start:end],
            key[:, :, :end],
            value[:, :, :end],
            mask[:, start:end, :end],
            matmul_dtype,
            cap,
        )
        outputs.append(output)
    return jnp.concatenate(outputs, axis=2)
