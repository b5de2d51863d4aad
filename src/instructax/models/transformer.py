"""A decoder-only transformer for the GPT-2/GPT-3, GPT-NeoX, Llama, Qwen and Gemma families,
selected by `ModelConfig`.

Parameters are a plain dict and the cache is an argument: the module keeps no state.
Parameters are float32 and are cast where they are used (`ComputeConfig`); softmax, norms
and heads compute in float32. The parameters of the layers are stacked on a leading axis:
training scans over it, decoding unrolls it (a scan there halves the speed).

Departure from GPT-3, where every second layer has a banded attention pattern: all layers of
our configs attend to all earlier tokens (`ModelConfig.window_layers` can change that).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructax.models.attention import attend, attention_mask, window_mask
from instructax.models.attention_kernels import packed_attention
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.kv_cache import Cache, write_columns
from instructax.models.layers import Block, Dropout, Linear, Norm
from instructax.types import Array, Params

# Layers per step of the training scan, at most. Values saved for the backward pass are
# copied at the end of each step, which takes XLA:CPU a tenth of a training step.
SCAN_UNROLL = 12
# Smaller microbatches are usually the tail of a batch, whose many shapes are compiled with
# one layer per scan step.
SMALL_MICROBATCH_TOKENS = 320


class Transformer(nn.Module):
    """The network up to its head.

    The head "tokens" returns hidden states, which `head_kernel` turns into logits chunk by
    chunk. "scalar" returns one number per position, through a projection initialized with
    N(0, 1 / (embed_dim + 1)) and a bias (paper, appendix C.2).
    """

    config: ModelConfig
    compute: ComputeConfig
    head: Literal["tokens", "scalar"]
    # The devices that rows and heads are split over; only the fused kernels need it.
    mesh: Mesh | None = None

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
        """Runs the network.

        Args:
          tokens: i32[B, T].
          segments: i32[B, T]: 0 is padding, n > 0 a segment that sees itself and the
            shared prefix −⌈n / SEGMENTS_PER_PREFIX⌉, if its row has one.
          positions: i32[B, T].
          cache: if given, the T columns are written to it and attend to what it holds.
          dropout: residual dropout; None for none.
          layers: with a cache, the result of `unstack_layers`, if the caller has it.

        Returns:
          (hidden states [B, T, D] in the matmul dtype or, with the scalar head, f32[B, T];
          cache).
        """
        c = self.config
        # [B, T, D] in the activation dtype
        x = self._embed(tokens, positions)
        blocks = self._blocks()
        if cache is None:
            # Initialization needs shapes only, and one token is too short for a kernel.
            kernel = "jax" if self.is_initializing() else self.compute.attention
            attention, mask = packed_attention(kernel, segments, self.mesh)
            if c.attention_softcap:  # supported by the "jax" kernel only
                attention = partial(attention, cap=c.attention_softcap)
            x = scan_blocks(blocks, x, mask, positions, c, self.compute, dropout, attention)
        else:
            layers = layers or unstack_layers(blocks)
            x, cache = unroll_blocks(layers, x, segments, positions, c, self.compute, cache)
        x = Norm(c, name="final_norm")(x)

        if self.head == "scalar":
            std = float(1.0 / np.sqrt(c.embed_dim + 1))
            # Heads compute in float32 in all dtypes.
            head = Linear((), 1, std, True, "float32", name="scalar_head")
            return head(x.astype(jnp.float32)), cache
        # Only creates the parameters: `head_kernel` reads them outside the module.
        if not c.tied_embeddings:
            self.param("head", init_head, c)
        return x.astype(self.compute.matmul_dtype), cache

    def _blocks(self) -> Params:
        """The parameters of all layers, stacked on a leading axis."""
        # LoRA adapters are leaves that a new network does not have and `param` would
        # reject, so existing parameters are read as they are.
        if self.has_variable("params", "blocks"):
            return self.get_variable("params", "blocks")
        return self.param("blocks", init_blocks, self.config)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        """Token (and learned position) embeddings: dtype[B, T, D]."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim), jnp.float32)
        x = jnp.take(embedding, tokens, axis=0).astype(self.compute.activation_dtype)
        # Rounded to the activation dtype, as in Gemma's own code.
        if c.scale_embedding:
            x = x * jnp.asarray(np.sqrt(c.embed_dim), x.dtype)
        if c.positions == "learned":
            table = self.param("positions", init, (c.max_length, c.embed_dim), jnp.float32)
            x = x + jnp.take(table, positions, axis=0).astype(x.dtype)
        return x


def init_head(key: Array, config: ModelConfig) -> Params:
    """Output embedding of an untied head, f32[V, D], laid out like the input embedding."""
    shape = (config.vocab_size, config.embed_dim)
    return {"kernel": nn.initializers.normal(config.init_std)(key, shape, jnp.float32)}


def head_kernel(config: ModelConfig, params: Params) -> Array:
    """The matrix f32[V, D] that turns hidden states into logits."""
    return params["embedding"] if config.tied_embeddings else params["head"]["kernel"]


