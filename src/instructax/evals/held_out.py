"""Figures of held-out data: the loss that training stages report; text loss and ranking
accuracy with intervals."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructax import sharding
from instructax.data.batches import Source
from instructax.data.limits import DataLimits
from instructax.data.loaders import read_comparisons, validation_batches, validation_rows
from instructax.data.storage import PreparedData
from instructax.evals.intervals import ratio_estimate
from instructax.losses import next_token_loss, ordered_pairs
from instructax.masking import token_count
from instructax.models import Transformer
from instructax.models.scoring import (
    comparison_sequences,
    packed_logprobs,
    packed_outputs,
    select_last_token,
)
from instructax.models.sequence_packing import map_packed_rows
from instructax.runtime.preemption import check_stop_requested
from instructax.types import Array, Comparisons, LmBatch, Params

BINS = 10  # of the calibration, from a probability of 0.5 to 1


def held_out_loss(
    model: Transformer, mesh: Mesh, params: Params, batch: LmBatch
) -> tuple[Array, Array]:
    """(sum of the loss over trained tokens in nats, their number), both f32[], without
    dropout."""
    count = token_count(batch.loss_mask)
    logprobs = map_packed_rows(
        partial(packed_logprobs, model, params, temperature=1.0), batch, model, mesh
    )
    return next_token_loss(logprobs, batch.loss_mask) * count, count


def held_out_losses(
    model: Transformer, mesh: Mesh, config: Any, sources: Mapping[str, Source]
) -> Callable[[Params], dict[str, float]]:
    """A function from parameters to the loss in nats per token on each held-out source,
    `{name}_loss`."""
    loss = jax.jit(
        partial(held_out_loss, model, mesh), out_shardings=sharding.replicated(mesh)
    )
    length = config.data.limits.sequence_tokens

    def evaluate(params: Params) -> dict[str, float]:
        figures = {}
        for name, source in sources.items():
            total = count = 0.0
            for batch in validation_batches(
                source, config.batch_size, config.run.evaluate_batches, length
            ):
                check_stop_requested()
                added, tokens = loss(params, sharding.shard_rows(batch, mesh))
                total, count = total + float(added), count + float(tokens)
            figures[f"{name}_loss"] = total / max(count, 1.0)
        return figures

    return evaluate


class HeldOut:
    """The compiled figures of held-out data: the text loss of policies, the accuracy of the
    reward model."""

    def __init__(
        self,
        policy: Transformer,
        scorer: Transformer,
        mesh: Mesh,
        limits: DataLimits,
        *,
        batch_size: int,
        batches: int,
        comparison_tokens: int,
    ):
        """`comparison_tokens`: the width of rows that hold any prompt of the comparisons
        with its responses."""
        self._mesh, self._limits, self._size = mesh, limits, (batch_size, batches)

        def losses(params: Params, batch: LmBatch) -> tuple[Array, Array]:
            """Loss summed over each row's trained tokens, and their number: f32[B] each."""
            logprobs = map_packed_rows(
                partial(packed_logprobs, policy, params, temperature=1.0),
                batch,
                policy,
                mesh,
            )
            return -jnp.sum(logprobs, axis=1), jnp.sum(batch.loss_mask, axis=1)

        def differences(params: Params, batch: Comparisons) -> tuple[Array, Array, Array]:
            """Of each two responses, the first better than the second by people's ranks:
            whether that is so b[B, K, K], by how much its score f[B, K, K] and its length
            i[B, K, K] are above the other's."""
            rows, width = comparison_sequences(batch), comparison_tokens
            outputs = map_packed_rows(
                partial(packed_outputs, scorer, params), rows, scorer, mesh, width=width
            )
            scores, lengths = select_last_token(outputs, batch), jnp.sum(batch.mask, axis=2)
            pairs = ordered_pairs(batch.ranks, batch.valid)
            return (
                pairs,
                scores[:, :, None] - scores[:, None, :],
                lengths[:, :, None] - lengths[:, None, :],
            )

        everywhere = sharding.replicated(mesh)
        self._losses = jax.jit(losses, out_shardings=everywhere)
        self._differences = jax.jit(differences, out_shardings=everywhere)

    def text_loss(self, params: Params, text: PreparedData) -> dict[str, Any]:
        """Loss in nats per token on held-out text, with an interval over rows."""
        batches = validation_batches(
            text.sources["validation"], *self._size, self._limits.sequence_tokens
        )
        out = [
            jax.device_get(self._losses(params, sharding.shard_rows(batch, self._mesh)))
            for batch in batches
        ]
        losses, tokens = (np.concatenate(x) for x in zip(*out, strict=True))
        return dataclasses.asdict(ratio_estimate(losses, tokens))

    def ranking(self, params: Params, comparisons: PreparedData) -> dict[str, Any]:
        """Share of held-out pairs that the reward model orders as people did; of those of
        different length, that their length does; and how sure it is: of the pairs whose
        better one it gives a probability σ(|Δ score|) in a bin, the share it orders
        rightly.
        """
        source, out = comparisons.sources["validation"], []
        for rows in validation_rows(source, *self._size):
            batch = sharding.shard_rows(
                read_comparisons(source, rows, self._limits), self._mesh
            )
            out.append(jax.device_get(self._differences(params, batch)))
        pairs, scores, lengths = (np.concatenate(x) for x in zip(*out, strict=True))

        def share(right: np.ndarray, among: np.ndarray) -> dict[str, Any]:
            return dataclasses.asdict(
                ratio_estimate((right & among).sum(axis=(1, 2)), among.sum(axis=(1, 2)))
            )

        return {
            "accuracy": share(scores > 0, pairs),
            "longer_wins": share(lengths > 0, pairs & (lengths != 0)),
            "pairs": int(pairs.sum()),
            "calibration": calibration(scores[pairs]),
        }


def calibration(differences: np.ndarray) -> list[dict[str, Any]]:
    """For each bin of the model's confidence p = σ(|Δ|) that pairs fall in: mean p, share
    ordered rightly, pairs.

    `differences` f[n]: by how much the score of the better response of a pair is above that
    of the worse one. A model that is calibrated is right in a share p of the pairs that it
    is sure of by p.
    """
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        {
            "predicted": float(confidence[bins == i].mean()),
            "share": float((differences[bins == i] > 0).mean()),
            "pairs": int((bins == i).sum()),
        }
        for i in range(BINS)
        if (bins == i).any()
    ]
