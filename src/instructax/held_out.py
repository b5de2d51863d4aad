"""The loss on held-out packed rows, which the supervised and the PPO stage both report."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from instructax import sharding
from instructax.data.batches import Source
from instructax.data.readers import held_out_rows
from instructax.inference import row_logprobs
from instructax.losses import next_token_loss
from instructax.masked import token_count
from instructax.model import Transformer
from instructax.types import Array, LmBatch, Params


def held_out_loss(model: Transformer, params: Params, batch: LmBatch) -> tuple[Array, Array]:
    """(sum of the loss over trained tokens in nats, their number), both f32[], without dropout."""
    count = token_count(batch.loss_mask)
    return next_token_loss(row_logprobs(model, params, batch), batch.loss_mask) * count, count


def held_out_losses(
    model: Transformer, mesh: jax.sharding.Mesh, config: Any, sources: Mapping[str, Source]
) -> Callable[[Params], dict[str, float]]:
    """A function from parameters to the loss in nats per token on each held-out source, `{name}_loss`."""
    loss = jax.jit(partial(held_out_loss, model), out_shardings=sharding.replicated(mesh))
    length = config.data.limits.sequence_tokens

    def evaluate(params: Params) -> dict[str, float]:
        figures = {}
        for name, source in sources.items():
            total = count = 0.0
            for batch in held_out_rows(source, config.batch_size, config.run.evaluate_batches, length):
                added, tokens = loss(params, sharding.put_rows(batch, mesh))
                total, count = total + float(added), count + float(tokens)
            figures[f"{name}_loss"] = total / max(count, 1.0)
        return figures

    return evaluate
