"""Packs sequences into rows inside a compiled program, so that little padding is computed.

Samplers and data readers return sequences padded to the longest possible length. Here their
real tokens are packed into rows of one width. How many rows are in use depends on the data,
but shapes must not, so a loop processes one microbatch at a time and ends after the last
row in use.

A reader may skip the tail splits: with `compute.tail_splits` = 0 every microbatch has
`compute.microbatch_rows` rows. They exist because the last microbatch is partly empty: each
split adds a shape of half the size for what is left, which halves the padding and compiles
one more loop.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructax import sharding
from instructax.models.attention import SEGMENTS_PER_PREFIX
from instructax.models.attention_kernels import ROW_TOKENS
from instructax.models.config import ComputeConfig
from instructax.models.ops import max_over_batch
from instructax.models.transformer import Transformer
from instructax.types import Array, LmBatch, pytree

# Packed rows are a multiple of this many tokens, a size that matrix products run well at.
WIDTH_MULTIPLE = 64


@pytree
class PackedLayout:
    """Where N sequences of up to L tokens lie in packed rows of width W.

    Packed arrays are [rows, shards, W]: row r of shard s belongs to the s-th of the devices
    that rows are split over. Only the last row in use can be less than half full; a
    microbatch may take the first columns of that row alone.
    """

    # i32[N, L], index of each token in the flattened packed array; its size = no token
    token_index: Array
    # i32[rows, shards, W], 1-based number of the sequence of each token; 0 = padding
    segment_ids: Array
    # i32[], tokens that each device computes, padding included
    used_tokens: Array
    # (rows, columns) of the microbatches on one device, the largest first
    microbatch_shapes: tuple[tuple[int, int], ...] = dataclasses.field(
        metadata={"static": True}
    )

    def scatter(self, x: Array) -> Array:
        """Packs an array: [N, L] → [rows, shards, W], zero at padding."""
        # Tokens that do not exist have an index past the end, which "drop" ignores.
        flat = jnp.zeros((self.segment_ids.size,), x.dtype)
        return flat.at[self.token_index].set(x, mode="drop").reshape(self.segment_ids.shape)

    def gather(self, y: Array) -> Array:
        """The inverse of `scatter`: [rows, shards, W] → [N, L], zero where no token is."""
        return y.reshape(-1).at[self.token_index].get(mode="fill", fill_value=0)

    def take_microbatch(
        self, packed: Any, row: Array | int, microbatch_shape: tuple[int, int]
    ) -> Any:
        """One microbatch of a tree of packed arrays.

        Args:
          packed: tree of [rows, shards, W, ...].
          row: the first row of the microbatch.
          microbatch_shape: its rows on one device, and its columns.

        Returns:
          A tree of [shards · rows, columns, ...]. The rows of a device are contiguous, so
          they are split over devices as the rows of any batch are.
        """
        rows, columns = microbatch_shape
        shards = self.segment_ids.shape[1]

        def take(x: Array) -> Array:
            # A microbatch of fewer columns than W takes the first columns of its rows.
            start = (row, *(0,) * (x.ndim - 1))
            taken = jax.lax.dynamic_slice(x, start, (rows, shards, columns, *x.shape[3:]))
            return taken.swapaxes(0, 1).reshape(shards * rows, columns, *x.shape[3:])

        return jax.tree.map(take, packed)

    def put_microbatch(
        self, packed: Any, microbatch: Any, row: Array, microbatch_shape: tuple[int, int]
    ) -> Any:
        """`packed` with a microbatch written to it, the inverse of `take_microbatch`."""
        rows, columns = microbatch_shape
        shards = self.segment_ids.shape[1]

        def put(x: Array, part: Array) -> Array:
            # Back from the order of devices to [rows, shards, columns, ...].
            part = part.reshape(shards, rows, columns, *part.shape[2:]).swapaxes(0, 1)
            return jax.lax.dynamic_update_slice(x, part, (row, *(0,) * (x.ndim - 1)))

        return jax.tree.map(put, packed, microbatch)

    def padding_fraction(self) -> Array:
        """Fraction of the computed tokens that are padding: f32[]."""
        # All devices compute as many rows as the fullest one.
        computed = self.used_tokens * self.segment_ids.shape[1]
        real = jnp.sum(self.segment_ids > 0, dtype=jnp.float32)
        return 1.0 - real / jnp.maximum(computed, 1)


def plan_packing(
    real: Array,
    *,
    width: int,
    compute: ComputeConfig,
    mesh: Mesh | None,
    longest: int | None = None,
) -> PackedLayout:
    """Assigns sequences to packed rows: first fit, the longest first.

    Args:
      real: b[N, L], the real tokens of N sequences. Order is kept and gaps are closed.
      width: tokens per packed row.
      compute: microbatch rows and tail splits.
      mesh: the devices that share rows; None packs for one device.
      longest: the most tokens of a sequence, by default L; at most `width`. Longer
        sequences would be lost.

    Returns:
      The layout. Its number of rows holds any N sequences of `longest` tokens.
    """
    count, columns = real.shape
    longest = columns if longest is None else longest
    if longest > width:
        raise ValueError(f"sequences of up to {longest} tokens do not fit rows of {width}")
    # Everything below is traced: lengths are data, only the shapes are fixed.
    lengths = jnp.sum(real, axis=1, dtype=jnp.int32)
    shards = 1 if mesh is None else sharding.num_row_shards(mesh)

    # First fit opens a row only if no open row has room for `longest` tokens, so every row
    # but the last takes at least width // longest sequences.
    rows = -(-count // (width // longest * shards))
    shapes = microbatch_shapes(
        min(compute.microbatch_rows, rows), compute.tail_splits, width
    )
    smallest = shapes[-1][0]
    rows = -(-rows // smallest) * smallest

    starts, free = _place_sequences(lengths, rows * shards, width)
    layout = _index_tokens(real, starts, free.reshape(rows, shards), width, shapes)
    if mesh is None:
        return layout
    segment_ids = sharding.constrain_rows(layout.segment_ids, mesh, axis=1)
    return dataclasses.replace(layout, segment_ids=segment_ids)


def _place_sequences(lengths: Array, rows: int, width: int) -> tuple[Array, Array]:
    """First fit, the longest first, into `rows` rows of `width` tokens.

    Consecutive rows belong to different devices, which balances them.

    Returns:
      The flat index of the first token of each sequence, i32[N], and the free tokens of
      each row, i32[rows].
    """

    def place(free: Array, length: Array) -> tuple[Array, Array]:
        row = jnp.argmax(free >= length)  # the first row with room
        return free.at[row].add(-length), (row + 1) * width - free[row]

    # First fit wastes less if the longest come first.
    order = jnp.argsort(-lengths, stable=True)
    empty_rows = jnp.full((rows,), width, jnp.int32)
    free, starts = jax.lax.scan(place, empty_rows, lengths[order])
    # From the order of lengths back to that of the batch.
    starts = jnp.zeros_like(starts).at[order].set(starts)
    return starts, free


def _index_tokens(
    real: Array,
    starts: Array,
    free: Array,
    width: int,
    shapes: tuple[tuple[int, int], ...],
) -> PackedLayout:
    """The layout of sequences that start at the flat indices `starts`.

    Args:
      real: b[N, L], the real tokens.
      starts: i32[N].
      free: i32[rows, shards], the free tokens of each row.
      width: tokens per packed row.
      shapes: (rows, columns) of the microbatches.
    """
    rows, shards = free.shape
    offset = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1  # [N, L], within the sequence
    token_index = jnp.where(real, starts[:, None] + offset, rows * shards * width)
    filled = width - jnp.min(free, axis=1)  # [rows], the fullest shard
    layout = PackedLayout(
        token_index=token_index,
        segment_ids=jnp.zeros((rows, shards, width), jnp.int32),
        used_tokens=_used_tokens(filled, width, shapes),
        microbatch_shapes=shapes,
    )

    # 1-based, so that the zeros of `scatter` mean padding.
    numbers = jnp.arange(1, len(real) + 1, dtype=jnp.int32)[:, None]
    segment_ids = layout.scatter(jnp.broadcast_to(numbers, real.shape))
    return dataclasses.replace(layout, segment_ids=segment_ids)


def microbatch_shapes(rows: int, splits: int, width: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the microbatches, the largest first.

    `rows` rows of `width` are halved `splits` times, first down to one row, then to pieces
    of a row of at least two columns. An odd number of rows becomes one row at once: each
    shape's rows must be a multiple of the next one's, or the larger microbatches could
    leave a remainder that is too small for the smaller ones.
    """
    shapes = [(rows, width)]
    for _ in range(splits):
        rows, columns = shapes[-1]
        if rows > 1:
            shapes.append((rows // 2 if rows % 2 == 0 else 1, columns))
        elif columns > 3:
            shapes.append((1, columns // 2))
    return tuple(shapes)


def packed_width(lengths: Iterable[int], most: int, compute: ComputeConfig) -> int:
    """Width of packed rows: the longest of `lengths`, rounded up to 64 or to what an
    attention kernel takes after all tail splits, and capped at `most`."""
    unit = WIDTH_MULTIPLE
    if compute.attention != "jax":
        unit = ROW_TOKENS << compute.tail_splits
    return min(-(-max(lengths, default=0) // unit) * unit, most)


def _used_tokens(filled: Array, width: int, shapes: tuple[tuple[int, int], ...]) -> Array:
    """Tokens that one device computes: `filled` i32[rows] has the tokens in each row, the
    rows in use first. The last row is computed at the smallest width that holds it."""
    # Rows fill in order, so the rows in use are the first ones.
    rows = jnp.sum(filled > 0, dtype=jnp.int32)
    smallest = shapes[-1][0]
    narrow = [columns for count, columns in shapes if count == 1]
    widths = jnp.array([width, *narrow], jnp.int32)
    last = jnp.min(jnp.where(widths >= filled[rows - 1], widths, width))
    whole_rows = -(-rows // smallest) * smallest - 1
    return jnp.where(rows > 0, whole_rows * width + last, 0)


def pack(batch: LmBatch, layout: PackedLayout) -> LmBatch:
    """Packs the sequences of a batch [N, L] into rows: LmBatch [rows, shards, W].

    Each sequence has up to SEGMENTS_PER_PREFIX segments, or one prompt (segment −1) with
    its responses. Segments are renumbered, so that those of one row differ.
    """
    numbers = layout.segment_ids
    # [rows, shards, W]; 0 is padding here too.
    segments = layout.scatter(batch.segments)
    # Sequence n gets segments from (n − 1) · SEGMENTS_PER_PREFIX + 1 on. A shared prompt
    # gets the segment −n, which is what those attend to.
    unique = (numbers - 1) * SEGMENTS_PER_PREFIX + segments
    return LmBatch(
        tokens=layout.scatter(batch.tokens),
        segments=jnp.where(segments > 0, unique, -numbers * (segments < 0)),
        positions=layout.scatter(batch.positions),
        loss_mask=layout.scatter(batch.loss_mask),
    )


def pack_and_map(
    function: Callable[[LmBatch], Any],
    batch: LmBatch,
    *,
    width: int,
    compute: ComputeConfig,
    mesh: Mesh,
    longest: int | None = None,
) -> tuple[Any, PackedLayout]:
    """Applies a per-token function to a batch without most of its padding.

    Args:
      function: LmBatch [rows, W] of a microbatch → tree of [rows, W].
      batch: LmBatch [N, L].
      width, compute, mesh, longest: as in `plan_packing`.

    Returns:
      The function's results, a tree of [N, L], and the layout.
    """
    layout = plan_packing(
        batch.segments != 0, width=width, compute=compute, mesh=mesh, longest=longest
    )
    _, packed = scan_packed_rows(
        lambda _, part: (None, function(part)), None, pack(batch, layout), layout
    )
    return jax.tree.map(layout.gather, packed), layout


def map_packed_rows(
    function: Callable[[LmBatch], Array],
    batch: LmBatch,
    model: Transformer,
    mesh: Mesh,
    *,
    width: int = 0,
) -> Array:
    """`pack_and_map` with the microbatches of `model.compute`: LmBatch [B, T] → f[B, T].

    `width` is that of the packed rows, by default T. No sequence may have more tokens.
    """
    columns = batch.tokens.shape[1]
    width = width or columns
    outputs, _ = pack_and_map(
        function,
        batch,
        width=width,
        compute=model.compute,
        mesh=mesh,
        longest=min(width, columns),
    )
    return outputs


def scan_packed_rows(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    packed: Any,
    layout: PackedLayout,
) -> tuple[Any, Any]:
    """`jax.lax.scan` over the microbatches in use.

    Differentiate inside `step`: the loop itself has no gradient. Under `vmap` all runs
    continue to the last row that any of them uses.

    Args:
      step: (carry, microbatch) → (carry, out), both trees of [rows, columns, ...].
      carry: the initial carry.
      packed: tree of [rows, shards, W, ...].
      layout: the layout that it was packed by.

    Returns:
      The last carry, and the outs as a tree of [rows, shards, W, ...], zero where not used.
    """
    width = layout.segment_ids.shape[2]
    # Shapes of the outs beyond rows and columns come from tracing `step` once.
    example = layout.take_microbatch(packed, 0, layout.microbatch_shapes[0])
    out_shapes = jax.eval_shape(lambda: step(carry, example)[1])

    def blank(out: Any) -> Array:
        return jnp.zeros((*layout.segment_ids.shape, *out.shape[2:]), out.dtype)

    state = (carry, jax.tree.map(blank, out_shapes))
    done = jnp.int32(0)  # tokens of each device that have been computed
    used = max_over_batch(layout.used_tokens)
    for shape in layout.microbatch_shapes:

        def body(
            index: Array, state: tuple[Any, Any], shape: Any = shape, done: Array = done
        ) -> tuple[Any, Any]:
            row = done // width + index * shape[0]
            carry, out = step(state[0], layout.take_microbatch(packed, row, shape))
            return carry, layout.put_microbatch(state[1], out, row, shape)

        # As many microbatches of this shape as fit; the next, smaller shape takes the rest.
        tokens = shape[0] * shape[1]
        count = (used - done) // tokens
        state = jax.lax.fori_loop(0, count, body, state)
        done = done + count * tokens
    return state
