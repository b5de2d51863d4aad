"""The reward model: a scalar head on the policy's trunk, trained on K-wise rankings (paper,
section 3.5 and C.2).

All pairs of a prompt are one batch element: the prompt and each of its responses is run
forward once, and each prompt weighs the same however many responses it has. At every save
the head's bias is set so that demonstrations score 0 on average.

Departures from the paper: its last reward model started from a 6B GPT-3 tuned on public
tasks (C.2, "similar results" from the SFT model), here it is the SFT model; the loss of a
prompt is a mean over its untied pairs, where Eq. 1 divides by C(K, 2).

Cost: rows are as wide as the longest prompt with its responses, short ones share one, and
attention scores are of the square: at K = 9 and 1024 + 1024 tokens 2.8 times as many as K
rows would have, for 0.56 times the tokens.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from instructax import rng, sharding
from instructax.checkpoints.parents import ExpectedParent, Head
from instructax.config import Seed, check_range
from instructax.data.batches import Source, batch_row_ids, process_slice
from instructax.data.limits import DataLimits
from instructax.data.loaders import read_comparisons, validation_batches
from instructax.data.prepare import prepare_comparisons, prepare_demonstrations
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.evals.validation import Ranking, demonstration_scores
from instructax.losses import ordered_pairs, pairwise_ranking_loss
from instructax.masking import token_count
from instructax.models import (
    ComputeConfig,
    LoraConfig,
    ModelConfig,
    Transformer,
    merge_trees,
    trainable,
)
from instructax.models.init import abstract_params
from instructax.models.scoring import (
    comparison_sequences,
    last_token_columns,
    packed_outputs,
)
from instructax.models.sequence_packing import (
    pack,
    packed_width,
    plan_packing,
)
from instructax.sharding import MeshConfig
from instructax.stages.memory import training_bytes
from instructax.training.accumulation import accumulate_packed, scale_tree
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import (
    check_lengths,
    check_lora,
    check_rows,
    count_steps,
)
from instructax.training.optimizer import (
    OptimizerConfig,
    apply_gradients,
    learning_rate_at,
    make_optimizer,
    skipped,
)
from instructax.training.run import Run, RunConfig
from instructax.training.settings import OptimizerSettings, settings_from
from instructax.training.state import (
    abstract_state,
    adapter_initializer,
    compile_update,
    init_state,
)
from instructax.types import Array, Comparisons, LmBatch, Params, TrainState, pytree


@pytree
class RewardModelSettings:
    """What a sweep varies."""

    optimizer: OptimizerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelProgram:
    """What is compiled in."""

    model: Transformer
    optimizer: optax.GradientTransformation
    schedule: OptimizerConfig
    mesh: jax.sharding.Mesh
    total_steps: int
    row_tokens: int  # W of the rows that prompts with their responses are packed into; none is longer


def update_reward_model(
    program: RewardModelProgram,
    state: TrainState,
    batch: Comparisons,
    settings: RewardModelSettings,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the ranking loss of the whole batch of prompts."""
    rows = comparison_sequences(batch)
    compute, width = program.model.compute, program.row_tokens
    layout = plan_packing(
        rows.segments != 0, width=width, longest=width, compute=compute, mesh=program.mesh
    )
    ends = jnp.take_along_axis(
        layout.token_index,
        last_token_columns(batch.mask, batch.prompts.tokens.shape[1]),
        axis=1,
    )
    prompts, pairs = _counts(batch, batch.valid)

    def share_of(part: tuple[LmBatch, Array]) -> tuple[Params, dict[str, Array]]:
        rows, cells = part

        def at_the_ends(x: Array) -> Array:
            """Of x [rows, columns] what stands at the end of each response, zero if that is
            in another part: [B, K]."""
            spread = jnp.zeros((layout.segment_ids.size,), x.dtype).at[cells].set(x)
            return spread.at[ends].get(mode="fill", fill_value=0)

        valid = batch.valid & at_the_ends(rows.segments != 0)

        def loss_of(moved: Params) -> tuple[Array, Array]:
            params = with_bias(merge_trees(moved, state.params), 0.0)
            outputs = packed_outputs(program.model, params, rows)
            return pairwise_ranking_loss(at_the_ends(outputs), batch.ranks, valid)

        (loss, accuracy), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            trainable(state.params)
        )
        own_prompts, own_pairs = _counts(batch, valid)
        gradients, loss = scale_tree(
            own_prompts / jnp.maximum(prompts, 1.0), (gradients, loss)
        )
        return gradients, {
            "loss": loss,
            "accuracy": own_pairs / jnp.maximum(pairs, 1.0) * accuracy,
        }

    numbers = jnp.arange(layout.segment_ids.size, dtype=jnp.int32).reshape(
        layout.segment_ids.shape
    )
    gradients, metrics = accumulate_packed(share_of, (pack(rows, layout), numbers), layout)
    rate = learning_rate_at(
        state.step,
        peak=settings.optimizer.learning_rate,
        config=program.schedule,
        total_steps=program.total_steps,
    )
    state, norm = (
        apply_gradients(program.optimizer, state, gradients, rate),
        optax.tree.norm(gradients),
    )
    return dataclasses.replace(state, step=state.step + 1), {
        **metrics,
        "pairs": pairs,
        "learning_rate": rate,
        "grad_norm": norm,
        "skipped": skipped(norm),
        "tokens": token_count(rows.segments != 0),
        "padding": layout.padding_fraction(),
    }


