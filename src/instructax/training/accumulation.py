"""Gradients of a whole batch, computed one microbatch at a time.

Every loss is a mean over the real tokens of the whole batch. A microbatch's gradient is
therefore weighted by its fraction of these tokens, and the weighted sum equals the gradient
of the whole batch, whatever the sizes of the microbatches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from instructax import sharding
from instructax.losses import next_token_loss
from instructax.models.layers import Dropout
from instructax.models.scoring import packed_loss_and_gradients
from instructax.models.sequence_packing import PackedLayout, scan_packed_rows
from instructax.models.transformer import Transformer
from instructax.types import Array, LmBatch, Params


def microbatch_count(rows: int, microbatch_rows: int, mesh: Mesh | AbstractMesh) -> int:
    """The fewest microbatches of `rows` with at most `microbatch_rows` rows per device."""
    # The limit holds per device: more devices take more rows at a time.
    rows_at_a_time = microbatch_rows * sharding.num_row_shards(mesh)
    return -(-rows // rows_at_a_time)


def split_microbatches(tree: Any, count: int, mesh: Mesh) -> Any:
    """[B, ...] → [count, B / count, ...], with the rows of each microbatch sharded."""
    # Microbatch i is the i-th contiguous part of the batch. Axis 1 holds its rows, so the
    # split of rows over devices moves there.
    split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
    return sharding.constrain_rows(split, mesh, axis=1)


def microbatch_weights(token_counts: Array) -> Array:
    """Each microbatch's fraction of all tokens: f32[count] → f32[count].

    Zeros if there are no tokens at all.
    """
    # The lower bound avoids 0 / 0; whatever it divides is then 0.
    return token_counts / jnp.maximum(jnp.sum(token_counts), 1.0)


def accumulate(
    gradients_of: Callable[[Any], tuple[Params, Any]], microbatches: Any, weights: Array
) -> tuple[Params, Any]:
    """Σᵢ weights[i] · gradients of microbatch i, with one microbatch in memory at a time.

    Args:
      gradients_of: microbatch → (gradients, metrics).
      microbatches: a pytree whose leaves have a leading axis of microbatches.
      weights: f32[count], from `microbatch_weights`.

    Returns:
      The weighted sum of the gradients, and the metrics stacked along the first axis.
    """
    first = jax.tree.map(lambda x: x[0], microbatches)
    # One microbatch needs no loop and no accumulator. Metrics keep their leading axis.
    if weights.shape[0] == 1:
        gradients, metrics = gradients_of(first)
        stacked = jax.tree.map(lambda x: x[None], metrics)
        return scale_tree(weights[0], gradients), stacked

    # The sum is a carry of the scan: one copy of the gradients, updated in place.
    def add(total: Params, inputs: tuple[Any, Array]) -> tuple[Params, Any]:
        microbatch, weight = inputs
        gradients, metrics = gradients_of(microbatch)
        return jax.tree.map(lambda t, g: t + weight * g, total, gradients), metrics

    # Only the trainable parameters have gradients; their structure comes from tracing.
    shapes = jax.eval_shape(lambda microbatch: gradients_of(microbatch)[0], first)
    return jax.lax.scan(add, _zeros(shapes), (microbatches, weights))


def accumulate_packed(
    weighted_gradients_of: Callable[[Any], Any], rows: Any, layout: PackedLayout
) -> Any:
    """Σ weighted_gradients_of(microbatch) over the microbatches in use of packed rows.

    How many microbatches are in use is known only on the device, so the weights cannot be
    an argument as they are in `accumulate`.

    Args:
      weighted_gradients_of: microbatch → gradients and metrics (any pytree), already
        multiplied by the microbatch's fraction of the tokens.
      rows: a pytree of [rows, shards, W] arrays.
      layout: the layout of `rows`.
    """
    # Any microbatch would do: the shapes of gradients do not depend on its rows.
    first = layout.take_microbatch(rows, 0, layout.microbatch_shapes[0])
    # (rows, W) of all packed rows on one device.
    everything = (len(layout.segment_ids), layout.segment_ids.shape[2])
    if layout.microbatch_shapes == (everything,):  # a single microbatch needs no loop
        return weighted_gradients_of(first)

    # Already weighted, so a plain sum is the gradient of the whole minibatch.
    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, weighted_gradients_of(microbatch)), None

    shapes = jax.eval_shape(weighted_gradients_of, first)
    total, _ = scan_packed_rows(add, _zeros(shapes), rows, layout)
    return total


def scale_tree(weight: Array, tree: Any) -> Any:
    """Every leaf times `weight`."""
    return jax.tree.map(lambda x: weight * x, tree)


def next_token_gradients(
    model: Transformer, params: Params, batch: LmBatch, dropout: Dropout | None = None
) -> tuple[Params, dict[str, Array]]:
    """Gradient of the next-token loss of packed rows, and {"loss": f32[]}."""

    def loss_of(logprobs: Array, mask: Array, _: None) -> tuple[Array, dict[str, Array]]:
        return next_token_loss(logprobs, mask), {}

    # Temperature 1: the loss is the model's own cross-entropy.
    loss, _, gradients = packed_loss_and_gradients(
        model, params, batch, loss_of, None, temperature=1.0, dropout=dropout
    )
    return gradients, {"loss": loss}


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
