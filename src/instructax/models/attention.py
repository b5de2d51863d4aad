"""Who sees whom, and what is made of it: masks, positions and attention, on arrays alone."""

import jax.numpy as jnp
import numpy as np

from instructax.models.config import ModelConfig
from instructax.models.ops import product, soft_capped, softmax_mean
from instructax.types import Array

SEGMENTS_PER_PREFIX = 1024  # segments 1 … SEGMENTS_PER_PREFIX see segment −1 as well, the next SEGMENTS_PER_PREFIX see −2, …: responses to one prompt
MASKED = (
    -1e30
)  # finite: a padded query, which sees nothing, still gets a finite (and unused) output
QUERY_BLOCK, QUERY_BLOCKS = (
    128,
    8,
)  # queries that attend together, at least, and into how many blocks at most


def positions_from_mask(mask: Array) -> Array:
    """Position of each real token among the real tokens of its row: b[B, T] → i32[B, T]; 0
    before the first."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def attention_mask(
    query_segments: Array, key_segments: Array, first_column: Array | int
) -> Array:
    """Which keys each query sees: those of its own segment, and of the one that it branches
    off, but for the keys of later queries. All other columns of a cache hold what came
    before, wherever they lie.

    i32[B, T], i32[B, S], column of the first query's key i32[] or i32[B] → b[B, T, S]
    """
    queries = jnp.arange(query_segments.shape[1])[None, :, None]
    # The query whose key stands in a column, if it is one's.
    query_of = (
        jnp.arange(key_segments.shape[1])[None, :] - jnp.reshape(first_column, (-1, 1))
    )[:, None, :]
    later = (query_of > queries) & (query_of < query_segments.shape[1])
    stems = jnp.where(
        query_segments > 0,
        -((query_segments - 1) // SEGMENTS_PER_PREFIX) - 1,
        query_segments,
    )
    keys = key_segments[:, None, :]
    seen = (keys == query_segments[:, :, None]) | (keys == stems[:, :, None])
    return ~later & seen & (keys != 0)


def window_mask(query_positions: Array, key_positions: Array, window: int) -> Array:
    """Which keys are among the last `sliding_window` up to each query, itself included: i32[B, T],
    i32[B, S] → b[B, T, S]."""
    return key_positions[:, None, :] > query_positions[:, :, None] - window


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians that each pair of components turns from one position to the next,
    f64[rotary_width / 2]."""
    half = config.rotary_width // 2
    frequencies = config.rotary_base ** (-np.arange(half) / half)
    scaling = config.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_length * frequencies / (2 * np.pi)
    kept = np.clip(
        (turns - scaling.low_freq_factor)
        / (scaling.high_freq_factor - scaling.low_freq_factor),
        0,
        1,
    )
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Rotary positions (Su et al., 2021), halves convention, on the first 2 ·
    len(frequencies) components: x dtype[B, T, H, d], positions i32[B, T] → as x."""
    width = 2 * len(frequencies)
    if width < x.shape[-1]:
        return jnp.concatenate(
            [rotate(x[..., :width], positions, frequencies), x[..., width:]], axis=-1
        )
    turns = jnp.asarray(frequencies, jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None, None] * turns[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def attend(
    query: Array, key: Array, value: Array, mask: Array, matmul_dtype: str, cap: float = 0.0
) -> Array:
    """The mean of the values that each query sees, weighted by softmax(query · key / √d),
    the scores soft-capped first.

    query dtype[B, heads, T, d], key and value dtype[B, num_kv_heads, S, d], mask b[B, T, S]
    → dtype[B, heads, T, d]. What is multiplied is rounded to the dtype `matmul_dtype`; sums
    and softmax are float32.
    """
    (batch, heads, length, width), dtype = query.shape, query.dtype
    sharing = heads // key.shape[1]
    # The queries that share a key stand one below the other: [B, num_kv_heads, T, d] on
    # both sides of the product is the one layout that XLA:CPU multiplies fast, also in the
    # backward pass.
    query = query.reshape(batch, -1, sharing * length, width)
    scores = product("bgqd,bgsd->bgqs", query.astype(jnp.float32), key, matmul_dtype)
    seen = jnp.tile(mask, (1, sharing, 1))[:, None]
    scores = jnp.where(seen, soft_capped(scores / np.sqrt(width), cap), MASKED)
    return (
        softmax_mean(scores, value, matmul_dtype)
        .astype(dtype)
        .reshape(batch, heads, length, width)
    )


def attend_causally(
    query: Array, key: Array, value: Array, mask: Array, matmul_dtype: str, cap: float = 0.0
) -> Array:
    """As `attend` where S = T and no query sees a later key: what comes after a block of
    queries is not computed."""
    length = query.shape[2]
    block = max(QUERY_BLOCK, -(-length // QUERY_BLOCKS))
    starts, ends = range(0, length, block), (*range(block, length, block), length)
    parts = [
        attend(
            query[:, :, start:end],
            key[:, :, :end],
            value[:, :, :end],
            mask[:, start:end, :end],
            matmul_dtype,
            cap,
        )
        for start, end in zip(starts, ends, strict=True)
    ]
    return jnp.concatenate(parts, axis=2)
