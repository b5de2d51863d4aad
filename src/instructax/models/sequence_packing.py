"""Sequences side by side in rows, laid out inside a compiled program, so that padding is
hardly computed.

What a sampler or a data reader returns is padded to the longest length that there can be.
Here its real tokens are put into rows of one width. How many rows are in use is data, while
shapes are not: rows are worked through part by part, in loops that end with the last row in
use. A part has `compute.microbatch_rows` rows; what is left at the end goes into smaller
ones, each half as large as the one before, down to a piece of a row.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructax import sharding
from instructax.models import BRANCHES, ComputeConfig, Transformer
from instructax.models.attention_kernels import ROW_TOKENS
from instructax.models.ops import max_over_batch
from instructax.types import Array, LmBatch, pytree


@pytree
class PackedLayout:
    """Where N sequences of up to L tokens stand: in lines of rows of width W, one row for
    each device that shares rows.

    Only the last line in use can be less than half full: of that one a part may take the
    first columns alone.
    """

    cells: Array  # i32[N, L], the place of each token among all cells of all lines; their number = not a token
    texts: Array  # i32[lines, ways, W], the number from 1 of the sequence that a cell belongs to; 0 = padding
    used: Array  # i32[], cells that a device runs, the first ones
    shapes: tuple[tuple[int, int], ...] = dataclasses.field(
        metadata={"static": True}
    )  # `microbatch_shapes`, for one device

    def spread(self, x: Array) -> Array:
        """[N, L] → [lines, ways, W], zero where there is padding."""
        flat = jnp.zeros((self.texts.size,), x.dtype)
        return flat.at[self.cells].set(x, mode="drop").reshape(self.texts.shape)

    def collect(self, y: Array) -> Array:
        """[lines, ways, W] → [N, L], the other way of `spread`; zero where there is no
        token."""
        return y.reshape(-1).at[self.cells].get(mode="fill", fill_value=0)

    def part(self, rows: Any, line: Array | int, shape: tuple[int, int]) -> Any:
        """So many lines and columns from `line` on: a tree of [lines, ways, W, ...] → [rows
        of the part, columns, ...].

        A device's rows stand together, so that rows are split over devices as those of any
        batch.
        """
        (lines, columns), ways = shape, self.texts.shape[1]

        def cut(x: Array) -> Array:
            start = (line, *(0,) * (x.ndim - 1))
            found = jax.lax.dynamic_slice(x, start, (lines, ways, columns, *x.shape[3:]))
            return found.swapaxes(0, 1).reshape(ways * lines, columns, *x.shape[3:])

        return jax.tree.map(cut, rows)

    def put(self, stacked: Any, part: Any, line: Array, shape: tuple[int, int]) -> Any:
        """`stacked` with a part in its place, the other way of `part`."""
        (lines, columns), ways = shape, self.texts.shape[1]

        def written(all_: Array, x: Array) -> Array:
            x = x.reshape(ways, lines, columns, *x.shape[2:]).swapaxes(0, 1)
            return jax.lax.dynamic_update_slice(all_, x, (line, *(0,) * (all_.ndim - 1)))

        return jax.tree.map(written, stacked, part)

    def padding(self) -> Array:
        """Share of the cells that are run that hold no token: f32[]."""
        cells = self.used * self.texts.shape[1]
        return 1.0 - jnp.sum(self.texts > 0, dtype=jnp.float32) / jnp.maximum(cells, 1)


def plan_packing(
    real: Array,
    *,
    width: int,
    compute: ComputeConfig,
    mesh: Mesh | None,
    longest: int | None = None,
) -> PackedLayout:
    """Puts the marked tokens of N sequences, `real` b[N, L], into rows of `width`, in order
    and without a gap.

    First fit, the longest first: each sequence goes to the first row with room. `longest` ≤
    `width` is the most tokens that a sequence has, by default L; a longer one would be
    lost. `mesh` None: on one device.
    """
    count, columns = real.shape
    longest = columns if longest is None else longest
    if longest > width:
        raise ValueError(f"sequences of up to {longest} tokens do not fit rows of {width}")
    lengths = jnp.sum(real, axis=1, dtype=jnp.int32)
    ways = 1 if mesh is None else sharding.num_row_shards(mesh)
    # A row takes so many of any sequences, before another is begun.
    lines = -(-count // (width // longest * ways))
    shapes = microbatch_shapes(
        min(compute.microbatch_rows, lines), compute.tail_splits, width
    )
    lines = -(-lines // shapes[-1][0]) * shapes[-1][0]

    def place(free: Array, length: Array) -> tuple[Array, Array]:
        row = jnp.argmax(free >= length)
        return free.at[row].add(-length), (row + 1) * width - free[row]

    order = jnp.argsort(-lengths, stable=True)
    free, starts = jax.lax.scan(
        place, jnp.full((lines * ways,), width, jnp.int32), lengths[order]
    )
    starts = jnp.zeros_like(starts).at[order].set(starts)
    within = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    cells = jnp.where(real, starts[:, None] + within, lines * ways * width)
    filled = width - jnp.min(free.reshape(lines, ways), axis=1)
    blank = PackedLayout(
        cells=cells,
        texts=jnp.zeros((lines, ways, width), jnp.int32),
        used=_used(filled, width, shapes),
        shapes=shapes,
    )
    texts = blank.spread(
        jnp.broadcast_to(jnp.arange(1, count + 1, dtype=jnp.int32)[:, None], real.shape)
    )
    return dataclasses.replace(
        blank, texts=texts if mesh is None else sharding.constrain_rows(texts, mesh, axis=1)
    )


def microbatch_shapes(rows: int, halvings: int, width: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the parts, the largest first: `rows` rows of `width`, halved again
    and again, first to one row and then to pieces of it, of two columns at least.

    From an odd number of rows it is one row at once: the rows of a part are a multiple of
    the next one's, or what the larger parts leave over could be too few for a smaller one.
    """
    shapes = [(rows, width)]
    for _ in range(halvings):
        lines, columns = shapes[-1]
        if lines > 1:
            shapes.append((lines // 2 if lines % 2 == 0 else 1, columns))
        elif columns > 3:
            shapes.append((1, columns // 2))
    return tuple(shapes)


def packed_width(lengths: Iterable[int], most: int, compute: ComputeConfig) -> int:
    """W of rows that hold texts of `lengths`, none above `most`: a multiple of 64, which
    computers multiply well, or so wide that an attention kernel takes each piece of a row.
    """
    unit = 64 if compute.attention == "jax" else ROW_TOKENS << compute.tail_splits
    return min(-(-max(lengths, default=0) // unit) * unit, most)


def _used(filled: Array, width: int, shapes: tuple[tuple[int, int], ...]) -> Array:
    """Cells of a device that are run: `filled` i32[lines] has the cells of each line that
    hold tokens, the lines in use first. The last line is run at the least width that there
    is for it."""
    lines, whole = jnp.sum(filled > 0, dtype=jnp.int32), shapes[-1][0]
    widths = jnp.array(
        [width, *(columns for count, columns in shapes if count == 1)], jnp.int32
    )
    last = jnp.min(jnp.where(widths >= filled[lines - 1], widths, width))
    return jnp.where(lines > 0, (-(-lines // whole) * whole - 1) * width + last, 0)


def pack(batch: LmBatch, layout: PackedLayout) -> LmBatch:
    """Rows [N, L], each of up to BRANCHES texts or of one prompt with its responses, as the
    layout has them: [lines, ways, W]."""
    texts, segments = layout.texts, layout.spread(batch.segments)
    return LmBatch(
        tokens=layout.spread(batch.tokens),
        segments=jnp.where(
            segments > 0, (texts - 1) * BRANCHES + segments, -texts * (segments < 0)
        ),
        positions=layout.spread(batch.positions),
        loss_mask=layout.spread(batch.loss_mask),
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
    """(`function` of rows [rows, W] of packed texts, read back to the rows of `batch` [N,
    L]; the layout): what a network makes of tokens, without most of the padding and a part
    at a time."""
    layout = plan_packing(
        batch.segments != 0, width=width, compute=compute, mesh=mesh, longest=longest
    )
    _, outs = scan_packed_rows(
        lambda _, part: (None, function(part)), None, pack(batch, layout), layout
    )
    return jax.tree.map(layout.collect, outs), layout


def map_packed_rows(
    function: Callable[[LmBatch], Array],
    batch: LmBatch,
    model: Transformer,
    mesh: Mesh,
    *,
    width: int = 0,
) -> Array:
    """`function` of the rows of `batch` [B, T], packed into rows of `width`, by default T,
    as many at a time as `model` has in memory: f[B, T]. No row has more than `width`
    tokens."""
    columns = batch.tokens.shape[1]
    width = width or columns
    packing = {
        "width": width,
        "longest": min(width, columns),
        "compute": model.compute,
        "mesh": mesh,
    }
    return pack_and_map(function, batch, **packing)[0]


def scan_packed_rows(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, layout: PackedLayout
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step(carry, part) -> (carry, out)` over the parts in use of a tree
    of [lines, ways, W, ...].

    A part and its `out` are of [rows, columns, ...]; what comes out is [lines, ways, W,
    ...], zero where it is not in use. It has no gradient: take it inside `step`. Under
    `vmap` all go on to the last line that any has in use.
    """
    example = layout.part(rows, 0, layout.shapes[0])
    outs = jax.eval_shape(lambda: step(carry, example)[1])
    blank = jax.tree.map(
        lambda out: jnp.zeros((*layout.texts.shape, *out.shape[2:]), out.dtype), outs
    )
    state, done, used = (carry, blank), jnp.int32(0), max_over_batch(layout.used)
    for shape in layout.shapes:

        def one(
            index: Array, state: tuple[Any, Any], shape: Any = shape, done: Array = done
        ) -> tuple[Any, Any]:
            line = done // layout.texts.shape[2] + index * shape[0]
            carry, out = step(state[0], layout.part(rows, line, shape))
            return carry, layout.put(state[1], out, line, shape)

        count = (used - done) // (shape[0] * shape[1])
        state, done = (
            jax.lax.fori_loop(0, count, one, state),
            done + count * shape[0] * shape[1],
        )
    return state
