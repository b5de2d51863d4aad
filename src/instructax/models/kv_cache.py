"""The key-value cache of decoding: an argument and a result of the network."""

from functools import partial

import jax
import jax.numpy as jnp

from instructax.models.config import ComputeConfig, ModelConfig
from instructax.types import Array, pytree


@pytree
class Cache:
    """Keys and values of the S columns, and where the next ones are written."""

    # per layer, in the matmul dtype: [B, num_kv_heads, S, head_dim]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    # i32[B, S], 0 = padding or not yet written
    segments: Array
    # i32[B, S] if a layer has a sliding window, else None
    positions: Array | None
    # columns in use, which is also where the next one is written: i32[], or i32[B] if rows
    # fill independently
    filled: Array


def init_cache(
    config: ModelConfig, compute: ComputeConfig, batch: int, length: int
) -> Cache:
    """An empty cache of `batch` rows and `length` columns."""
    # Heads before columns: the layout in which attention multiplies keys.
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    empty = tuple(jnp.zeros(shape, compute.matmul_dtype) for _ in range(config.num_layers))
    # Segment 0 in all columns: no query sees what has not been written.
    columns = jnp.zeros((batch, length), jnp.int32)
    return Cache(
        keys=empty,
        values=empty,
        segments=columns,
        positions=columns if config.sliding_window else None,
        filled=jnp.int32(0),
    )


def write_columns(cached: Array, new: Array, column: Array, axis: int) -> Array:
    """Writes `new` into `cached`, starting at `column` of `axis`.

    `column` is i32[], or i32[B] with a start for each row.
    """
    # All rows have filled the same columns: one write for the whole batch.
    if column.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cached, new, column, axis=axis)
    # Without the batch axis, which `vmap` removes.
    write_row = partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
    return jax.vmap(write_row)(cached, new, column)
