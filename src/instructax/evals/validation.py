"""Validation metrics: the token loss of language models and the ranking of reward models.

Training stages log their means; the evaluation stage reports the same numbers with
intervals. Sums over rows are taken on the host in float64.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from instructax.evals.intervals import ratio_estimate
from instructax.losses import ordered_pairs, pairwise_ranking_loss
from instructax.masking import masked_sum, token_count
from instructax.models.scoring import (
    comparison_sequences,
    packed_logprobs,
    packed_outputs,
    select_last_token,
)
from instructax.models.sequence_packing import map_packed_rows
from instructax.models.transformer import Transformer
from instructax.runtime.preemption import check_stop_requested
from instructax.types import Array, Comparisons, LmBatch, Params, pytree

BINS = 10  # calibration bins, from a probability of 0.5 to 1


@pytree
class RowLosses:
    """The token loss of each row, without dropout."""

    # Rows differ in their number of tokens, so the mean is taken over all rows at the end.
    losses: Array  # f32[B], nats, summed over the row's trained tokens
    tokens: Array  # i32[B], how many these are


@pytree
class RankedPairs:
    """How a reward model and people order each two responses to a prompt."""

    losses: Array  # f32[B], the ranking loss of each prompt; 0 without a pair
    # Each pair occurs once, with the preferred response first; ties occur not at all.
    pairs: Array  # b[B, K, K], whether people rank the first above the second
    score_gaps: Array  # f32[B, K, K], score of the first − score of the second
    length_gaps: Array  # i32[B, K, K], length of the first − length of the second


def row_losses(model: Transformer, mesh: Mesh, params: Params, batch: LmBatch) -> RowLosses:
    """The next-token loss of each row of a batch."""
    # f32[B, T], zero outside the loss mask.
    logprobs = map_packed_rows(
        partial(packed_logprobs, model, params, temperature=1.0), batch, model, mesh
    )
    return RowLosses(
        losses=-jnp.sum(jnp.where(batch.loss_mask, logprobs, 0), axis=1),
        tokens=jnp.sum(batch.loss_mask, axis=1),
    )


def rank_pairs(
    model: Transformer, mesh: Mesh, params: Params, batch: Comparisons, *, width: int = 0
) -> RankedPairs:
    """Scores the responses of each prompt and compares every two of them.

    Args:
      model: the reward model's architecture.
      mesh: the mesh.
      params: the reward model's parameters.
      batch: ranked responses.
      width: of packed rows, at least the tokens of a prompt with all its responses; 0 = as
        wide as the batch is padded.
    """
    # f32[B, P + K · R]: a prompt and its K responses are one row.
    outputs = map_packed_rows(
        partial(packed_outputs, model, params),
        comparison_sequences(batch),
        model,
        mesh,
        width=width,
    )
    scores = select_last_token(outputs, batch)  # f32[B, K]
    lengths = jnp.sum(batch.mask, axis=2)  # i32[B, K]

    # The loss averages over a batch; one prompt at a time gives the terms of that mean.
    def prompt_loss(scores: Array, ranks: Array, valid: Array) -> Array:
        loss, _ = pairwise_ranking_loss(scores[None], ranks[None], valid[None])
        return loss

    return RankedPairs(
        losses=jax.vmap(prompt_loss)(scores, batch.ranks, batch.valid),
        pairs=ordered_pairs(batch.ranks, batch.valid),
        score_gaps=scores[:, :, None] - scores[:, None, :],
        length_gaps=lengths[:, :, None] - lengths[:, None, :],
    )


class ValidationLoss:
    """The loss of a language model on the validation split of packed rows.

    Args:
      model: the architecture.
      mesh: the mesh.
      batch_size: rows per batch.
      max_batches: at most this many batches are read.
      sequence_tokens: width of the rows.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        *,
        batch_size: int,
        max_batches: int,
        sequence_tokens: int,
    ):
        self._mesh = mesh
        self._batch_size = batch_size
        self._max_batches = max_batches
        self._sequence_tokens = sequence_tokens
        # Replicated, so that every process can compute the same sums.
        compiled = jax.jit(
            row_losses, static_argnums=(0, 1), out_shardings=sharding.replicated(mesh)
        )
        self._row_losses = partial(compiled, model, mesh)

    def mean(self, params: Params, source: Source) -> float:
        """Nats per token; 0 if there is no token."""
        rows = self._rows(params, source)
        return float(rows.losses.sum() / max(rows.tokens.sum(), 1))

    def estimate(self, params: Params, source: Source) -> dict[str, Any]:
        """Nats per token, with an interval over rows."""
        rows = self._rows(params, source)
        return dataclasses.asdict(ratio_estimate(rows.losses, rows.tokens))

    def _rows(self, params: Params, source: Source) -> Any:
        batches = validation_batches(
            source, self._batch_size, self._max_batches, self._sequence_tokens
        )
        zeros: Any = np.zeros  # numpy arrays stand in for jax arrays
        nothing = RowLosses(losses=zeros(0), tokens=zeros(0))
        return _concatenate(self._row_losses, params, batches, self._mesh, nothing)


