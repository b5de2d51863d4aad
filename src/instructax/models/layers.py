"""Layers of the transformer: linear maps, norms, attention, MLP and the residual block."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from instructax.models import lora
from instructax.models.attention import apply_rotary, rotary_frequencies
from instructax.models.config import ModelConfig
from instructax.models.kv_cache import write_columns
from instructax.models.ops import einsum, gelu, normalize
from instructax.types import Array, pytree


def _add_bias(x: Array, bias: Array) -> Array:
    # Explicit leading axes: rank promotion is an error in our tests.
    leading = tuple(range(x.ndim - bias.ndim))
    return x + jnp.expand_dims(bias.astype(x.dtype), leading)


class Linear(nn.Module):
    """x · kernel (+ bias), contracting the last `contracted` axes of x:
    dtype[..., contracted axes] → dtype[..., *features].

    Operands are rounded to `matmul_dtype`. If the parameters hold a LoRA adapter beside
    the kernel, its output is added.
    """

    features: tuple[int, ...]
    contracted: int
    std: float
    bias: bool
    matmul_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # [contracted axes, features]
        shape = (*x.shape[-self.contracted :], *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape, jnp.float32)

        # Axis names for einsum: leading axes, contracted axes, features.
        lead = "abc"[: x.ndim - self.contracted]
        summed = "xy"[: self.contracted]
        out = "fgh"[: len(self.features)]
        y = einsum(
            f"{lead}{summed},{summed}{out}->{lead}{out}", x, kernel, self.matmul_dtype
        )

        # W · x + scale · B · (A · x): two thin products instead of the sum W + A · B.
        if self.has_variable("params", lora.A):
            a = self.get_variable("params", lora.A)
            b = self.get_variable("params", lora.B)
            scale = self.get_variable("params", lora.SCALE)
            # [..., rank], then [..., *features]
            low_rank = einsum(f"{lead}{summed},{summed}r->{lead}r", x, a, self.matmul_dtype)
            delta = einsum(f"{lead}r,r{out}->{lead}{out}", low_rank, b, self.matmul_dtype)
            # `scale` is a parameter, so a loaded network needs no config of its adapters.
            y = y + delta * scale.astype(y.dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            y = _add_bias(y, bias)
        return y


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]
        # RMSNorm has neither a mean nor a bias.
        center = self.config.norm == "layernorm"
        y = normalize(x.astype(jnp.float32), center, self.config.norm_epsilon)

        # Scale and bias are float32 too; the result returns to the dtype of x.
        scale = self.param("scale", nn.initializers.ones, (features,), jnp.float32)
        y = y * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        if center:
            bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
            y = _add_bias(y, bias)
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries.

    `attend` is `attention.attend` (with the soft cap bound) or a kernel like it.
    """

    config: ModelConfig
    matmul_dtype: str
    attend: Callable[..., Array]

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        positions: Array,
        past: tuple[Array, Array, Array] | None,
    ):
        """Attends, and returns the keys and values for the cache.

        Args:
          x: dtype[B, T, D].
          mask: b[B, T, S], or what `attend` takes instead.
          positions: i32[B, T].
          past: cached keys and values dtype[B, num_kv_heads, S, head_dim] and the column
            to write at, i32[] or i32[B]; None without a cache, where S = T.

        Returns:
          (dtype[B, T, D], (keys, values)).
        """
        c = self.config
        linear = partial(
            Linear, bias=c.biases or c.qkv_biases, matmul_dtype=self.matmul_dtype
        )
        # [B, T, heads, head_dim]
        query = linear((c.num_heads, c.head_dim), 1, c.init_std, name="query")(x)
        key = linear((c.num_kv_heads, c.head_dim), 1, c.init_std, name="key")(x)
        value = linear((c.num_kv_heads, c.head_dim), 1, c.init_std, name="value")(x)
        query, key = self._normalize_and_rotate(query, key, positions)

        # [B, heads, T, head_dim], the layout of the cache
        query = query.swapaxes(1, 2)
        key = key.swapaxes(1, 2)
        value = value.swapaxes(1, 2)
        if past is not None:
            past_keys, past_values, column = past
            key = write_columns(past_keys, key.astype(past_keys.dtype), column, 2)
            value = write_columns(past_values, value.astype(past_values.dtype), column, 2)

        # [B, T, heads, head_dim]
        output = self.attend(query, key, value, mask, self.matmul_dtype).swapaxes(1, 2)
        # GPT-2: the residual stream sums 2 · num_layers branches, so their outputs start
        # smaller.
        residual_std = c.init_std / np.sqrt(2 * c.num_layers)
        project = linear((c.embed_dim,), 2, residual_std, bias=c.biases, name="out")
        return project(output), (key, value)

    def _normalize_and_rotate(
        self, query: Array, key: Array, positions: Array
    ) -> tuple[Array, Array]:
        """Norms, rotation and scale of queries and keys dtype[B, T, heads, head_dim]."""
        # Per head and before the cache: cached keys are final.
        c = self.config
        if c.qk_norm:
            query = Norm(c, name="query_norm")(query)
            key = Norm(c, name="key_norm")(key)
        if c.positions == "rotary":
            frequencies = rotary_frequencies(c)
            query = apply_rotary(query, positions, frequencies)
            key = apply_rotary(key, positions, frequencies)
        if c.query_pre_attn_scalar:
            # `attend` divides by √head_dim; this makes it √query_pre_attn_scalar.
            scale = np.sqrt(c.head_dim / c.query_pre_attn_scalar)
            query = query * jnp.asarray(scale, query.dtype)
        return query, key


