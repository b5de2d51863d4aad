"""The PPO stage as a run: its config, its three compiled programs, its invariants, and what
it logs.

The algorithm is in `ppo`. Policy and value network are trained; the reference (the policy
as loaded) and the reward model stay as they are.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
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
    require,
)
from instructax.data.batches import batch_row_ids, process_slice, prompt_batch
from instructax.data.limits import DataLimits
from instructax.data.loaders import LmData, lm_reader
from instructax.data.prepare import prepare_prompts, prepare_text
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.evals.held_out import held_out_losses
from instructax.models import ComputeConfig, LoraConfig, ModelConfig, Transformer
from instructax.models.init import abstract_params
from instructax.runtime.preemption import check_stop_requested
from instructax.sharding import MeshConfig
from instructax.stages.memory import cache_bytes, parameter_bytes, training_bytes
from instructax.stages.ppo import algorithm as ppo
from instructax.stages.ppo.experience import AdvantageSettings, check_rollouts, check_update
from instructax.training.accumulation import microbatch_count
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import check_lengths, check_lora, check_rows
from instructax.training.optimizer import OptimizerConfig, make_optimizer
from instructax.training.run import Run, RunConfig
from instructax.training.state import (
    AddAdapters,
    abstract_state,
    adapter_initializer,
    layouts,
    start_from,
)
from instructax.types import Array, Params, PpoState, Prompts, Rollouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoData:
    """Files of prompts, and of pretraining text."""

    prompts: tuple[str, ...]
    text: tuple[str, ...]  # () only where ptx_coef is 0
    chat: bool  # whether prompts are worded by the parents' chat template
    limits: DataLimits
    folder: str  # where prepared rows are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of this stage; one step is one iteration."""

    head: ClassVar[Head] = "tokens"

    stage: Literal["ppo"]
    seed: Seed
    policy_parent: str  # workdir of the supervised run: first policy and KL reference
    reward_parent: str  # workdir of the reward model: rewards, and the first value network
    tokenizer: str  # path, or "bytes"
    model: ModelConfig  # of the policy
    reward_model: ModelConfig  # of reward model and value network
    compute: ComputeConfig
    lora: LoraConfig  # of policy and value network
    mesh: MeshConfig
    optimizer: OptimizerConfig  # the policy's; schedules count iterations
    value_optimizer: OptimizerConfig
    data: PpoData
    steps: int  # iterations
    batch_size: int  # rollouts of one iteration
    minibatches: int  # optimizer steps of one inner epoch
    inner_epochs: int
    old_logprobs: Literal[
        "scorer", "sampler"
    ]  # whose log-probabilities the ratio starts from
    ptx_rows: int  # packed rows of pretraining text for each optimizer step
    temperature: float
    kl_coef: float  # β of Eq. 2
    ptx_coef: float  # γ of Eq. 2; 0 = PPO, and no text is run through the policy
    clip: float
    value_clip: float  # 0 = unclipped
    discount: float
    lambda_: float
    ema_decay: float  # at every optimizer step
    no_eos_penalty: float  # taken off the score of a response that did not end
    whiten_rewards: bool
    whiten_advantages: bool
    tolerance: float  # nats, mean over tokens: of the invariants
    samples: int  # rollouts written to samples.jsonl at every iteration
    run: RunConfig

    def __post_init__(self):
        counts = dict.fromkeys(("steps", "batch_size", "minibatches", "inner_epochs"), 1)
        check_range(
            self,
            counts
            | {"ptx_rows": 0, "samples": 0, "kl_coef": 0, "ptx_coef": 0, "value_clip": 0},
        )
        check_positive(self, "temperature", "clip", "tolerance")
        check_fractions(self, "discount", "lambda_", "ema_decay")
        if self.ptx_coef > 0 and not self.data.text:
            raise ConfigError(f"ptx_coef = {self.ptx_coef} needs files in data.text")
        if not (self.policy_parent and self.reward_parent):
            raise ConfigError("policy_parent and reward_parent must name finished runs")

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
        """Prompts, and text where there are files of it."""
        data = self.data
        folder = Path(data.folder)
        prompts = [Path(path) for path in data.prompts]
        prepared = {
            "prompts": prepare_prompts(
                prompts, tokenizer, data.limits, folder, prompt_format
            )
        }
        if data.text:
            text = [Path(path) for path in data.text]
            prepared["text"] = prepare_text(text, tokenizer, data.limits, folder)
        return prepared