class Ranking:
    """How well a reward model predicts the rankings of the validation split.

    Args:
      model: the reward model's architecture.
      mesh: the mesh.
      limits: lengths that comparisons are padded to.
      batch_size: prompts per batch.
      max_batches: at most this many batches are read.
      width: of packed rows, see `rank_pairs`.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        limits: DataLimits,
        *,
        batch_size: int,
        max_batches: int,
        width: int,
    ):
        self._mesh = mesh
        self._limits = limits
        self._batch_size = batch_size
        self._max_batches = max_batches
        # As in ValidationLoss.
        compiled = jax.jit(
            rank_pairs,
            static_argnums=(0, 1),
            static_argnames="width",
            out_shardings=sharding.replicated(mesh),
        )
        self._rank_pairs = partial(compiled, model, mesh, width=width)

    def means(self, params: Params, source: Source) -> dict[str, float]:
        """What training logs: loss, accuracy (equal scores count as wrong) and pairs."""
        # All counts are over pairs, except the loss, which is a mean over prompts with a
        # pair.
        ranked = self._ranked(params, source)
        pairs = int(ranked.pairs.sum())
        prompts = int(ranked.pairs.any(axis=(1, 2)).sum())
        correct = int((ranked.pairs & (ranked.score_gaps > 0)).sum())
        return {
            "validation_loss": float(ranked.losses.sum() / max(prompts, 1)),
            "validation_accuracy": correct / max(pairs, 1),
            "validation_pairs": float(pairs),
        }

    def estimates(self, params: Params, source: Source) -> dict[str, Any]:
        """Ranking accuracy with an interval over prompts, the longer-response baseline, and
        calibration: accuracy by bin of the predicted probability σ(|Δ score|)."""
        # Pairs of one prompt are not independent, so the intervals count prompts as units.
        ranked = self._ranked(params, source)
        pairs = ranked.pairs
        score_gaps = ranked.score_gaps
        length_gaps = ranked.length_gaps
        return {
            "accuracy": _pair_fraction(score_gaps > 0, pairs),
            # Of the pairs whose lengths differ, how often people prefer the longer one.
            "longer_wins": _pair_fraction(length_gaps > 0, pairs & (length_gaps != 0)),
            "pairs": int(pairs.sum()),
            "calibration": calibration(score_gaps[pairs]),
        }

    def _ranked(self, params: Params, source: Source) -> Any:
        # A generator: one batch is on the host at a time.
        def batches() -> Iterator[Comparisons]:
            for rows in validation_rows(source, self._batch_size, self._max_batches):
                yield read_comparisons(source, rows, self._limits)

        count = self._limits.completions  # K
        zeros: Any = np.zeros  # numpy arrays stand in for jax arrays
        nothing = RankedPairs(
            losses=zeros(0),
            pairs=zeros((0, count, count), bool),
            score_gaps=zeros((0, count, count)),
            length_gaps=zeros((0, count, count), int),
        )
        return _concatenate(self._rank_pairs, params, batches(), self._mesh, nothing)


def validation_losses(
    model: Transformer, mesh: Mesh, config: Any, sources: Mapping[str, Source]
) -> Callable[[Params], dict[str, float]]:
    """Returns the function from parameters to `{name}_loss` of each validation source.

    Args:
      model: the architecture.
      mesh: the mesh.
      config: the stage's config.
      sources: validation splits of packed rows by name.
    """
    # One compiled program serves all sources and all evaluations of a run.
    loss = ValidationLoss(
        model,
        mesh,
        batch_size=config.batch_size,
        max_batches=config.run.evaluate_batches,
        sequence_tokens=config.data.limits.sequence_tokens,
    )

    def evaluate(params: Params) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, source in sources.items():
            metrics[f"{name}_loss"] = loss.mean(params, source)
        return metrics

    return evaluate


def demonstration_scores(
    model: Transformer, params: Params, batch: LmBatch
) -> tuple[Array, Array]:
    """Sum of the demonstrations' scores in packed rows, and their number: f32[] each."""
    outputs: Any = model.apply(
        {"params": params}, batch.tokens, batch.segments, batch.positions
    )[0]
    # A demonstration is scored at its last token, the one before another segment begins.
    # Segment of the next token; 0 after the last column.
    following = jnp.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
    is_last = (batch.segments > 0) & (batch.segments != following)
    return masked_sum(outputs, is_last), token_count(is_last)