def init_blocks(key: Array, config: ModelConfig) -> Params:
    """Parameters of all layers, stacked on a leading axis [num_layers, ...]."""
    # Values do not matter: only shapes decide what `init` creates.
    x = jnp.zeros((1, 1, config.embed_dim))
    mask = jnp.ones((1, 1, 1), bool)
    positions = jnp.zeros((1, 1), jnp.int32)

    def init_layer(key: Array) -> Params:
        block = Block(config, "float32", attend, parent=None)
        return block.init(key, x, mask, positions, None, None)["params"]

    # One key per layer, so layers start differently.
    return jax.vmap(init_layer)(jax.random.split(key, config.num_layers))


def scan_blocks(
    blocks: Params,
    x: Array,
    mask: Array,
    positions: Array,
    config: ModelConfig,
    compute: ComputeConfig,
    dropout: Dropout | None,
    attend_rows: Callable[..., Array],
) -> Array:
    """Runs all layers in one scan: dtype[B, T, D] → dtype[B, T, D].

    `mask` is whatever `attend_rows` takes as its mask.
    """
    mask_of_layer = layer_masks(mask, positions, positions, config)

    def layer(x: Array, inputs: tuple[Params, Array]) -> tuple[Array, None]:
        params, index = inputs
        # Each layer draws its own dropout, so the key includes its index.
        layer_dropout = None
        if dropout is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(dropout.keys, index)
            layer_dropout = Dropout(rate=dropout.rate, keys=keys)
        block = Block(config, compute.matmul_dtype, attend_rows, parent=None)
        y, _ = block.apply(
            {"params": params}, x, mask_of_layer(index), positions, None, layer_dropout
        )
        return y, None

    # How many layers one scan step holds.
    small = x.shape[0] * x.shape[1] < SMALL_MICROBATCH_TOKENS
    unroll = 1 if small else SCAN_UNROLL
    if compute.remat != "none":
        # Recomputation starts from the layer inputs that each scan step saves.
        unroll = 1
        if compute.remat == "full":
            policy = jax.checkpoint_policies.nothing_saveable
        else:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        # The scan itself keeps XLA from merging the recomputation with the forward pass.
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    # The index of a layer selects its mask and its dropout keys.
    indices = jnp.arange(config.num_layers)
    return jax.lax.scan(layer, x, (blocks, indices), unroll=unroll)[0]


def layer_masks(
    mask: Array, query_positions: Array, key_positions: Array | None, config: ModelConfig
) -> Callable[[int | Array], Array]:
    """A function from a layer's index to its mask b[B, T, S]: `mask`, or its intersection
    with the sliding window. The index is a traced array in a scan, else an int."""
    if key_positions is None or not config.sliding_window:
        return lambda _: mask
    windowed_mask = mask & window_mask(
        query_positions, key_positions, config.sliding_window
    )
    # b[num_layers], known at trace time.
    has_window = np.isin(np.arange(config.num_layers), config.window_layers)

    def mask_of_layer(index: int | Array) -> Array:
        # Decide at trace time where possible.
        if has_window.all():
            return windowed_mask
        if isinstance(index, int):
            return windowed_mask if has_window[index] else mask
        return jnp.where(jnp.asarray(has_window)[index], windowed_mask, mask)

    return mask_of_layer


def unstack_layers(blocks: Params) -> tuple[Params, ...]:
    """The parameters of each layer, from the stacked ones."""
    num_layers = jax.tree.leaves(blocks)[0].shape[0]
    return tuple(
        jax.tree.map(lambda leaf, i=index: leaf[i], blocks) for index in range(num_layers)
    )


def cast_matrices(params: Params, compute: ComputeConfig) -> Params:
    """Casts matrices to the dtypes that the network uses them in.

    The network would cast them itself; casting first lets a decoding loop read fewer bytes.
    Norms and biases stay float32.
    """
    # By the last part of a parameter's path.
    dtypes = {
        "kernel": compute.matmul_dtype,
        "embedding": compute.activation_dtype,
        "positions": compute.activation_dtype,
    }

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
    """Runs all layers one after another, each with its own cache arrays:
    dtype[B, T, D] → (dtype[B, T, D], the cache with the T columns)."""
    column = cache.filled
    # The new columns are visible to their own queries, so they are written first.
    attend_cached = partial(attend, cap=config.attention_softcap)
    cached_segments = write_columns(cache.segments, segments, column, 1)
    mask = attention_mask(segments, cached_segments, column)
    cached_positions = cache.positions
    if cached_positions is not None:
        cached_positions = write_columns(cached_positions, positions, column, 1)
    mask_of_layer = layer_masks(mask, positions, cached_positions, config)

    # Unrolled, because a scan halves the speed of decoding.
    keys = []
    values = []
    for index, params in enumerate(layers):
        # The layer's own cache, and the column where its new keys and values go.
        past = (cache.keys[index], cache.values[index], column)
        block = Block(config, compute.matmul_dtype, attend_cached, parent=None)
        x, (key, value) = block.apply(
            {"params": params}, x, mask_of_layer(index), positions, past, None
        )
        keys.append(key)
        values.append(value)
    return x, Cache(
        keys=tuple(keys),
        values=tuple(values),
        segments=cached_segments,
        positions=cached_positions,
        filled=column + segments.shape[1],
    )


def parameter_count(params: Params) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
