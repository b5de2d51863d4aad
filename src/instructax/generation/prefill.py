"""The prompts of a sampler, run before anything is drawn: packed side by side in rows, a
few rows at a time.

How far a prompt stands from the edge of its columns does not matter to what is computed:
each token knows its position.
"""

from typing import Any

import jax
import jax.numpy as jnp

from instructax.models import Transformer, init_cache, positions_of
from instructax.models.sequence_packing import PackedLayout, plan_packing, scan_packed_rows
from instructax.types import Array, Params, Prompts, pytree


@pytree
class Prefilled:
    """Prompts that were run through the network, where they stand in packed rows of width
    W."""

    hidden: Array  # dtype[M, D], after each prompt
    keys: tuple[
        Array, ...
    ]  # per layer, matmul_dtype' dtype[rows, W, num_kv_heads, head_dim]
    values: tuple[Array, ...]
    texts: Array  # i32[rows, W], the number from 1 of the prompt that a cell belongs to; 0 = padding
    rows: Array  # i32[M], the row of each prompt
    columns: Array  # i32[M], its first column

    def window(self, packed: Array, prompt: Array, columns: int) -> Array:
        """Of [rows, W, ...] so many columns of one row, the prompt's among them: [columns,
        ...]."""
        start = (
            self.rows[prompt],
            self.columns[prompt],
            *(0,) * (packed.ndim - 2),
        )  # or earlier, at the row's end
        return jax.lax.dynamic_slice(packed, start, (1, columns, *packed.shape[2:]))[0]


def filled(prompts: Prompts) -> Array:
    """How many prompts there are up to the last one with a token: i32[]."""
    count = len(prompts.mask)
    return jnp.max(
        jnp.where(
            jnp.any(prompts.mask, axis=1), jnp.arange(1, count + 1, dtype=jnp.int32), 0
        )
    )


def prompt_layout(model: Transformer, prompts: Prompts) -> PackedLayout:
    """Where prompts [M, P] stand while they are run: in rows of 2 · P, which waste little
    and are soon attended to."""
    count, columns = prompts.tokens.shape
    return plan_packing(
        prompts.mask, width=min(count, 2) * columns, compute=model.compute, mesh=None
    )


def prefill_padding(model: Transformer, prompts: Prompts, groups: int) -> Array:
    """Share of the cells that `generate` runs for prompts [M, P] that hold no token, the
    mean over groups: f32[]."""
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), prompts)
    return jnp.mean(
        jax.vmap(lambda prompts: prompt_layout(model, prompts).padding())(split)
    )


def prefilled(model: Transformer, params: Params, prompts: Prompts) -> Prefilled:
    """Runs the prompts, a few rows of them at a time."""
    layout = prompt_layout(model, prompts)

    def fill(_: None, part: tuple[Array, Array, Array]) -> tuple[None, Any]:
        cache = init_cache(model.config, model.compute, *part[0].shape)
        outputs: Any = model.apply({"params": params}, *part, cache=cache)
        kept = jax.tree.map(
            lambda x: x.swapaxes(1, 2), (outputs[1].keys, outputs[1].values)
        )
        return None, (outputs[0], *kept)

    rows = (
        layout.spread(prompts.tokens),
        layout.texts,
        layout.spread(positions_of(prompts.mask)),
    )
    _, packed = scan_packed_rows(fill, None, rows, layout)
    hidden, keys, values = jax.tree.map(
        lambda x: x[:, 0], packed
    )  # one device's: a row is a line
    ends = jnp.minimum(layout.cells[:, -1], layout.texts.size - 1)
    starts = jnp.maximum(ends - jnp.sum(prompts.mask, axis=1, dtype=jnp.int32) + 1, 0)
    row, column = jnp.divmod(starts, hidden.shape[1])
    return Prefilled(
        hidden=hidden.reshape(-1, hidden.shape[-1])[ends],
        keys=keys,
        values=values,
        texts=layout.texts[:, 0],
        rows=row,
        columns=column,
    )
