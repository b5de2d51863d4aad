"""Prefill: runs the prompts of a sampler, packed side by side, a few rows at a time.

The result keeps each prompt's keys, values and last hidden state where packing put them.
Nothing depends on that place, because every token carries its position.
"""

from typing import Any

import jax
import jax.numpy as jnp

from instructax.models.attention import positions_from_mask
from instructax.models.kv_cache import init_cache
from instructax.models.sequence_packing import PackedLayout, plan_packing, scan_packed_rows
from instructax.models.transformer import Transformer
from instructax.types import Array, Params, Prompts, pytree


@pytree
class PrefilledPrompts:
    """M prompts after the forward pass, packed into rows of width W."""

    # The hidden state at the last token of each prompt.
    hidden: Array  # dtype[M, D]
    # Per layer, compute.matmul_dtype[rows, W, num_kv_heads, head_dim].
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    # 1 + the index of the token's prompt; 0 = padding.
    segment_ids: Array  # i32[rows, W]
    # Where each prompt's first token is.
    row: Array  # i32[M]
    first_column: Array  # i32[M]

    def window(self, packed: Array, prompt: Array, columns: int) -> Array:
        """Cuts a window that contains `prompt` out of its packed row.

        The window starts at the prompt's first token, or earlier where the row ends too
        soon.

        Args:
          packed: [rows, W, ...].
          prompt: i32[], its index.
          columns: width of the window, at least the prompt's length.

        Returns:
          [columns, ...].
        """
        # dynamic_slice itself moves a window back that would cross the end of the row.
        start = (self.row[prompt], self.first_column[prompt], *(0,) * (packed.ndim - 2))
        return jax.lax.dynamic_slice(packed, start, (1, columns, *packed.shape[2:]))[0]


def count_prompts(prompts: Prompts) -> Array:
    """The number of prompts up to the last one that has a token: i32[]."""
    # Padding prompts come last, but an empty one may also stand between real ones.
    numbers = jnp.arange(1, len(prompts.mask) + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(jnp.any(prompts.mask, axis=1), numbers, 0))


def prompt_layout(model: Transformer, prompts: Prompts) -> PackedLayout:
    """Packs prompts [M, P] into rows of 2 · P tokens: little padding, and rows short enough
    for cheap attention."""
    count, columns = prompts.tokens.shape
    return plan_packing(
        prompts.mask, width=min(count, 2) * columns, compute=model.compute, mesh=None
    )


def prefill_padding(model: Transformer, prompts: Prompts, groups: int) -> Array:
    """Fraction of padding among the tokens that `generate` runs for prompts [M, P], the
    mean over groups: f32[]."""
    # [M, P] → [groups, M / groups, P]
    grouped = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), prompts)
    paddings = jax.vmap(lambda prompts: prompt_layout(model, prompts).padding_fraction())(
        grouped
    )
    return jnp.mean(paddings)


def prefill(model: Transformer, params: Params, prompts: Prompts) -> PrefilledPrompts:
    """Runs prompts [M, P] through the network, one microbatch of packed rows at a time."""
    layout = prompt_layout(model, prompts)

    def run_rows(_: None, rows: tuple[Array, Array, Array]) -> tuple[None, Any]:
        cache = init_cache(model.config, model.compute, *rows[0].shape)
        outputs: Any = model.apply({"params": params}, *rows, cache=cache)
        hidden, cache = outputs
        # [rows, num_kv_heads, W, head_dim] → [rows, W, num_kv_heads, head_dim]
        keys, values = jax.tree.map(lambda x: x.swapaxes(1, 2), (cache.keys, cache.values))
        return None, (hidden, keys, values)

    packed_inputs = (
        layout.scatter(prompts.tokens),
        layout.segment_ids,
        layout.scatter(positions_from_mask(prompts.mask)),
    )
    _, packed_outputs = scan_packed_rows(run_rows, None, packed_inputs, layout)

    # [rows, 1, W, ...] → [rows, W, ...]: the layout is for a single device.
    hidden, keys, values = jax.tree.map(lambda x: x[:, 0], packed_outputs)

    # Prompts are left-padded, so the last column holds the last token. An empty prompt has
    # no place of its own; the clamps only keep its indices in range.
    last = jnp.minimum(layout.token_index[:, -1], layout.segment_ids.size - 1)
    first = jnp.maximum(last - jnp.sum(prompts.mask, axis=1, dtype=jnp.int32) + 1, 0)
    row, first_column = jnp.divmod(first, hidden.shape[1])
    return PrefilledPrompts(
        hidden=hidden.reshape(-1, hidden.shape[-1])[last],
        keys=keys,
        values=values,
        segment_ids=layout.segment_ids[:, 0],
        row=row,
        first_column=first_column,
    )
