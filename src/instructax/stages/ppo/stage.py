"""The PPO stage as a run: its config, its data, what it starts from and what it logs.

The algorithm is in `algorithm`, its compiled form in `compiled`. Policy and value model
are trained; the reference (the policy as loaded) and the reward model are not.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from instructax import sharding
from instructax.checkpoints.parents import ExpectedParent, Head
from instructax.config import (
    ConfigError,
    Seed,
    check_fractions,
    check_positive,
    check_range,
    format_value,
    require,
)
from instructax.data.batches import batch_row_ids, process_slice, prompt_batch
from instructax.data.limits import DataLimits
from instructax.data.loaders import lm_reader
from instructax.data.prepare import prepare_prompts, prepare_text
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.evals.validation import validation_losses
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.init import abstract_params
from instructax.models.lora import LoraConfig
from instructax.models.transformer import Transformer
from instructax.sharding import MeshConfig
from instructax.stages.memory import cache_bytes, parameter_bytes, training_bytes
from instructax.stages.ppo.compiled import CompiledIteration, abstract_ppo_state
from instructax.stages.ppo.program import PpoOptions, PpoProgram, PpoSettings
from instructax.training.accumulation import microbatch_count
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import check_lengths, check_lora, check_rows
from instructax.training.optimizer import make_optimizer, without_peak
from instructax.training.run import Run, RunConfig
from instructax.training.settings import settings_from
from instructax.training.state import adapter_initializer, start_from
from instructax.types import Array, Params, PpoState, Prompts, Rollouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoData:
    """Files of prompts and of pretraining text."""

    prompts: tuple[str, ...]
    text: tuple[str, ...]  # () only if ptx_coef is 0
    chat: bool  # format prompts with the parents' chat template
    limits: DataLimits
    folder: str  # where prepared rows are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PpoOptions):
    """A run of this stage; one step is one iteration. PpoOptions has the other fields."""

    # Of the exported parameters, so that a later stage can read this workdir as a policy.
    head: ClassVar[Head] = "tokens"

    stage: Literal["ppo"]
    seed: Seed
    policy_parent: str  # workdir of the supervised run: first policy and KL reference
    reward_parent: str  # workdir of the reward model, which is also the first value model
    tokenizer: str  # path, or "bytes"
    model: ModelConfig  # of the policy
    reward_model: ModelConfig  # architecture of the reward model and of the value model
    compute: ComputeConfig
    lora: LoraConfig  # of policy and value model
    mesh: MeshConfig
    data: PpoData
    batch_size: int  # rollouts per iteration
    ptx_rows: int  # packed rows of pretraining text per optimizer step
    temperature: float
    kl_coef: float  # β of Eq. 2
    ptx_coef: float  # γ of Eq. 2; 0 = PPO without pretraining text
    clip: float  # of the probability ratio
    value_clip: float  # 0 = no clipping
    discount: float
    lambda_: float  # of generalized advantage estimation
    ema_decay: float  # at every optimizer step
    no_eos_penalty: float  # for responses without an end token; see `no_eos_rule`
    tolerance: float  # nats, mean over tokens: of the invariants
    samples: int  # rollouts written to samples.jsonl at every iteration
    run: RunConfig

    def __post_init__(self):
        # Least values of the integers and of the coefficients that may be 0.
        at_least = {
            "steps": 1,
            "batch_size": 1,
            "minibatches": 1,
            "inner_epochs": 1,
            "ptx_rows": 0,
            "samples": 0,
            "kl_coef": 0,
            "ptx_coef": 0,
            "value_clip": 0,
        }
        check_range(self, at_least)
        check_positive(self, "temperature", "clip", "tolerance")
        check_fractions(self, "discount", "lambda_", "ema_decay")
        # Text without `ptx_coef` is allowed: its validation loss is still reported.
        if self.ptx_coef > 0 and not self.data.text:
            raise ConfigError(
                f"ptx_coef = {self.ptx_coef} needs files in data.text = (): name some, or "
                "set ptx_coef = 0"
            )
        if not (self.policy_parent and self.reward_parent):
            raise ConfigError(
                "policy_parent and reward_parent must name finished runs of SFT and of the "
                f"reward model: policy_parent = {format_value(self.policy_parent)}, "
                f"reward_parent = {format_value(self.reward_parent)}"
            )

    def parents(self) -> dict[str, ExpectedParent]:
        """The policy to start from, and the reward model."""
        return {
            "policy_parent": ExpectedParent(self.policy_parent, self.model, "tokens"),
            "reward_parent": ExpectedParent(
                self.reward_parent, self.reward_model, "scalar"
            ),
        }

    def prepare_data(
        self, tokenizer: Tokenizer, prompt_format: PromptFormat = PLAIN_FORMAT
    ) -> dict[str, PreparedData]:
        """Prompts, and text if there are files of it."""
        # Rows are kept in `folder`; a later run with the same inputs reads them again.
        limits = self.data.limits
        folder = Path(self.data.folder)
        prompts = [Path(path) for path in self.data.prompts]
        prepared = {
            "prompts": prepare_prompts(prompts, tokenizer, limits, folder, prompt_format)
        }
        if self.data.text:
            text = [Path(path) for path in self.data.text]
            prepared["text"] = prepare_text(text, tokenizer, limits, folder)
        return prepared


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    # Prompt and response are scored by both networks, so both need positions for them.
    limits = config.data.limits
    check_lengths(limits, config.model)
    check_lengths(limits, config.reward_model)
    check_lora(config.lora, config.model, config.policy_parent)
    check_lora(config.lora, config.reward_model, config.reward_parent)
    # Each minibatch has the same number of rollouts on each device that shares rows.
    check_rows("batch_size", config.batch_size, config.minibatches, mesh)
    require(
        limits.prompt_tokens + limits.response_tokens <= limits.sequence_tokens,
        f"config.data.limits.sequence_tokens = {limits.sequence_tokens}, the width of "
        "packed rows, must hold prompt_tokens + response_tokens = "
        f"{limits.prompt_tokens} + {limits.response_tokens}",
    )
    if config.ptx_coef > 0:
        # Each optimizer step splits its text rows into equal microbatches.
        count = microbatch_count(config.ptx_rows, config.compute.microbatch_rows, mesh)
        check_rows("ptx_rows", config.ptx_rows, count, mesh)


def row_lengths(config: Config) -> RowLengths:
    """Pieces of the packed rows that networks score and train on."""
    return split_lengths(config.compute, config.data.limits.sequence_tokens), False


def memory(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes per device of the four networks, two optimizers and the sampler's caches."""
    compute = config.compute
    limits = config.data.limits
    # Parameters, gradients and optimizer state of the two networks that are trained.
    policy = training_bytes(
        "policy", config, config.model, "tokens", config.optimizer, mesh
    )
    value = training_bytes(
        "value model",
        config,
        config.reward_model,
        "scalar",
        config.value_optimizer,
        mesh,
    )
    # Per device. The sampler decodes `slots` responses at one time, with a cache for each;
    # the prompts' own cache is filled for all rows first.
    rows = -(-config.batch_size // sharding.num_row_shards(mesh))
    slots = min(compute.slots, rows)
    length = limits.prompt_tokens + limits.response_tokens
    return {
        **policy,
        **value,
        # The average is stored like the policy's parameters.
        "averaged policy": policy["policy"],
        "reference policy": parameter_bytes(config.model, compute, "tokens", mesh),
        "reward model": parameter_bytes(config.reward_model, compute, "scalar", mesh),
        "cache of the prompts": cache_bytes(
            config.model, compute, rows, limits.prompt_tokens, mesh
        ),
        "cache of the sampler": cache_bytes(config.model, compute, slots, length, mesh),
    }


def train(run: Run) -> None:
    """Trains policy and value model."""
    config: Config = run.config
    mesh = run.mesh
    tokenizer = run.tokenizer
    program = make_program(config, mesh, tokenizer.eos_id)
    add_policy_adapters = adapter_initializer(config, 0)
    add_value_adapters = adapter_initializer(config, 1)
    abstract = abstract_ppo_state(program, add_policy_adapters, add_value_adapters)
    # Kept unchanged for the whole run. The policy and the value model start as copies of
    # the two; a resumed run loads them again beside its checkpoint.
    ref_params = run.parents["policy_parent"].load(abstract_params(program.policy, mesh))
    reward_params = run.parents["reward_parent"].load(
        abstract_params(program.value_model, mesh)
    )
    iterate = CompiledIteration(
        program,
        abstract,
        settings_from(PpoSettings, config),
        ref_params,
        reward_params,
        config.tolerance,
    )
    text_losses = _text_losses(run, program)
    first_samples = _first_rows(config.samples, mesh)

    def start() -> PpoState:
        policy = start_from(ref_params, program.policy_optimizer, mesh, add_policy_adapters)
        value = start_from(reward_params, program.value_optimizer, mesh, add_value_adapters)
        # A copy, because the state is donated and must not hold a buffer twice.
        ema = jax.tree.map(jnp.copy, policy.params)
        return PpoState(policy=policy, value=value, ema=ema)

    def update(state: PpoState, batch: Any, log: Any) -> tuple[PpoState, dict[str, Any]]:
        state, metrics, rollouts, scores = iterate(state, batch, log.phase)
        with log.phase("samples"):
            shown, shown_scores = first_samples((rollouts, scores))
            for record in sample_records(shown, shown_scores, tokenizer):
                log.write_sample(int(state.step), record)
        return state, metrics

    run.fit(
        abstract=abstract,
        start=start,
        exported="ema",
        total_steps=config.steps,
        update=update,
        read_batch=batch_reader(config, run.data, mesh),
        evaluate=lambda state: text_losses(state.ema),
    )


def _text_losses(run: Run, program: PpoProgram) -> Callable[[Params], dict[str, float]]:
    """Returns the function from a policy's parameters to its losses on validation text.

    They show what PPO costs in language modeling; without text there are none.
    """
    sources = {}
    if "text" in run.data:
        sources["text"] = run.data["text"].sources["validation"]
    return validation_losses(program.policy, run.mesh, run.config, sources)


def _first_rows(count: int, mesh: Mesh) -> Callable[[Any], Any]:
    """Returns the compiled function that takes the first `count` rows of a tree of arrays.

    The result is replicated, so that the process that writes the samples has all of them.
    """

    def first_rows(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[:count], tree)

    return jax.jit(first_rows, out_shardings=sharding.replicated(mesh))


def make_program(config: Config, mesh: Mesh, eos_id: int) -> PpoProgram:
    """Networks, optimizers and options of the config.

    Configs that differ only in seed, coefficients and learning rates have equal programs.
    """
    limits = config.data.limits
    optimizer = without_peak(config.optimizer)
    value_optimizer = without_peak(config.value_optimizer)
    options = PpoOptions(
        steps=config.steps,
        minibatches=config.minibatches,
        inner_epochs=config.inner_epochs,
        optimizer=optimizer,
        value_optimizer=value_optimizer,
        old_logprobs=config.old_logprobs,
        no_eos_rule=config.no_eos_rule,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages,
    )
    return PpoProgram(
        options=options,
        policy=Transformer(config.model, config.compute, "tokens", mesh),
        value_model=Transformer(config.reward_model, config.compute, "scalar", mesh),
        policy_optimizer=make_optimizer(optimizer),
        value_optimizer=make_optimizer(value_optimizer),
        mesh=mesh,
        eos_id=eos_id,
        response_tokens=limits.response_tokens,
        row_tokens=limits.sequence_tokens,
        clip_values=config.value_clip > 0,
    )


def batch_reader(
    config: Config, data: Mapping[str, PreparedData], mesh: Mesh
) -> Callable[[int], Any]:
    """Returns the function from a step to its batch: (prompts, text or None).

    The text has the rows of all optimizer steps of the iteration.
    """
    # Prompts are repeated in a new order when all have been used.
    prompts = data["prompts"].sources["train"]
    limits = config.data.limits
    # One batch of text per iteration holds the rows of all its optimizer steps.
    read_text = None
    if config.ptx_coef > 0:
        # Only text, no demonstrations: the pretraining term of Eq. 2.
        read_text = lm_reader(
            data,
            "train",
            text_fraction=1.0,
            sequence_tokens=limits.sequence_tokens,
            batch_size=config.ptx_rows * config.minibatches * config.inner_epochs,
            seed=config.seed,
        )

    def read(step: int) -> tuple[Prompts, Any]:
        # Both are functions of the step alone, so a resumed run reads the same batches.
        rows = batch_row_ids(step, config.batch_size, len(prompts), config.seed)
        # Each process reads only the rows of its own devices.
        own_rows = process_slice(rows, jax.process_index(), jax.process_count())
        text = None if read_text is None else read_text(step)
        batch = (prompt_batch(prompts, own_rows, limits.prompt_tokens), text)
        return sharding.shard_rows(batch, mesh)

    return read


def sample_records(
    rollouts: Rollouts, scores: Array, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The rollouts as text with their scores, one record each for `samples.jsonl`."""
    # One transfer for all rows; the loop below works on numpy arrays.
    host: Any = jax.device_get(rollouts)
    host_scores: Any = jax.device_get(scores)
    prompts = host.prompts
    records: list[dict[str, Any]] = []
    for row, row_score in enumerate(host_scores):
        # Without padding; the end token, if any, is decoded like the others.
        mask = host.mask[row]
        record = {
            "prompt": tokenizer.decode(prompts.tokens[row][prompts.mask[row]]),
            "response": tokenizer.decode(host.responses[row][mask]),
            "score": float(row_score),
            "tokens": int(mask.sum()),
        }
        records.append(record)
    return records
