"""Next-token training on packed rows: the update and the run that `pretrain` and `sft`
share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from instructax import rng, sharding
from instructax.data.preview import print_preview
from instructax.masking import token_count
from instructax.models.init import abstract_params
from instructax.models.layers import Dropout
from instructax.models.transformer import Transformer
from instructax.training.accumulation import (
    accumulate,
    microbatch_weights,
    next_token_gradients,
    split_microbatches,
)
from instructax.training.optimizer import (
    OptimizerConfig,
    apply_gradients,
    learning_rate_at,
    make_optimizer,
    skipped,
    without_peak,
)
from instructax.training.run import Run
from instructax.training.settings import OptimizerSettings, settings_from
from instructax.training.state import (
    AddAdapters,
    abstract_state,
    compile_update,
    init_state,
    no_adapters,
    start_from,
)
from instructax.types import Array, LmBatch, Params, TrainState, pytree


@pytree
class SupervisedSettings:
    """What a sweep may vary."""

    seed: Array  # i32[], of dropout
    optimizer: OptimizerSettings
    dropout: Array  # f32[], residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedProgram:
    """What is compiled in."""

    # A static argument of the compiled update.
    model: Transformer
    optimizer: optax.GradientTransformation
    schedule: OptimizerConfig
    mesh: Mesh
    total_steps: int
    num_microbatches: int
    has_dropout: bool


def supervised_program(
    config: Any, model: Transformer, mesh: Mesh, total_steps: int
) -> SupervisedProgram:
    """The program for the Config of `pretrain` or `sft`."""
    optimizer = without_peak(config.optimizer)
    return SupervisedProgram(
        model=model,
        optimizer=make_optimizer(optimizer),
        schedule=optimizer,
        mesh=mesh,
        total_steps=total_steps,
        num_microbatches=config.accumulate,
        has_dropout=config.dropout > 0,
    )


def supervised_update(
    program: SupervisedProgram,
    state: TrainState,
    batch: LmBatch,
    settings: SupervisedSettings,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the mean loss per trained token of the whole batch.

    Args:
      program: what is compiled in.
      state: the state to update.
      batch: packed rows, [B, T].
      settings: what a sweep may vary.

    Returns:
      The new state and the metrics, scalars.
    """
    gradients, losses, weights = _batch_gradients(program, state, batch, settings)
    learning_rate = learning_rate_at(
        state.step,
        peak=settings.optimizer.learning_rate,
        config=program.schedule,
        total_steps=program.total_steps,
    )
    state = apply_gradients(program.optimizer, state, gradients, learning_rate)
    # Before clipping.
    norm = optax.tree.norm(gradients)

    # Trained tokens are those of the loss mask; `tokens` also counts prompts.
    tokens = token_count(batch.segments > 0)
    metrics = {
        "loss": jnp.sum(weights * losses),
        "learning_rate": learning_rate,
        "grad_norm": norm,
        "skipped": skipped(norm),
        "trained_tokens": token_count(batch.loss_mask),
        "tokens": tokens,
        "padding": 1.0 - tokens / batch.segments.size,
    }
    return dataclasses.replace(state, step=state.step + 1), metrics


def _batch_gradients(
    program: SupervisedProgram,
    state: TrainState,
    batch: LmBatch,
    settings: SupervisedSettings,
) -> tuple[Params, Array, Array]:
    """Gradients of the whole batch, one microbatch at a time.

    Returns:
      (gradients, losses f32[microbatches], their weights f32[microbatches])
    """
    # [B, T] -> [microbatches, B / microbatches, T]
    microbatches = split_microbatches(batch, program.num_microbatches, program.mesh)
    # Weighted by trained tokens, the sum over microbatches is the whole batch's gradient.
    token_counts = jnp.sum(microbatches.loss_mask, axis=(1, 2), dtype=jnp.float32)
    weights = microbatch_weights(token_counts)
    # One key per row, so dropout does not depend on how rows are split.
    rows = jnp.arange(batch.tokens.shape[0])
    keys = rng.sample_keys(rng.step_key(settings.seed, "dropout", state.step), rows)

    def gradients_of(inputs: tuple[LmBatch, Array]) -> tuple[Params, dict[str, Array]]:
        microbatch, keys = inputs
        # Without dropout no random bits are drawn, so the program is smaller.
        dropout = None
        if program.has_dropout:
            dropout = Dropout(rate=settings.dropout, keys=keys)
        return next_token_gradients(program.model, state.params, microbatch, dropout)

    # key[B] → key[microbatches, B / microbatches]
    inputs = (microbatches, keys.reshape(program.num_microbatches, -1))
    gradients, metrics = accumulate(gradients_of, inputs, weights)
    return gradients, metrics["loss"], weights


def train_supervised(
    run: Run,
    model: Transformer,
    *,
    total_steps: int,
    read_batch: Callable[[int], LmBatch],
    evaluate: Callable[[Params], dict[str, float]],
    add_adapters: AddAdapters = no_adapters,
    preview: bool = False,
) -> None:
    """Trains `model` from the run's parent, or from fresh parameters if it has none.

    Args:
      run: a run of `pretrain` or `sft`.
      model: the network, with a token head.
      total_steps: length of the run.
      read_batch: this process's rows of the batch of a step, as numpy arrays.
      evaluate: validation metrics of parameters.
      add_adapters: adds LoRA factors to loaded parameters, where the config asks for them.
      preview: whether to print the first row of the first batch.
    """
    config = run.config
    # The program is static; seed, peak learning rate and dropout are its arguments.
    program = supervised_program(config, model, run.mesh, total_steps)
    settings = settings_from(SupervisedSettings, config)
    abstract = abstract_state(model, program.optimizer, run.mesh, add_adapters)
    update = compile_update(supervised_update, program, abstract, run.mesh)

    def start() -> TrainState:
        # Only for a fresh run: `start` is not called if there is a checkpoint.
        if preview and jax.process_index() == 0:
            print_preview(read_batch(0), run.tokenizer.decode)
        # Without a parent the run starts from fresh parameters.
        if "parent" in run.parents:
            params = run.parents["parent"].load(abstract_params(model, run.mesh))
            return start_from(params, program.optimizer, run.mesh, add_adapters)
        # Random weights have no adapters: `check_lora` requires a parent for them.
        key = rng.step_key(config.seed, "init", 0)
        return init_state(model, program.optimizer, key, run.mesh)

    run.fit(
        abstract=abstract,
        start=start,
        exported="params",
        total_steps=total_steps,
        update=lambda state, batch, _: update(state, batch, settings),
        read_batch=lambda step: sharding.shard_rows(read_batch(step), run.mesh),
        evaluate=lambda state: evaluate(state.params),
    )