def calibration(score_gaps: np.ndarray) -> list[dict[str, Any]]:
    """Ranking accuracy by bin of the predicted probability p = σ(|Δ score|).

    A calibrated model is right in a fraction p of the pairs to which it gives probability
    p.

    Args:
      score_gaps: f[n], score of the response that people prefer − score of the other.

    Returns:
      For each bin with pairs: the mean p, the fraction ordered correctly, and the pairs.
    """
    # From 0.5 (equal scores) to 1.
    confidence = 1 / (1 + np.exp(-np.abs(score_gaps)))
    # Equal widths; a probability of exactly 1 belongs to the last bin.
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    table: list[dict[str, Any]] = []
    for index in range(BINS):
        in_bin = bins == index
        if not in_bin.any():
            continue
        # Fractions of the pairs in this bin.
        entry = {
            "predicted": float(confidence[in_bin].mean()),
            "share": float((score_gaps[in_bin] > 0).mean()),
            "pairs": int(in_bin.sum()),
        }
        table.append(entry)
    return table


def _pair_fraction(correct: np.ndarray, among: np.ndarray) -> dict[str, Any]:
    """Fraction of the pairs `among` that are `correct`, b[B, K, K] each, with an interval
    over prompts."""
    # Sums per prompt: i64[B].
    numerators = (correct & among).sum(axis=(1, 2))
    denominators = among.sum(axis=(1, 2))
    return dataclasses.asdict(ratio_estimate(numerators, denominators))


def _concatenate(
    function: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    mesh: Mesh,
    nothing: Any,
) -> Any:
    """`function(params, batch)` of all batches as numpy arrays, joined along axis 0.

    Args:
      function: a compiled function whose outputs have one row per row of the batch.
      params: its first argument.
      batches: this process's rows of each batch.
      mesh: the mesh to put them on.
      nothing: the output for no batch at all.
    """
    outputs = []
    for batch in batches:
        # An evaluation can take long; a stop request need not wait for its end.
        check_stop_requested()
        outputs.append(jax.device_get(function(params, sharding.shard_rows(batch, mesh))))
    if not outputs:
        return nothing
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *outputs)
    # Float64, so that sums over many rows stay exact enough to compare runs.
    return dataclasses.replace(joined, losses=joined.losses.astype(np.float64))