def with_bias(params: Params, bias: Array | float) -> Params:
    """The parameters with another bias of the head. Rankings do not depend on it, and
    training never moves it."""
    return {
        **params,
        "scalar_head": {**params["scalar_head"], "bias": jnp.asarray(bias, jnp.float32)},
    }


def _counts(batch: Comparisons, valid: Array) -> tuple[Array, Array]:
    """(prompts with a pair, pairs) among the responses that are `valid` b[B, K], each
    f32[]."""
    pairs = jnp.sum(ordered_pairs(batch.ranks, valid), axis=(1, 2), dtype=jnp.float32)
    return jnp.sum(pairs > 0, dtype=jnp.float32), jnp.sum(pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelData:
    """Files of comparisons, and the demonstrations that score 0 on average."""

    comparisons: tuple[str, ...]
    demonstrations: tuple[str, ...]
    chat: bool  # whether prompts are worded by the parent's chat template
    limits: DataLimits
    folder: str  # where prepared rows are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of reward-model training."""

    head: ClassVar[Head] = "scalar"

    stage: Literal["reward_model"]
    seed: Seed
    parent: str  # workdir of the run whose trunk it starts from
    tokenizer: str  # path, or "bytes"
    model: ModelConfig
    compute: ComputeConfig
    lora: LoraConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    data: RewardModelData
    batch_size: int  # prompts
    epochs: float  # more than one overfits (paper, C.2); 0 = use `steps`
    steps: int  # 0 = use `epochs`
    run: RunConfig

    def __post_init__(self):
        check_range(self, {"batch_size": 1, "epochs": 0, "steps": 0})

    def parents(self) -> dict[str, ExpectedParent]:
        """The policy whose trunk it starts from."""
        return {"parent": ExpectedParent(self.parent, self.model, "tokens")}

    def prepare_data(
        self, tokenizer: Tokenizer, prompt_format: PromptFormat = PLAIN_FORMAT
    ) -> dict[str, PreparedData]:
        """Comparisons, and the demonstrations that score 0 on average."""
        data = self.data
        folder = Path(data.folder)
        comparisons = [Path(path) for path in data.comparisons]
        demonstrations = [Path(path) for path in data.demonstrations]
        return {
            "comparisons": prepare_comparisons(
                comparisons, tokenizer, data.limits, folder, prompt_format
            ),
            "demonstrations": prepare_demonstrations(
                demonstrations, tokenizer, data.limits, folder, prompt_format
            ),
        }


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    check_rows("batch_size", config.batch_size, 1, mesh)
    check_lengths(config.data.limits, config.model)
    check_lora(config.lora, config.model, config.parent)


def row_lengths(config: Config) -> RowLengths:
    """Pieces of the widest rows of comparisons, whose responses share a prompt, and whole
    rows of demonstrations."""
    limits = config.data.limits
    comparisons = split_lengths(config.compute, limits.comparison_tokens)
    return (*comparisons, limits.sequence_tokens), True


def memory(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes per device of the model and its optimizer."""
    return training_bytes(
        "reward model", config, config.model, "scalar", config.optimizer, mesh
    )


def train(run: Run) -> None:
    """Trains the reward model on comparisons, from the parent's trunk."""
    config: Config = run.config
    mesh = run.mesh
    comparisons = run.data["comparisons"]
    train_rows = comparisons.sources["train"]
    total_steps = count_steps(
        steps=config.steps,
        epochs=config.epochs,
        rows=len(train_rows),
        rows_per_step=config.batch_size,
    )
    longest = comparisons.report.longest.values()
    row_tokens = packed_width(longest, config.data.limits.comparison_tokens, config.compute)

    model = Transformer(config.model, config.compute, "scalar", mesh)
    optimizer = make_optimizer(config.optimizer)
    program = RewardModelProgram(
        model=model,
        optimizer=optimizer,
        schedule=config.optimizer,
        mesh=mesh,
        total_steps=total_steps,
        row_tokens=row_tokens,
    )
    settings = settings_from(RewardModelSettings, config)
    add_adapters = adapter_initializer(config)
    abstract = abstract_state(model, optimizer, mesh, add_adapters)
    update = compile_update(partial(update_reward_model, program), abstract, mesh)
    ranking = Ranking(
        model,
        mesh,
        config.data.limits,
        batch_size=config.batch_size,
        max_batches=config.run.evaluate_batches,
        width=row_tokens,
    )
    validation = comparisons.sources["validation"]
    demonstrations = run.data["demonstrations"].sources["train"]
    normalize = normalizer(model, mesh, config, demonstrations)

    def start() -> TrainState:
        key = rng.step_key(config.seed, "init", 0)
        fresh = init_state(model, optimizer, key, mesh, add_adapters)
        if "parent" not in run.parents:
            return fresh
        policy = Transformer(config.model, config.compute, "tokens")
        loaded = run.parents["parent"].load(abstract_params(policy, mesh))
        # The unembedding is left behind (paper, section 3.5), unless it is the input
        # embedding as well.
        trunk = {name: leaf for name, leaf in loaded.items() if name in fresh.params}
        return dataclasses.replace(fresh, params=merge_trees(trunk, fresh.params))

    def prepare_save(state: TrainState) -> TrainState:
        return dataclasses.replace(state, params=normalize(state.params))

    run.fit(
        abstract=abstract,
        start=start,
        exported="params",
        total_steps=total_steps,
        update=lambda state, batch, _: update(state, batch, settings),
        read_batch=reader(config, train_rows, mesh),
        evaluate=lambda state: ranking.means(state.params, validation),
        prepare_save=prepare_save,
    )


def reader(config: Config, source: Source, mesh: Mesh) -> Callable[[int], Comparisons]:
    """Batch `index` of the comparisons, on the mesh."""

    def read(index: int) -> Comparisons:
        rows = batch_row_ids(index, config.batch_size, len(source), config.seed)
        mine = process_slice(rows, jax.process_index(), jax.process_count())
        return sharding.shard_rows(read_comparisons(source, mine, config.data.limits), mesh)

    return read


def normalizer(
    model: Transformer, mesh: jax.sharding.Mesh, config: Config, source: Source
) -> Callable[[Params], Params]:
    """A function that sets the bias so that the demonstrations of `source` score 0 on
    average (paper, section 3.5)."""
    scores = jax.jit(
        partial(demonstration_scores, model), out_shardings=sharding.replicated(mesh)
    )
    length = config.data.limits.sequence_tokens

    def normalize(params: Params) -> Params:
        # From a bias of 0: the outcome does not depend on how often this was done before.
        unbiased = with_bias(params, 0.0)
        total = count = 0.0
        for batch in validation_batches(source, config.batch_size, len(source), length):
            added, demonstrations = scores(unbiased, sharding.shard_rows(batch, mesh))
            total, count = total + float(added), count + float(demonstrations)
        # As it was laid out: else the next step would be compiled anew.
        layout = params["scalar_head"]["bias"].sharding
        return with_bias(
            params, jax.device_put(np.float32(-total / max(count, 1.0)), layout)
        )

    return normalize
