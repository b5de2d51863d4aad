"""The compiled update of the reward model: the K-wise ranking loss over packed rows (paper,
Eq. 1).

The prompt and all its responses are one packed sequence, so the prompt runs forward once.
A reader who knows the loss (`losses.pairwise_ranking_loss`) may skip the packing: it moves
tokens between rows, and the results are those of unpacked responses.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax

from instructax.losses import ordered_pairs, pairwise_ranking_loss
from instructax.masking import token_count
from instructax.models.lora import merge_trees, trainable
from instructax.models.scoring import (
    comparison_sequences,
    last_token_columns,
    packed_outputs,
)
from instructax.models.sequence_packing import PackedLayout, pack, plan_packing
from instructax.models.transformer import Transformer
from instructax.training.accumulation import accumulate_packed, scale_tree
from instructax.training.optimizer import (
    OptimizerConfig,
    apply_gradients,
    learning_rate_at,
    skipped,
)
from instructax.training.settings import OptimizerSettings
from instructax.types import Array, Comparisons, LmBatch, Params, TrainState, pytree


@pytree
class RewardModelSettings:
    """Hyperparameters that are traced: a sweep changes them without compiling anew."""

    # Learning rate; the schedule multiplies it.
    optimizer: OptimizerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelProgram:
    """Everything that is fixed when the update is compiled."""

    model: Transformer
    optimizer: optax.GradientTransformation
    # Shape of the learning-rate schedule, a fraction of the peak.
    schedule: OptimizerConfig
    mesh: jax.sharding.Mesh
    total_steps: int
    # W of packed rows; no prompt with its responses is longer.
    row_tokens: int


def update_reward_model(
    program: RewardModelProgram,
    state: TrainState,
    batch: Comparisons,
    settings: RewardModelSettings,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the ranking loss of a batch of prompts.

    Args:
      program: what is compiled in.
      state: the state before the step; donated by the compiled update.
      batch: B prompts with K responses each, sharded by rows.
      settings: what may change without compiling anew.

    Returns:
      (state after the step, metrics f32[]).
    """
    # [B, P + K · R]: each prompt once, followed by its responses.
    sequences = comparison_sequences(batch)
    width = program.row_tokens
    layout = plan_packing(
        sequences.segments != 0,
        width=width,
        longest=width,
        compute=program.model.compute,
        mesh=program.mesh,
    )
    gradients, metrics = _batch_gradients(
        program.model, state.params, batch, sequences, layout
    )

    rate = learning_rate_at(
        state.step,
        peak=settings.optimizer.learning_rate,
        config=program.schedule,
        total_steps=program.total_steps,
    )
    # Non-finite gradients leave parameters and optimizer state as they are; the metric
    # `skipped` says so.
    state = apply_gradients(program.optimizer, state, gradients, rate)
    norm = optax.tree.norm(gradients)
    return dataclasses.replace(state, step=state.step + 1), {
        **metrics,
        "learning_rate": rate,
        "grad_norm": norm,
        "skipped": skipped(norm),
        "tokens": token_count(sequences.segments != 0),
        "padding": layout.padding_fraction(),
    }


def _batch_gradients(
    model: Transformer,
    params: Params,
    batch: Comparisons,
    sequences: LmBatch,
    layout: PackedLayout,
) -> tuple[Params, dict[str, Array]]:
    """Gradients and {"loss", "accuracy", "pairs"}, accumulated over microbatches.

    A packed row has prompts with all their responses, so each prompt's loss is computed
    within one microbatch.
    """
    # i32[B, K], the cell of each response's last token: its place in the flattened rows.
    last_tokens = jnp.take_along_axis(
        layout.token_index,
        last_token_columns(batch.mask, batch.prompts.tokens.shape[1]),
        axis=1,
    )
    totals = _counts(batch, batch.valid)
    # [rows, shards, W], numbers the cells, so that a microbatch knows which ones it has.
    num_cells = layout.segment_ids.size
    cells = jnp.arange(num_cells, dtype=jnp.int32).reshape(layout.segment_ids.shape)
    weighted_gradients = partial(
        _weighted_gradients, model, params, batch, last_tokens, totals, num_cells
    )
    gradients, metrics = accumulate_packed(
        weighted_gradients, (pack(sequences, layout), cells), layout
    )
    return gradients, {**metrics, "pairs": totals[1]}


def _weighted_gradients(
    model: Transformer,
    params: Params,
    batch: Comparisons,
    last_tokens: Array,
    totals: tuple[Array, Array],
    num_cells: int,
    microbatch: tuple[LmBatch, Array],
) -> tuple[Params, dict[str, Array]]:
    """The share of one microbatch in the gradients and metrics of the whole batch.

    Scores keep the layout [B, K] of the whole batch; responses of other microbatches are
    marked as invalid. The results of all microbatches add up.

    Args:
      model, params: the reward model.
      batch: the whole batch.
      last_tokens: i32[B, K], cell of each response's last token.
      totals: prompts with a pair, and pairs, of the whole batch.
      num_cells: tokens of all packed rows, with padding.
      microbatch: packed rows, and the cell of each of their tokens, i32[rows, W].
    """
    rows, cells = microbatch
    prompts, pairs = totals

    def at_last_tokens(x: Array) -> Array:
        # x [rows, W] at the last token of each response, [B, K]; zero if it is elsewhere.
        spread = jnp.zeros((num_cells,), x.dtype).at[cells].set(x)
        return spread.at[last_tokens].get(mode="fill", fill_value=0)

    # b[B, K], the responses that this microbatch has.
    valid = batch.valid & at_last_tokens(rows.segments != 0)

    def loss_of(trained: Params) -> tuple[Array, Array]:
        # Only trainable parameters are differentiated; with LoRA the kernels are constants.
        # The bias cancels in differences of scores. A constant in its place makes its
        # gradient exactly 0, so the optimizer never moves it.
        merged = with_bias(merge_trees(trained, params), 0.0)
        # f32[rows, W], a score at every token; the loss reads the last ones.
        outputs = packed_outputs(model, merged, rows)
        return pairwise_ranking_loss(at_last_tokens(outputs), batch.ranks, valid)

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    (loss, accuracy), gradients = gradient_of(trainable(params))
    # The loss is a mean over prompts, the accuracy a mean over pairs.
    own_prompts, own_pairs = _counts(batch, valid)
    weight = own_prompts / jnp.maximum(prompts, 1.0)
    gradients, loss = scale_tree(weight, (gradients, loss))
    accuracy = own_pairs / jnp.maximum(pairs, 1.0) * accuracy
    return gradients, {"loss": loss, "accuracy": accuracy}


def with_bias(params: Params, bias: Array | float) -> Params:
    """The parameters with another bias of the head.

    Rankings do not depend on it, and training never moves it.
    """
    return {
        **params,
        "scalar_head": {**params["scalar_head"], "bias": jnp.asarray(bias, jnp.float32)},
    }


def _counts(batch: Comparisons, valid: Array) -> tuple[Array, Array]:
    """(prompts with a pair, pairs) among the responses `valid` b[B, K], each f32[]."""
    # [B, K, K] → [B], pairs (better, worse) of each prompt; ties are no pairs.
    pairs = jnp.sum(ordered_pairs(batch.ranks, valid), axis=(1, 2), dtype=jnp.float32)
    return jnp.sum(pairs > 0, dtype=jnp.float32), jnp.sum(pairs)
