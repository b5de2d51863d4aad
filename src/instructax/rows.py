"""Sequences side by side in rows, laid out inside a compiled program, so that padding is hardly computed.

What a sampler or a data reader returns is padded to the longest length that there can be. Here its real tokens are put
into rows of one width. How many rows are in use is data, while shapes are not: rows are worked through part by part, in
a loop that ends with the last part in use.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructax import sharding
from instructax.model import BRANCHES, Transformer
from instructax.operations import largest
from instructax.types import Array, LmBatch, pytree


@pytree
class Layout:
    """Where N sequences of up to L tokens stand in rows of width W, in parts of so many rows."""

    cells: Array  # i32[N, L], the place of each token among all cells of all rows; their number = not a token
    texts: Array  # i32[parts, rows, W], the number from 1 of the sequence that a cell belongs to; 0 = padding
    used: Array  # i32[], parts in use, the first ones

    @property
    def part_cells(self) -> int:
        """Cells of one part."""
        return self.texts.shape[1] * self.texts.shape[2]

    def spread(self, x: Array) -> Array:
        """[N, L] → [parts, rows, W], zero where there is padding."""
        flat = jnp.zeros((self.texts.size,), x.dtype)
        return flat.at[self.cells].set(x, mode="drop").reshape(self.texts.shape)

    def collect(self, y: Array) -> Array:
        """[parts, rows, W] → [N, L], the other way of `spread`; zero where there is no token."""
        return y.reshape(-1).at[self.cells].get(mode="fill", fill_value=0)

    def padding(self) -> Array:
        """Share of the cells of the used parts that hold no token: f32[]."""
        return 1.0 - jnp.sum(self.texts > 0, dtype=jnp.float32) / jnp.maximum(self.used * self.part_cells, 1)


def lay_out(real: Array, *, width: int, part_rows: int, mesh: Mesh) -> Layout:
    """Puts the marked tokens of N sequences, `real` b[N, L], into rows of `width` ≥ L, in order and without a gap, and
    `part_rows` such rows for each device that shares rows into a part.

    First fit, the longest first: each sequence goes to the first row with room. There are never more rows than
    sequences.
    """
    count, longest = real.shape
    if longest > width:
        raise ValueError(f"sequences of up to {longest} tokens do not fit rows of {width}")
    lengths = jnp.sum(real, axis=1, dtype=jnp.int32)
    part_rows = min(part_rows * sharding.row_ways(mesh), count)
    parts = -(-count // part_rows)

    def place(free: Array, length: Array) -> tuple[Array, Array]:
        row = jnp.argmax(free >= length)
        return free.at[row].add(-length), (row + 1) * width - free[row]

    order = jnp.argsort(-lengths, stable=True)
    free, starts = jax.lax.scan(place, jnp.full((parts * part_rows,), width, jnp.int32), lengths[order])
    starts = jnp.zeros_like(starts).at[order].set(starts)
    within = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    shape = (parts, part_rows, width)
    cells = jnp.where(real, starts[:, None] + within, parts * part_rows * width)
    numbers = jnp.broadcast_to(jnp.arange(1, count + 1, dtype=jnp.int32)[:, None], real.shape)
    rows = jnp.sum(free < width, dtype=jnp.int32)
    blank = Layout(cells=cells, texts=jnp.zeros(shape, jnp.int32), used=-(-rows // part_rows))
    return Layout(cells=cells, texts=sharding.constrain_rows(blank.spread(numbers), mesh, axis=1), used=blank.used)


def pack(batch: LmBatch, layout: Layout) -> LmBatch:
    """Rows [N, L], each of up to BRANCHES texts or of one prompt with its responses, as the layout has them: [parts,
    rows, W]."""
    texts, segments = layout.texts, layout.spread(batch.segments)
    return LmBatch(
        tokens=layout.spread(batch.tokens),
        segments=jnp.where(segments > 0, (texts - 1) * BRANCHES + segments, -texts * (segments < 0)),
        positions=layout.spread(batch.positions),
        loss_mask=layout.spread(batch.loss_mask),
    )


def packed_map(
    function: Callable[[LmBatch], Any], batch: LmBatch, *, width: int, part_rows: int, mesh: Mesh
) -> tuple[Any, Layout]:
    """(`function` of rows [rows, W] of packed texts, read back to the rows of `batch` [N, L]; the layout): what a
    network makes of tokens, without most of the padding and a part at a time."""
    layout = lay_out(batch.segments != 0, width=width, part_rows=part_rows, mesh=mesh)
    _, outs = scan_parts(lambda _, part: (None, function(part)), None, pack(batch, layout), layout.used)
    return jax.tree.map(layout.collect, outs), layout


def by_parts(
    function: Callable[[LmBatch], Array], batch: LmBatch, model: Transformer, mesh: Mesh, *, width: int = 0
) -> Array:
    """`function` of the rows of `batch` [B, T], packed into rows of `width`, by default T, as many at a time as
    `model` has in memory: f[B, T]."""
    width, part_rows = width or batch.tokens.shape[1], model.compute.part_rows
    return packed_map(function, batch, width=width, part_rows=part_rows, mesh=mesh)[0]


def scan_parts(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, parts: Any, used: Array | int
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step(carry, part) -> (carry, out)` that ends after the first `used` parts; what it would have
    stacked for the others is zero. It has no gradient: take it inside `step`. Under `vmap` all go on to the last part
    that any has in use."""
    count = jax.tree.leaves(parts)[0].shape[0]
    outs = jax.eval_shape(lambda: step(carry, jax.tree.map(lambda x: x[0], parts))[1])
    blank = jax.tree.map(lambda out: jnp.zeros((count, *out.shape), out.dtype), outs)

    def one(index: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, stacked = state
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), parts)
        carry, out = step(carry, part)
        return carry, jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, index, 0), stacked, out)

    return jax.lax.fori_loop(0, largest(jnp.asarray(used, jnp.int32)), one, (carry, blank))
