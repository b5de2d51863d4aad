"""Keys and values that decoding keeps: an argument and a result of the network, never its
state."""

from functools import partial

import jax
import jax.numpy as jnp

from instructax.models.config import ComputeConfig, ModelConfig
from instructax.types import Array, pytree


@pytree
class Cache:
    """Keys and values of the columns seen so far, and where the next ones go."""

    keys: tuple[Array, ...]  # per layer, matmul_dtype' dtype[B, num_kv_heads, S, head_dim]
    values: tuple[
        Array, ...
    ]  # per layer, matmul_dtype' dtype[B, num_kv_heads, S, head_dim]
    segments: Array  # i32[B, S], 0 = padding or not yet filled
    positions: Array | None  # i32[B, S], for windows; None where no layer has one
    filled: Array  # i32[] or, of rows that are filled apart, i32[B]: columns in use, the next is written at


def init_cache(
    config: ModelConfig, compute: ComputeConfig, batch: int, length: int
) -> Cache:
    """An empty cache for `batch` rows of `length` columns."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    blank = tuple(jnp.zeros(shape, compute.matmul_dtype) for _ in range(config.num_layers))
    columns = jnp.zeros((batch, length), jnp.int32)
    return Cache(
        keys=blank,
        values=blank,
        segments=columns,
        positions=columns if config.sliding_window else None,
        filled=jnp.int32(0),
    )


def written(cached: Array, new: Array, column: Array, axis: int) -> Array:
    """`cached` with `new` from `column` of `axis` on; with i32[B] columns, each row at its
    own."""
    if column.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cached, new, column, axis=axis)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(
        cached, new, column
    )
