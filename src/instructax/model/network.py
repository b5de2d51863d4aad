"""One decoder-only transformer for the GPT-2/GPT-3 and the Llama families; the only file that imports flax.

Parameters are a plain dict, the cache is an argument: the module keeps no state. Parameters are float32 and are cast
where they are used (`ComputeConfig`); softmax, norms and heads work in float32. The layers' parameters are stacked on a
leading axis: training scans over it, decoding unrolls it (a scan there halves the speed).

Departure from GPT-3, whose every second layer attends to a band: all layers here attend to all that is before.
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from instructax.model.attention import attend, attend_causally, attention_mask, rotate
from instructax.model.config import ComputeConfig, ModelConfig
from instructax.operations import gelu, normalized, product
from instructax.types import Array, Params, pytree

UNROLLED = 12  # the most layers in a step of the training scan
FEW_TOKENS = 512  # fewer than these are the last of a batch, for which one layer at a time is compiled


@pytree
class Cache:
    """Keys and values of the columns seen so far, and where the next ones go."""

    keys: tuple[Array, ...]  # per layer, operands' dtype[B, kv_heads, S, head_width]
    values: tuple[Array, ...]  # per layer, operands' dtype[B, kv_heads, S, head_width]
    segments: Array  # i32[B, S], 0 = padding or not yet filled
    filled: Array  # i32[] or, of rows that are filled apart, i32[B]: columns in use, the next is written at


def init_cache(config: ModelConfig, compute: ComputeConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of `length` columns."""
    shape = (batch, config.kv_heads, length, config.head_width)
    blank = tuple(jnp.zeros(shape, compute.operands) for _ in range(config.layers))
    return Cache(keys=blank, values=blank, segments=jnp.zeros((batch, length), jnp.int32), filled=jnp.int32(0))


def _written(cached: Array, new: Array, column: Array, axis: int) -> Array:
    """`cached` with `new` from `column` of `axis` on; with i32[B] columns, each row at its own."""
    if column.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cached, new, column, axis=axis)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(cached, new, column)


def _add_bias(x: Array, bias: Array) -> Array:
    return x + jnp.expand_dims(bias.astype(x.dtype), tuple(range(x.ndim - bias.ndim)))