class Mlp(nn.Module):
    """GELU, or gated SwiGLU or GEGLU (Shazeer, 2020): dtype[B, T, D] → dtype[B, T, D]."""

    config: ModelConfig
    matmul_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        linear = partial(Linear, bias=c.biases, matmul_dtype=self.matmul_dtype)
        y = linear((c.mlp_dim,), 1, c.init_std, name="up")(x)  # [B, T, F]
        if c.gated_mlp:
            # [B, T, F]; multiplied into the up projection.
            gate = linear((c.mlp_dim,), 1, c.init_std, name="gate")(x)
            y = y * (jax.nn.silu(gate) if c.activation == "swiglu" else gelu(gate))
        else:
            y = gelu(y, c.activation == "gelu")
        # As for the attention's output.
        residual_std = c.init_std / np.sqrt(2 * c.num_layers)
        return linear((c.embed_dim,), 1, residual_std, name="down")(y)


@pytree
class Dropout:
    """Residual dropout of one forward pass (paper, appendix C.1: 0.2 in the SFT baseline,
    none elsewhere)."""

    # f32[]
    rate: Array
    # key[B]; one per row, so a row's dropout does not depend on its neighbors
    keys: Array


def apply_dropout(x: Array, dropout: Dropout | None, branch: int) -> Array:
    """Zeroes each element with probability `rate` and scales the others by 1 / (1 − rate).

    `branch` distinguishes the draws of one layer: 0 for attention, 1 for the MLP.
    """
    if dropout is None:
        return x
    # One key per row: [B]
    keys = jax.vmap(jax.random.fold_in, (0, None))(dropout.keys, branch)

    def keep_mask(key: Array) -> Array:
        return jax.random.bernoulli(key, 1.0 - dropout.rate, x.shape[1:])

    # b[B, T, D]
    kept = jax.vmap(keep_mask)(keys)
    scaled = x / (1.0 - dropout.rate).astype(x.dtype)
    return jnp.where(kept, scaled, jnp.zeros((), x.dtype))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both branches.

    With a parallel residual it is x + attention(norm(x)) + mlp(norm(x)), each branch with
    its own norm (GPT-NeoX). Post-norms end both branches (Gemma 2). Arguments and results
    are those of `Attention`.
    """

    config: ModelConfig
    matmul_dtype: str
    attend: Callable[..., Array]

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, positions: Array, past, dropout: Dropout | None
    ):
        c = self.config
        # Pre-norm: each branch reads a normalized input and adds to the residual stream.
        attention = Attention(c, self.matmul_dtype, self.attend, name="attention")
        mlp = Mlp(c, self.matmul_dtype, name="mlp")

        attention_input = Norm(c, name="attention_norm")(x)
        attended, present = attention(attention_input, mask, positions, past)
        if c.post_norms:
            attended = Norm(c, name="attention_post_norm")(attended)
        # A parallel MLP reads the stream as it was before attention was added.
        layer_input = x
        x = x + apply_dropout(attended, dropout, 0)

        mlp_input = layer_input if c.parallel_residual else x
        y = mlp(Norm(c, name="mlp_norm")(mlp_input))
        if c.post_norms:
            y = Norm(c, name="mlp_post_norm")(y)
        return x + apply_dropout(y, dropout, 1), present