def train(run: Run) -> None:
    """Trains policy and value network."""
    config: Config = run.config
    mesh, tokenizer = run.mesh, run.tokenizer
    parents, data = run.parents, run.data
    program = program_of(config, mesh, tokenizer.eos_id)
    settings = settings_of(config)
    adapt = adapter_initializer(config, 0), adapter_initializer(config, 1)
    abstract = abstract_ppo_state(program, *adapt)
    ref_params = parents["policy_parent"].load(abstract_params(program.policy, mesh))
    reward_params = parents["reward_parent"].load(abstract_params(program.scorer, mesh))
    iterate = Iteration(
        program, abstract, settings, ref_params, reward_params, config.tolerance
    )
    text_losses = held_out_losses(
        program.policy,
        mesh,
        config,
        {n: d.sources["validation"] for n, d in data.items() if n == "text"},
    )
    # Replicated, so that the process that writes them holds them all.
    shown = jax.jit(
        lambda tree: jax.tree.map(lambda x: x[: config.samples], tree),
        out_shardings=sharding.replicated(mesh),
    )

    def start() -> PpoState:
        policy = start_from(ref_params, program.policy_optimizer, mesh, adapt[0])
        value = start_from(reward_params, program.value_optimizer, mesh, adapt[1])
        return PpoState(
            policy=policy, value=value, ema=jax.tree.map(jnp.copy, policy.params)
        )

    def update(state: PpoState, batch: Any, log: Any) -> tuple[PpoState, dict[str, Any]]:
        state, metrics, rollouts, scores = iterate(state, batch, log.phase)
        with log.phase("samples"):
            first = shown((rollouts, scores))
            for sample in samples_of(first[0], first[1], tokenizer):
                log.write_sample(int(state.step), sample)
        return state, metrics

    run.fit(
        abstract=abstract,
        start=start,
        exported="ema",
        total_steps=config.steps,
        update=update,
        read_batch=reader(config, data, mesh),
        evaluate=lambda state: text_losses(state.ema),
    )


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    check_lengths(config.data.limits, config.model)
    check_lengths(config.data.limits, config.reward_model)
    check_lora(config.lora, config.model, config.policy_parent)
    check_lora(config.lora, config.reward_model, config.reward_parent)
    check_rows("batch_size", config.batch_size, config.minibatches, mesh)
    limits = config.data.limits
    require(
        limits.prompt_tokens + limits.response_tokens <= limits.sequence_tokens,
        f"config.data.limits.sequence_tokens = {limits.sequence_tokens}, the width of packed rows, must hold "
        f"prompt_tokens + response_tokens = {limits.prompt_tokens} + {limits.response_tokens}",
    )
    if config.ptx_coef > 0:
        parts = microbatch_count(config.ptx_rows, config.compute.microbatch_rows, mesh)
        check_rows("ptx_rows", config.ptx_rows, parts, mesh)


def row_lengths(config: Config) -> RowLengths:
    """Pieces of the packed rows that networks score and train on."""
    return split_lengths(config.compute, config.data.limits.sequence_tokens), False