class Linear(nn.Module):
    """x · kernel (+ bias) over the last `contracted` axes of x, both rounded to the dtype `operands`:
    dtype[..., contracted axes] → dtype[..., *features]."""

    features: tuple[int, ...]
    contracted: int
    std: float
    bias: bool
    operands: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*x.shape[-self.contracted :], *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape, jnp.float32)
        rows, summed, features = "abc"[: x.ndim - self.contracted], "xy"[: self.contracted], "fgh"[: len(self.features)]
        y = product(f"{rows}{summed},{summed}{features}->{rows}{features}", x, kernel, self.operands)
        if self.bias:
            y = _add_bias(y, self.param("bias", nn.initializers.zeros, self.features, jnp.float32))
        return y


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32: dtype[B, T, D] → dtype[B, T, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, centred = x.shape[-1], self.config.norm == "layernorm"
        y = normalized(x.astype(jnp.float32), centred, self.config.norm_epsilon)
        y = y * jnp.expand_dims(self.param("scale", nn.initializers.ones, (width,), jnp.float32), (0, 1))
        if centred:
            y = _add_bias(y, self.param("bias", nn.initializers.zeros, (width,), jnp.float32))
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; returns its keys and values for the cache.

    x dtype[B, T, D], mask b[B, T, S], positions i32[B, T], past (keys and values dtype[B, kv_heads, S, head_width], the
    columns to write at, i32[] or i32[B]) or None, where S = T → (dtype[B, T, D], (keys, values)).
    """

    config: ModelConfig
    operands: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, positions: Array, past: tuple[Array, Array, Array] | None):
        c = self.config
        linear = partial(Linear, bias=c.biases, operands=self.operands)
        query = linear((c.heads, c.head_width), 1, c.init_std, name="query")(x)
        key = linear((c.kv_heads, c.head_width), 1, c.init_std, name="key")(x)
        value = linear((c.kv_heads, c.head_width), 1, c.init_std, name="value")(x)
        if c.positions == "rotary":
            query, key = rotate(query, positions, c.rotary_base), rotate(key, positions, c.rotary_base)
        query, key, value = (y.swapaxes(1, 2) for y in (query, key, value))
        if past is not None:
            past_keys, past_values, column = past
            key = _written(past_keys, key.astype(past_keys.dtype), column, 2)
            value = _written(past_values, value.astype(past_values.dtype), column, 2)
            mixed = attend(query, key, value, mask, self.operands)
        else:
            mixed = attend_causally(query, key, value, mask, self.operands)
        mixed = mixed.swapaxes(1, 2)
        residual_std = c.init_std / np.sqrt(2 * c.layers)
        return linear((c.width,), 2, residual_std, name="out")(mixed), (key, value)


class Mlp(nn.Module):
    """GELU (tanh form, as GPT-2) or SwiGLU: dtype[B, T, D] → dtype[B, T, D]."""

    config: ModelConfig
    operands: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        linear = partial(Linear, bias=c.biases, operands=self.operands)
        y = linear((c.mlp_width,), 1, c.init_std, name="up")(x)
        if c.activation == "gelu":
            y = gelu(y)
        else:
            y = y * jax.nn.silu(linear((c.mlp_width,), 1, c.init_std, name="gate")(x))
        return linear((c.width,), 1, c.init_std / np.sqrt(2 * c.layers), name="down")(y)


@pytree
class Dropout:
    """Residual dropout of one forward pass (paper, appendix C.1: 0.2 in the SFT baseline, none elsewhere)."""

    rate: Array  # f32[]
    keys: Array  # key[B], one for each row: what is dropped in a row does not depend on the rows beside it


def drop(x: Array, dropout: Dropout | None, branch: int) -> Array:
    """Zeroes each cell with probability `rate` and scales the others by 1 / (1 − rate)."""
    if dropout is None:
        return x
    keys = jax.vmap(jax.random.fold_in, (0, None))(dropout.keys, branch)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - dropout.rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - dropout.rate).astype(x.dtype), jnp.zeros((), x.dtype))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on both branches (residual dropout).

    Arguments and results as those of `Attention`.
    """

    config: ModelConfig
    operands: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, positions: Array, past, dropout: Dropout | None):
        c = self.config
        attention, mlp = Attention(c, self.operands, name="attention"), Mlp(c, self.operands, name="mlp")
        attended, present = attention(Norm(c, name="attention_norm")(x), mask, positions, past)
        x = x + drop(attended, dropout, 0)
        x = x + drop(mlp(Norm(c, name="mlp_norm")(x)), dropout, 1)
        return x, present


class Transformer(nn.Module):
    """The network, up to `head`: "tokens" returns hidden states (`head_kernel` turns them into logits, in chunks),
    "scalar" returns one number per position, through a projection N(0, 1 / (width + 1)) and a bias (paper, C.2)."""

    config: ModelConfig
    compute: ComputeConfig
    head: Literal["tokens", "scalar"]

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        *,
        cache: Cache | None = None,
        dropout: Dropout | None = None,
        layers: tuple[Params, ...] | None = None,
    ) -> tuple[Array, Cache | None]:
        """tokens, segments, positions i32[B, T] → (hidden operands' dtype[B, T, D] | outputs f32[B, T], cache).

        Segments are 0 (padding), n > 0 (a text that sees itself, and the segment −⌈n / BRANCHES⌉ if its row has one)
        or negative (what several texts share).
        With a cache the T columns are written to it, and see what it holds. `layers`, for calls with a cache, are the
        parameters of `layers_of`, where a loop would take them apart again and again.
        """
        c = self.config
        embedding = self.param("embedding", nn.initializers.normal(c.init_std), (c.vocab_size, c.width), jnp.float32)
        x = jnp.take(embedding, tokens, axis=0).astype(self.compute.activations)
        if c.positions == "learned":
            table = self.param("positions", nn.initializers.normal(c.init_std), (c.max_length, c.width), jnp.float32)
            x = x + jnp.take(table, positions, axis=0).astype(x.dtype)
        blocks = self.param("blocks", init_blocks, c)
        if cache is None:
            mask = attention_mask(segments, segments, 0)
            x = scan_blocks(blocks, x, mask, positions, c, self.compute, dropout)
        else:
            x, cache = unroll_blocks(layers or layers_of(blocks), x, segments, positions, c, self.compute, cache)
        x = Norm(c, name="final_norm")(x)
        if self.head == "scalar":
            std = float(1.0 / np.sqrt(c.width + 1))
            outputs = Linear((), 1, std, True, "float32", name="scalar_head")(x.astype(jnp.float32))
            return outputs, cache
        if not c.tied_head:
            self.param("head", init_head, c)
        return x.astype(self.compute.operands), cache


