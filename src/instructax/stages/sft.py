"""Supervised training on packed rows: pretraining, the SFT baseline and the PPO
initialisation (paper, C.1, C.3).

Departure from the paper: rows are packed with several demonstrations, and a batch counts
rows, so that a batch of 32 holds more than 32 demonstrations.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from instructax import rng, sharding
from instructax.checkpoints.parents import open_parents, tokenizer_of
from instructax.config import Seed, check_range
from instructax.data.loaders import LmData, lm_reader, read_lm_data
from instructax.data.preview import print_preview
from instructax.evals.held_out import held_out_losses
from instructax.masking import token_count
from instructax.models import ComputeConfig, Dropout, LoraConfig, ModelConfig, Transformer
from instructax.models.init import abstract_params
from instructax.sharding import MeshConfig
from instructax.training import run as stage
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
)
from instructax.training.run import RunConfig
from instructax.training.state import (
    abstract_state,
    adapter_initializer,
    compile_update,
    init_state,
    start_from,
)
from instructax.types import Array, LmBatch, Params, TrainState, pytree


@pytree
class SupervisedSettings:
    """What a sweep varies."""

    seed: Array  # i32[], of dropout
    learning_rate: Array  # f32[], the peak
    dropout: Array  # f32[], residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedProgram:
    """What is compiled in."""

    model: Transformer
    optimizer: optax.GradientTransformation
    schedule: OptimizerConfig
    mesh: jax.sharding.Mesh
    total_steps: int
    accumulate: int  # parts of a batch that are in memory one after the other
    drops: bool  # whether there is dropout at all


def update(
    program: SupervisedProgram,
    state: TrainState,
    batch: LmBatch,
    settings: SupervisedSettings,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the mean loss per trained token of the whole batch."""
    parts = split_microbatches(batch, program.accumulate, program.mesh)
    weights = microbatch_weights(jnp.sum(parts.loss_mask, axis=(1, 2), dtype=jnp.float32))
    rows = jnp.arange(batch.tokens.shape[0])
    keys = rng.sample_keys(rng.step_key(settings.seed, "dropout", state.step), rows)

    def gradients_of(inputs: tuple[LmBatch, Array]) -> tuple[Params, dict[str, Array]]:
        part, keys = inputs
        dropout = Dropout(rate=settings.dropout, keys=keys) if program.drops else None
        return next_token_gradients(program.model, state.params, part, dropout)

    gradients, metrics = accumulate(
        gradients_of, (parts, keys.reshape(program.accumulate, -1)), weights
    )
    rate = learning_rate_at(
        state.step,
        peak=settings.learning_rate,
        config=program.schedule,
        total_steps=program.total_steps,
    )
    state, norm = (
        apply_gradients(program.optimizer, state, gradients, rate),
        optax.tree.norm(gradients),
    )
    tokens = token_count(batch.segments > 0)
    return dataclasses.replace(state, step=state.step + 1), {
        "loss": jnp.sum(weights * metrics["loss"]),
        "learning_rate": rate,
        "grad_norm": norm,
        "skipped": skipped(norm),
        "trained_tokens": token_count(batch.loss_mask),
        "tokens": tokens,
        "padding": 1.0 - tokens / batch.segments.size,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """A run of this stage."""

    stage: Literal["supervised"]
    seed: Seed
    parent: str  # workdir of the run to start from; "" = fresh parameters
    tokenizer: str  # path, or "bytes"
    model: ModelConfig
    compute: ComputeConfig
    lora: LoraConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    data: LmData
    batch_size: int  # packed rows
    accumulate: int  # parts of a batch that are in memory one after the other
    dropout: float  # residual; 0.2 in the SFT baseline
    epochs: float  # over the demonstrations, or over the text where there are none; 0 = `steps` counts
    steps: int  # 0 = `epochs` counts
    run: RunConfig

    def __post_init__(self):
        check_range(
            self,
            {"batch_size": 1, "accumulate": 1, "dropout": 0, "epochs": 0, "steps": 0},
            {"dropout": 1},
        )


def check(config: SupervisedConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    stage.check_rows("batch_size", config.batch_size, config.accumulate, mesh)
    stage.check_lengths(config.data.limits, config.model)
    stage.check_adapters(config.lora, config.model, config.parent)


def train(config: SupervisedConfig, workdir: Path, given: Mapping[str, Any]) -> None:
    """Runs the stage in `workdir`; `given` is the config as it was given, for the record."""
    mesh = sharding.make_mesh(config.mesh)
    check(config, mesh)
    config = stage.with_attention_kernel(config)
    tokenizer = tokenizer_of(config.tokenizer, config.model)
    parents = open_parents(
        {"parent": config.parent},
        {"parent": (config.model, "tokens")},
        tokenizer,
        config.tokenizer,
    )
    data = read_lm_data(
        config.data, tokenizer, stage.prompt_format_of(config.data.chat, parents, tokenizer)
    )
    counted = "demonstrations" if config.data.demonstrations else "text"
    share = 1.0 - config.data.text_fraction if config.data.demonstrations else 1.0
    total_steps = stage.steps_of(
        steps=config.steps,
        epochs=config.epochs,
        rows=len(data[counted].sources["train"]),
        rows_per_step=share * config.batch_size,
    )
    model = Transformer(config.model, config.compute, "tokens", mesh)
    optimizer = make_optimizer(config.optimizer)
    program = SupervisedProgram(
        model=model,
        optimizer=optimizer,
        schedule=config.optimizer,
        mesh=mesh,
        total_steps=total_steps,
        accumulate=config.accumulate,
        drops=config.dropout > 0,
    )
    settings = SupervisedSettings(
        seed=jnp.int32(config.seed),
        learning_rate=jnp.float32(config.optimizer.learning_rate),
        dropout=jnp.float32(config.dropout),
    )
    adapt = adapter_initializer(config)
    abstract = abstract_state(model, optimizer, mesh, adapt)
    step = compile_update(partial(update, program), abstract, mesh)
    read = lm_reader(
        config.data, data, "train", batch_size=config.batch_size, seed=config.seed
    )
    losses = held_out_losses(
        model,
        mesh,
        config,
        {name: held.sources["validation"] for name, held in data.items()},
    )

    def start() -> TrainState:
        if config.data.demonstrations and jax.process_index() == 0:
            print_preview(read(0), tokenizer.decode)
        if "parent" in parents:
            loaded = parents["parent"].load(abstract_params(model, mesh))
            return start_from(loaded, optimizer, mesh, adapt)
        return init_state(model, optimizer, rng.step_key(config.seed, "init", 0), mesh)

    stage.run(
        workdir,
        stage.RunManifestInputs(
            config=config, given=given, tokenizer=tokenizer, data=data, parents=parents
        ),
        abstract=abstract,
        start=start,
        exported="params",
        total_steps=total_steps,
        update=lambda state, batch, _: step(state, batch, settings),
        batches=lambda index: sharding.shard_rows(read(index), mesh),
        evaluate=lambda state: losses(state.params),
    )