def memory(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes per device of the four networks, two optimizers and the sampler's caches."""
    compute = config.compute
    limits = config.data.limits
    policy = training_bytes(
        "policy", config, config.model, "tokens", config.optimizer, mesh
    )
    value = training_bytes(
        "value network",
        config,
        config.reward_model,
        "scalar",
        config.value_optimizer,
        mesh,
    )
    rows = -(-config.batch_size // sharding.num_row_shards(mesh))
    slots = min(compute.slots, rows)
    length = limits.prompt_tokens + limits.response_tokens
    return {
        **policy,
        **value,
        "averaged policy": policy["policy"],
        "reference policy": parameter_bytes(config.model, compute, "tokens", mesh),
        "reward model": parameter_bytes(config.reward_model, compute, "scalar", mesh),
        "cache of the prompts": cache_bytes(
            config.model, compute, rows, limits.prompt_tokens, mesh
        ),
        "cache of the sampler": cache_bytes(config.model, compute, slots, length, mesh),
    }


def program_of(config: Config, mesh: jax.sharding.Mesh, eos_id: int) -> ppo.PpoProgram:
    """What is compiled in."""
    return ppo.PpoProgram(
        policy=Transformer(config.model, config.compute, "tokens", mesh),
        scorer=Transformer(config.reward_model, config.compute, "scalar", mesh),
        policy_optimizer=make_optimizer(config.optimizer),
        value_optimizer=make_optimizer(config.value_optimizer),
        policy_schedule=config.optimizer,
        value_schedule=config.value_optimizer,
        mesh=mesh,
        eos_id=eos_id,
        total_steps=config.steps,
        response_tokens=config.data.limits.response_tokens,
        inner_epochs=config.inner_epochs,
        minibatches=config.minibatches,
        row_tokens=config.data.limits.sequence_tokens,
        rescores=config.old_logprobs == "scorer",
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages,
        clip_values=config.value_clip > 0,
    )


def settings_of(config: Config) -> ppo.PpoSettings:
    """What a sweep varies, as arrays."""
    return ppo.PpoSettings(
        seed=jnp.int32(config.seed),
        rewards=AdvantageSettings(
            kl_coef=jnp.float32(config.kl_coef),
            discount=jnp.float32(config.discount),
            lambda_=jnp.float32(config.lambda_),
            no_eos_penalty=jnp.float32(config.no_eos_penalty),
        ),
        temperature=jnp.float32(config.temperature),
        clip=jnp.float32(config.clip),
        value_clip=jnp.float32(config.value_clip),
        ptx_coef=jnp.float32(config.ptx_coef),
        learning_rate=jnp.float32(config.optimizer.learning_rate),
        value_learning_rate=jnp.float32(config.value_optimizer.learning_rate),
        ema_decay=jnp.float32(config.ema_decay),
    )


def abstract_ppo_state(program: ppo.PpoProgram, *adapt: AddAdapters) -> PpoState:
    """Shapes and layouts of the whole state; `adapt` adds adapters to policy and value
    network, if there are any."""
    policy = abstract_state(
        program.policy, program.policy_optimizer, program.mesh, *adapt[:1]
    )
    value = abstract_state(
        program.scorer, program.value_optimizer, program.mesh, *adapt[1:]
    )
    return PpoState(policy=policy, value=value, ema=policy.params)


def reader(
    config: Config, data: Mapping[str, PreparedData], mesh: jax.sharding.Mesh
) -> Callable[[int], Any]:
    """The batch of an iteration: prompts, and the text rows of its optimizer steps (None
    for PPO without them)."""
    prompts, limits = data["prompts"].sources["train"], config.data.limits
    read_text = None
    if config.ptx_coef > 0:
        rows = config.ptx_rows * config.minibatches * config.inner_epochs
        files = LmData(
            demonstrations=(),
            text=config.data.text,
            text_fraction=1.0,
            chat=False,
            limits=limits,
            folder=config.data.folder,
        )
        read_text = lm_reader(files, data, "train", batch_size=rows, seed=config.seed)

    def read(index: int) -> tuple[Prompts, Any]:
        rows = batch_row_ids(index, config.batch_size, len(prompts), config.seed)
        mine = process_slice(rows, jax.process_index(), jax.process_count())
        text = None if read_text is None else read_text(index)
        return sharding.shard_rows(
            (prompt_batch(prompts, mine, limits.prompt_tokens), text), mesh
        )

    return read


class Iteration:
    """The three compiled programs of one iteration, and what must hold between them."""

    def __init__(
        self,
        program: ppo.PpoProgram,
        abstract: PpoState,
        settings: ppo.PpoSettings,
        ref_params: Params,
        reward_params: Params,
        tolerance: float,
    ):
        state, policy = layouts(abstract), layouts(abstract.policy.params)
        fixed = (
            sharding.shardings(params, program.mesh)
            for params in (ref_params, reward_params)
        )
        rows, everywhere = (
            sharding.row_sharding(program.mesh),
            sharding.replicated(program.mesh),
        )
        self._rollout = jax.jit(
            partial(ppo.rollout, program),
            in_shardings=(policy, rows, everywhere, everywhere),
            out_shardings=rows,
        )
        self._score = jax.jit(
            partial(ppo.score, program),
            in_shardings=(state, *fixed, rows, everywhere),
            out_shardings=(rows, rows, everywhere),
        )
        self._update = jax.jit(
            partial(ppo.update, program),
            in_shardings=(state, rows, rows, everywhere),
            out_shardings=(state, everywhere),
            donate_argnums=0,
        )
        self._settings, self._ref_params, self._reward_params = (
            settings,
            ref_params,
            reward_params,
        )
        self._tolerance = tolerance

    def __call__(
        self, state: PpoState, batch: Any, phase: Any
    ) -> tuple[PpoState, dict[str, Any], Rollouts, Any]:
        """One iteration: (new state, metrics, rollouts, scores f32[B]).

        Raises InvariantError, and Asked if asked to stop before the update has begun.
        """
        prompts, text = batch
        first = int(state.step) == 0
        with phase("rollout"):
            rollouts = self._rollout(
                state.policy.params, prompts, state.step, self._settings
            )
            jax.block_until_ready(rollouts)
        check_stop_requested()
        with phase("score"):
            experience, scored, metrics = self._score(
                state, self._ref_params, self._reward_params, rollouts, self._settings
            )
            check_rollouts(metrics, first=first, tolerance=self._tolerance)
        check_stop_requested()
        with phase("ppo_update"):
            state, update_metrics = self._update(state, experience, text, self._settings)
            check_update(update_metrics, tolerance=self._tolerance)
        return state, {**metrics, **update_metrics}, rollouts, scored.scores


def samples_of(
    rollouts: Rollouts, scores: Array, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The rollouts as text, with their scores."""
    host: Any = jax.device_get(rollouts)
    return [
        {
            "prompt": tokenizer.decode(host.prompts.tokens[i][host.prompts.mask[i]]),
            "response": tokenizer.decode(host.responses[i][host.mask[i]]),
            "score": float(score),
            "tokens": int(host.mask[i].sum()),
        }
        for i, score in enumerate(jax.device_get(scores))
    ]