def init_head(key: Array, config: ModelConfig) -> Params:
    """Output embedding of an untied head, f32[V, D], stored as the input embedding is."""
    shape = (config.vocab_size, config.width)
    return {"kernel": nn.initializers.normal(config.init_std)(key, shape, jnp.float32)}


def head_kernel(config: ModelConfig, params: Params) -> Array:
    """The matrix f32[V, D] that turns hidden states into logits."""
    return params["embedding"] if config.tied_head else params["head"]["kernel"]


def init_blocks(key: Array, config: ModelConfig) -> Params:
    """Parameters of all layers, stacked on a leading axis [layers, ...]."""
    x, mask = jnp.zeros((1, 1, config.width)), jnp.ones((1, 1, 1), bool)

    def init(key: Array) -> Params:
        block = Block(config, "float32", parent=None)
        return block.init(key, x, mask, jnp.zeros((1, 1), jnp.int32), None, None)["params"]

    return jax.vmap(init)(jax.random.split(key, config.layers))


def scan_blocks(
    blocks: Params,
    x: Array,
    mask: Array,
    positions: Array,
    config: ModelConfig,
    compute: ComputeConfig,
    dropout: Dropout | None,
) -> Array:
    """All layers by one scan: dtype[B, T, D] → dtype[B, T, D].

    Without remat a step of the scan has UNROLLED layers: what is kept for the backward pass is copied at the ends of
    each, for which XLA:CPU needs a tenth of a training step.
    """

    def layer(x: Array, inputs: tuple[Params, Array]) -> tuple[Array, None]:
        params, index = inputs
        own = None
        if dropout is not None:
            own = Dropout(rate=dropout.rate, keys=jax.vmap(jax.random.fold_in, (0, None))(dropout.keys, index))
        block = Block(config, compute.operands, parent=None)
        return block.apply({"params": params}, x, mask, positions, None, own)[0], None

    remat = compute.remat
    if remat != "none":
        policies = jax.checkpoint_policies
        policy = policies.nothing_saveable if remat == "full" else policies.dots_with_no_batch_dims_saveable
        # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    few = x.shape[0] * x.shape[1] < FEW_TOKENS
    unroll = UNROLLED if remat == "none" and not few else 1  # recomputation needs the ends of the steps
    return jax.lax.scan(layer, x, (blocks, jnp.arange(config.layers)), unroll=unroll)[0]


def layers_of(blocks: Params) -> tuple[Params, ...]:
    """The parameters of each layer, from the stacked ones of all."""
    count = jax.tree.leaves(blocks)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=index: leaf[i], blocks) for index in range(count))


def cast_matrices(params: Params, compute: ComputeConfig) -> Params:
    """The matrices in the dtypes that the network uses them in, as it would cast them itself: a loop then reads no more
    bytes than it needs. Norms and biases stay as they are."""
    dtypes = {"kernel": compute.operands, "embedding": compute.activations, "positions": compute.activations}

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf.astype(dtypes.get(path[-1].key, leaf.dtype))

    return jax.tree_util.tree_map_with_path(cast, params)


def unroll_blocks(
    layers: tuple[Params, ...],
    x: Array,
    segments: Array,
    positions: Array,
    config: ModelConfig,
    compute: ComputeConfig,
    cache: Cache,
) -> tuple[Array, Cache]:
    """All layers one after the other, each with its own cache arrays."""
    column = cache.filled
    seen = _written(cache.segments, segments, column, 1)
    mask = attention_mask(segments, seen, column)
    keys, values = [], []
    for index, params in enumerate(layers):
        past = (cache.keys[index], cache.values[index], column)
        x, (key, value) = Block(config, compute.operands, parent=None).apply(
            {"params": params}, x, mask, positions, past, None
        )
        keys.append(key)
        values.append(value)
    filled = column + segments.shape[1]
    return x, Cache(keys=tuple(keys), values=tuple(values), segments=seen, filled=filled)


def parameter_count(params: Params) -> int:
    """Number of trained numbers in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
