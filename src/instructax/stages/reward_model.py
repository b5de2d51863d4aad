"""The reward model: a scalar head on the policy's trunk, trained on K-wise rankings (paper,
section 3.5 and appendix C.2).

All pairs of a prompt are one batch element: the prompt and each of its responses runs
forward once, and every prompt has the same weight however many responses it has. Before
every save the bias of the head is set so that demonstrations score 0 on average.

Departures from the paper: its final reward model started from a 6B GPT-3 tuned on public
tasks (C.2 reports similar results from the SFT model), here training starts from the SFT
model; the loss of a prompt is a mean over its pairs without ties, where Eq. 1 divides by
C(K, 2).

Cost: a packed row is as wide as the longest prompt with all its responses, and shorter ones
share a row. Attention scores grow with the square of the width: K = 9 responses of 1,024
tokens to a prompt of 1,024 take 2.8 times as many scores as K separate rows, for 0.56 times
the tokens.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import jax
import numpy as np
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
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.init import abstract_params
from instructax.models.lora import LoraConfig, merge_trees
from instructax.models.sequence_packing import packed_width
from instructax.models.transformer import Transformer
from instructax.sharding import MeshConfig
from instructax.stages.memory import training_bytes
from instructax.stages.reward_model_update import (
    RewardModelProgram,
    RewardModelSettings,
    update_reward_model,
    with_bias,
)
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import (
    check_lengths,
    check_lora,
    check_rows,
    count_steps,
)
from instructax.training.optimizer import OptimizerConfig, make_optimizer, without_peak
from instructax.training.run import Run, RunConfig
from instructax.training.settings import settings_from
from instructax.training.state import (
    abstract_state,
    adapter_initializer,
    compile_update,
    init_state,
)
from instructax.types import Comparisons, Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelData:
    """Files of comparisons, and of the demonstrations that score 0 on average."""

    comparisons: tuple[str, ...]
    demonstrations: tuple[str, ...]
    # Whether prompts are formatted with the parent's chat template.
    chat: bool
    limits: DataLimits
    # Where prepared rows are kept.
    folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of reward-model training."""

    head: ClassVar[Head] = "scalar"

    stage: Literal["reward_model"]
    seed: Seed
    # Workdir of the run whose trunk it starts from.
    parent: str
    # Path of a tokenizer, or "bytes".
    tokenizer: str
    model: ModelConfig
    compute: ComputeConfig
    lora: LoraConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    data: RewardModelData
    # Prompts per batch, each with all its responses.
    batch_size: int
    # Passes over the prompts; more than one overfits (paper, C.2). 0 = use `steps`.
    epochs: float
    # Optimizer steps; 0 = use `epochs`.
    steps: int
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
    # 1: microbatches are packed rows, whatever the number of prompts.
    check_rows("batch_size", config.batch_size, 1, mesh)
    check_lengths(config.data.limits, config.model)
    check_lora(config.lora, config.model, config.parent)


def row_lengths(config: Config) -> RowLengths:
    """Pieces of the widest rows of comparisons, whose responses share a prompt, and whole
    rows of demonstrations."""
    # True: rows of comparisons have a shared prefix.
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
    program = _program(run)
    settings = settings_from(RewardModelSettings, config)
    # Shapes and shardings; `_start_state` or a checkpoint fills them.
    abstract = abstract_state(
        program.model, program.optimizer, mesh, adapter_initializer(config)
    )
    update = compile_update(update_reward_model, program, abstract, mesh)
    # Validation uses the packed width of training.
    ranking = Ranking(
        program.model,
        mesh,
        config.data.limits,
        batch_size=config.batch_size,
        max_batches=config.run.evaluate_batches,
        width=program.row_tokens,
    )
    validation = comparisons.sources["validation"]
    # The paper does not say which demonstrations; here those of the training split.
    demonstrations = run.data["demonstrations"].sources["train"]
    normalize = normalizer(program.model, mesh, config, demonstrations)

    def prepare_save(state: TrainState) -> TrainState:
        # Every checkpoint is normalized, so any of them can serve as a parent.
        return dataclasses.replace(state, params=normalize(state.params))

    run.fit(
        abstract=abstract,
        start=partial(_start_state, run, program),
        exported="params",
        total_steps=program.total_steps,
        update=lambda state, batch, _: update(state, batch, settings),
        read_batch=reader(config, comparisons.sources["train"], mesh),
        evaluate=lambda state: ranking.means(state.params, validation),
        prepare_save=prepare_save,
    )


