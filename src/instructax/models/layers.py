"""What a layer is made of: linear maps, norms, attention and MLP, and the block that joins
them."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from instructax.models import lora
from instructax.models.attention import rotary_frequencies, rotate
from instructax.models.config import ModelConfig
from instructax.models.kv_cache import written
from instructax.models.ops import gelu, normalized, product
from instructax.types import Array, pytree


def _add_bias(x: Array, bias: Array) -> Array:
    return x + jnp.expand_dims(bias.astype(x.dtype), tuple(range(x.ndim - bias.ndim)))


class Linear(nn.Module):
    """x · kernel (+ bias) over the last `contracted` axes of x, both rounded to the dtype
    `matmul_dtype`: dtype[..., contracted axes] → dtype[..., *features]. Where there are
    adapters beside the kernel, what they add."""

    features: tuple[int, ...]
    contracted: int
    std: float
    bias: bool
    matmul_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*x.shape[-self.contracted :], *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape, jnp.float32)
        rows, summed, features = (
            "abc"[: x.ndim - self.contracted],
            "xy"[: self.contracted],
            "fgh"[: len(self.features)],
        )
        y = product(
            f"{rows}{summed},{summed}{features}->{rows}{features}",
            x,
            kernel,
            self.matmul_dtype,
        )
        if self.has_variable("params", lora.A):
            a, b, scale = (
                self.get_variable("params", name) for name in (lora.A, lora.B, lora.SCALE)
            )
            low = product(f"{rows}{summed},{summed}r->{rows}r", x, a, self.matmul_dtype)
            change = product(
                f"{rows}r,r{features}->{rows}{features}", low, b, self.matmul_dtype
            )
            y = y + change * scale.astype(y.dtype)
        if self.bias:
            y = _add_bias(
                y, self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            )
        return y


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32: dtype[..., D] → dtype[..., D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, centred = x.shape[-1], self.config.norm == "layernorm"
        y = normalized(x.astype(jnp.float32), centred, self.config.norm_epsilon)
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        y = y * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        if centred:
            y = _add_bias(
                y, self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
            )
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; returns its keys and values for the
    cache.

    x dtype[B, T, D], mask b[B, T, S] or what `attend` takes for it, positions i32[B, T],
    past (keys and values dtype[B, num_kv_heads, S, head_dim], the columns to write at,
    i32[] or i32[B]) or None, where S = T → (dtype[B, T, D], (keys, values)).
    """

    config: ModelConfig
    matmul_dtype: str
    attend: Callable[
        ..., Array
    ]  # `attention.attend` with its cap, or one that does as it does

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        positions: Array,
        past: tuple[Array, Array, Array] | None,
    ):
        c = self.config
        linear = partial(
            Linear, bias=c.biases or c.qkv_biases, matmul_dtype=self.matmul_dtype
        )
        query = linear((c.num_heads, c.head_dim), 1, c.init_std, name="query")(x)
        key = linear((c.num_kv_heads, c.head_dim), 1, c.init_std, name="key")(x)
        value = linear((c.num_kv_heads, c.head_dim), 1, c.init_std, name="value")(x)
        if c.qk_norm:
            query, key = Norm(c, name="query_norm")(query), Norm(c, name="key_norm")(key)
        if c.positions == "rotary":
            frequencies = rotary_frequencies(c)
            query, key = (
                rotate(query, positions, frequencies),
                rotate(key, positions, frequencies),
            )
        if c.query_pre_attn_scalar:
            query = query * jnp.asarray(
                np.sqrt(c.head_dim / c.query_pre_attn_scalar), query.dtype
            )  # `attend` divides by √d
        query, key, value = (y.swapaxes(1, 2) for y in (query, key, value))
        if past is not None:
            past_keys, past_values, column = past
            key = written(past_keys, key.astype(past_keys.dtype), column, 2)
            value = written(past_values, value.astype(past_values.dtype), column, 2)
        mixed = self.attend(query, key, value, mask, self.matmul_dtype).swapaxes(1, 2)
        residual_std = c.init_std / np.sqrt(2 * c.num_layers)
        out = linear((c.embed_dim,), 2, residual_std, bias=c.biases, name="out")
        return out(mixed), (key, value)


class Mlp(nn.Module):
    """GELU, or with a gate SwiGLU or GEGLU (Shazeer, 2020): dtype[B, T, D] → dtype[B, T,
    D]."""

    config: ModelConfig
    matmul_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        linear = partial(Linear, bias=c.biases, matmul_dtype=self.matmul_dtype)
        y = linear((c.mlp_dim,), 1, c.init_std, name="up")(x)
        if c.gated:
            gate = linear((c.mlp_dim,), 1, c.init_std, name="gate")(x)
            y = y * (jax.nn.silu(gate) if c.activation == "swiglu" else gelu(gate))
        else:
            y = gelu(y, c.activation == "gelu")
        return linear(
            (c.embed_dim,), 1, c.init_std / np.sqrt(2 * c.num_layers), name="down"
        )(y)


@pytree
class Dropout:
    """Residual dropout of one forward pass (paper, appendix C.1: 0.2 in the SFT baseline,
    none elsewhere)."""

    rate: Array  # f32[]
    keys: Array  # key[B], one for each row: what is dropped in a row does not depend on the rows beside it


def drop(x: Array, dropout: Dropout | None, branch: int) -> Array:
    """Zeroes each cell with probability `rate` and scales the others by 1 / (1 − rate)."""
    if dropout is None:
        return x
    keys = jax.vmap(jax.random.fold_in, (0, None))(dropout.keys, branch)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - dropout.rate, x.shape[1:]))(
        keys
    )
    return jnp.where(kept, x / (1.0 - dropout.rate).astype(x.dtype), jnp.zeros((), x.dtype))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on both branches (residual
    dropout).

    A parallel residual is x + attention(norm(x)) + mlp(norm(x)) with norms of their own
    (GPT-NeoX). Post-norms stand at the end of both branches (Gemma 2). Arguments and
    results as those of `Attention`.
    """

    config: ModelConfig
    matmul_dtype: str
    attend: Callable[..., Array]

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, positions: Array, past, dropout: Dropout | None
    ):
        c = self.config
        attention = Attention(c, self.matmul_dtype, self.attend, name="attention")
        mlp = Mlp(c, self.matmul_dtype, name="mlp")
        attended, present = attention(
            Norm(c, name="attention_norm")(x), mask, positions, past
        )
        if c.post_norms:
            attended = Norm(c, name="attention_post_norm")(attended)
        read, x = x, x + drop(attended, dropout, 0)
        y = mlp(Norm(c, name="mlp_norm")(read if c.parallel_residual else x))
        if c.post_norms:
            y = Norm(c, name="mlp_post_norm")(y)
        return x + drop(y, dropout, 1), present
