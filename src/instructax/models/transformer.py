"""One decoder-only transformer for the families of GPT-2/GPT-3, GPT-NeoX, Llama, Qwen and
Gemma, by `ModelConfig`.

Parameters are a plain dict, the cache is an argument: the module keeps no state. Parameters
are float32 and are cast where they are used (`ComputeConfig`); softmax, norms and heads
work in float32. The layers' parameters are stacked on a leading axis: training scans over
it, decoding unrolls it (a scan there halves the speed).

Departure from GPT-3, whose every second layer attends to a band: in our configs all layers
attend to all that is before (`ModelConfig.window_layers` could say otherwise).
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
from instructax.models.attention_kernels import kernel_of_rows
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.kv_cache import Cache, written
from instructax.models.layers import Block, Dropout, Linear, Norm
from instructax.types import Array, Params

UNROLLED = 12  # the most layers in a step of the training scan
FEW_TOKENS = 320  # fewer than these are as a rule the last of a batch, for which one layer at a time is compiled


class Transformer(nn.Module):
    """The network, up to `head`: "tokens" returns hidden states (`head_kernel` turns them
    into logits, in chunks), "scalar" returns one number per position, through a projection
    N(0, 1 / (width + 1)) and a bias (paper, C.2)."""

    config: ModelConfig
    compute: ComputeConfig
    head: Literal["tokens", "scalar"]
    mesh: Mesh | None = (
        None  # the devices that rows and heads are split over, which splash has to know
    )

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
        """tokens, segments, positions i32[B, T] → (hidden matmul_dtype' dtype[B, T, D] |
        outputs f32[B, T], cache).

        Segments are 0 (padding), n > 0 (a text that sees itself, and the segment −⌈n /
        SEGMENTS_PER_PREFIX⌉ if its row has one) or negative (what several texts share). With a cache
        the T columns are written to it, and see what it holds. `layers`, for calls with a
        cache, are the parameters of `unstack_layers`, where a loop would take them apart again
        and again.
        """
        c = self.config
        embedding = self.param(
            "embedding",
            nn.initializers.normal(c.init_std),
            (c.vocab_size, c.embed_dim),
            jnp.float32,
        )
        x = jnp.take(embedding, tokens, axis=0).astype(self.compute.activations)
        if c.scale_embedding:
            x = x * jnp.asarray(np.sqrt(c.embed_dim), x.dtype)
        if c.positions == "learned":
            table = self.param(
                "positions",
                nn.initializers.normal(c.init_std),
                (c.max_length, c.embed_dim),
                jnp.float32,
            )
            x = x + jnp.take(table, positions, axis=0).astype(x.dtype)
        # Adapters are leaves that no fresh network has, which `param` would refuse.
        given = self.has_variable("params", "blocks")
        blocks = (
            self.get_variable("params", "blocks")
            if given
            else self.param("blocks", init_blocks, c)
        )
        if cache is None:
            kernel = (
                "jax" if self.is_initializing() else self.compute.attention
            )  # one token is enough for shapes
            attend_rows, mask = kernel_of_rows(kernel, segments, self.mesh)
            if c.attention_softcap:  # which "jax" alone is chosen for
                attend_rows = partial(attend_rows, cap=c.attention_softcap)
            x = scan_blocks(
                blocks, x, mask, positions, c, self.compute, dropout, attend_rows
            )
        else:
            x, cache = unroll_blocks(
                layers or unstack_layers(blocks),
                x,
                segments,
                positions,
                c,
                self.compute,
                cache,
            )
        x = Norm(c, name="final_norm")(x)
        if self.head == "scalar":
            std = float(1.0 / np.sqrt(c.embed_dim + 1))
            outputs = Linear((), 1, std, True, "float32", name="scalar_head")(
                x.astype(jnp.float32)
            )
            return outputs, cache
        if not c.tied_embeddings:
            self.param("head", init_head, c)
        return x.astype(self.compute.matmul_dtype), cache


def init_head(key: Array, config: ModelConfig) -> Params:
    """Output embedding of an untied head, f32[V, D], stored as the input embedding is."""
    shape = (config.vocab_size, config.embed_dim)
    return {"kernel": nn.initializers.normal(config.init_std)(key, shape, jnp.float32)}


def head_kernel(config: ModelConfig, params: Params) -> Array:
    """The matrix f32[V, D] that turns hidden states into logits."""
    return params["embedding"] if config.tied_embeddings else params["head"]["kernel"]


def init_blocks(key: Array, config: ModelConfig) -> Params:
    """Parameters of all layers, stacked on a leading axis [layers, ...]."""
    x, mask = jnp.zeros((1, 1, config.embed_dim)), jnp.ones((1, 1, 1), bool)

    def init(key: Array) -> Params:
        block = Block(config, "float32", attend, parent=None)
        return block.init(key, x, mask, jnp.zeros((1, 1), jnp.int32), None, None)["params"]

    return jax.vmap(init)(jax.random.split(key, config.num_layers))


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
    """All layers by one scan: dtype[B, T, D] → dtype[B, T, D]. `mask` is what `attend_rows`
    takes for one.

    Without remat a step of the scan has UNROLLED layers: what is kept for the backward pass
    is copied at the ends of each, for which XLA:CPU needs a tenth of a training step.
    """
    seen_by = masks_of_layers(mask, positions, positions, config)

    def layer(x: Array, inputs: tuple[Params, Array]) -> tuple[Array, None]:
        params, index = inputs
        own = None
        if dropout is not None:
            own = Dropout(
                rate=dropout.rate,
                keys=jax.vmap(jax.random.fold_in, (0, None))(dropout.keys, index),
            )
        block = Block(config, compute.matmul_dtype, attend_rows, parent=None)
        return block.apply({"params": params}, x, seen_by(index), positions, None, own)[
            0
        ], None

    remat = compute.remat
    if remat != "none":
        policies = jax.checkpoint_policies
        policy = (
            policies.nothing_saveable
            if remat == "full"
            else policies.dots_with_no_batch_dims_saveable
        )
        # Inside a scan the loop itself keeps XLA from merging the recomputation with the
        # forward pass.
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    few = x.shape[0] * x.shape[1] < FEW_TOKENS
    unroll = (
        UNROLLED if remat == "none" and not few else 1
    )  # recomputation needs the ends of the steps
    return jax.lax.scan(layer, x, (blocks, jnp.arange(config.num_layers)), unroll=unroll)[0]


def masks_of_layers(
    mask: Array, query_positions: Array, key_positions: Array | None, config: ModelConfig
) -> Callable[[int | Array], Array]:
    """What the queries see in each layer: a function from the layer's index to b[B, T, S],
    `mask` itself or what a window leaves of it."""
    if key_positions is None or not config.sliding_window:
        return lambda _: mask
    near = mask & window_mask(query_positions, key_positions, config.sliding_window)
    windowed = np.isin(np.arange(config.num_layers), config.window_layers)

    def choose(index: int | Array) -> Array:
        if isinstance(index, int) or windowed.all():
            return near if windowed.all() or windowed[index] else mask
        return jnp.where(jnp.asarray(windowed)[index], near, mask)

    return choose


def unstack_layers(blocks: Params) -> tuple[Params, ...]:
    """The parameters of each layer, from the stacked ones of all."""
    count = jax.tree.leaves(blocks)[0].shape[0]
    return tuple(
        jax.tree.map(lambda leaf, i=index: leaf[i], blocks) for index in range(count)
    )


def cast_matrices(params: Params, compute: ComputeConfig) -> Params:
    """The matrices in the dtypes that the network uses them in, as it would cast them
    itself: a loop then reads no more bytes than it needs. Norms and biases stay as they
    are."""
    dtypes = {
        "kernel": compute.matmul_dtype,
        "embedding": compute.activations,
        "positions": compute.activations,
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
    """All layers one after the other, each with its own cache arrays."""
    column = cache.filled
    attend_cached = partial(attend, cap=config.attention_softcap)
    seen = written(cache.segments, segments, column, 1)
    mask = attention_mask(segments, seen, column)
    columns = (
        None if cache.positions is None else written(cache.positions, positions, column, 1)
    )
    seen_by = masks_of_layers(mask, positions, columns, config)
    keys, values = [], []
    for index, params in enumerate(layers):
        past = (cache.keys[index], cache.values[index], column)
        x, (key, value) = Block(
            config, compute.matmul_dtype, attend_cached, parent=None
        ).apply({"params": params}, x, seen_by(index), positions, past, None)
        keys.append(key)
        values.append(value)
    filled = column + segments.shape[1]
    return x, Cache(
        keys=tuple(keys),
        values=tuple(values),
        segments=seen,
        positions=columns,
        filled=filled,
    )


def parameter_count(params: Params) -> int:
    """Number of trained numbers in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