def _program(run: Run) -> RewardModelProgram:
    """The program for the config and data of a run."""
    config: Config = run.config
    comparisons = run.data["comparisons"]
    total_steps = count_steps(
        steps=config.steps,
        epochs=config.epochs,
        rows=len(comparisons.sources["train"]),
        rows_per_step=config.batch_size,
    )
    # The data may be shorter than its limits, and narrower rows cost less attention.
    longest = comparisons.report.longest.values()
    row_tokens = packed_width(longest, config.data.limits.comparison_tokens, config.compute)
    optimizer = without_peak(config.optimizer)
    return RewardModelProgram(
        model=Transformer(config.model, config.compute, "scalar", run.mesh),
        optimizer=make_optimizer(optimizer),
        schedule=optimizer,
        mesh=run.mesh,
        total_steps=total_steps,
        row_tokens=row_tokens,
    )


def _start_state(run: Run, program: RewardModelProgram) -> TrainState:
    """The state of step 0: a fresh head on the trunk of the parent, if there is one."""
    config: Config = run.config
    # Initialized even with a parent: the head and LoRA factors are always fresh.
    key = rng.step_key(config.seed, "init", 0)
    fresh = init_state(
        program.model, program.optimizer, key, run.mesh, adapter_initializer(config)
    )
    if "parent" not in run.parents:
        return fresh
    # The parent is a policy, with a head over the vocabulary.
    policy = Transformer(config.model, config.compute, "tokens")
    loaded = run.parents["parent"].load(abstract_params(policy, run.mesh))
    # The unembedding is removed (paper, section 3.5), unless it is also the input
    # embedding.
    trunk = {name: leaf for name, leaf in loaded.items() if name in fresh.params}
    return dataclasses.replace(fresh, params=merge_trees(trunk, fresh.params))


def reader(config: Config, source: Source, mesh: Mesh) -> Callable[[int], Comparisons]:
    """A function that reads batch `index` of the comparisons onto the mesh."""

    def read(index: int) -> Comparisons:
        rows = batch_row_ids(index, config.batch_size, len(source), config.seed)
        # Each process reads only the rows that its own devices hold.
        own_rows = process_slice(rows, jax.process_index(), jax.process_count())
        batch = read_comparisons(source, own_rows, config.data.limits)
        return sharding.shard_rows(batch, mesh)

    return read


def normalizer(
    model: Transformer, mesh: jax.sharding.Mesh, config: Config, source: Source
) -> Callable[[Params], Params]:
    """A function that sets the bias of the head so that the demonstrations of `source`
    score 0 on average (paper, section 3.5)."""
    # (sum of scores, number of demonstrations) of a batch of packed rows.
    compiled = jax.jit(
        demonstration_scores, static_argnums=0, out_shardings=sharding.replicated(mesh)
    )
    scores = partial(compiled, model)
    length = config.data.limits.sequence_tokens

    def normalize(params: Params) -> Params:
        # From a bias of 0, so that the result does not depend on earlier calls.
        unbiased = with_bias(params, 0.0)
        # Batches are summed on the host in float64.
        total = 0.0
        count = 0.0
        for batch in validation_batches(source, config.batch_size, len(source), length):
            added, demonstrations = scores(unbiased, sharding.shard_rows(batch, mesh))
            total = total + float(added)
            count = count + float(demonstrations)
        bias = np.float32(-total / max(count, 1.0))
        # With its old sharding: another one would compile the next step anew.
        layout = params["scalar_head"]["bias"].sharding
        return with_bias(params, jax.device_put(bias, layout))

    return normalize
