"""The workloads that the benchmark times: a stage's own programs on random parameters and
tokens.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from instructax import sharding
from instructax.config import require
from instructax.generation.prefill import prefill_padding
from instructax.models.transformer import Transformer
from instructax.stages import pretrain, sft
from instructax.stages import reward_model as reward
from instructax.stages.benchmark.operations import (
    forward_operations,
    iteration_operations,
    update_cost,
)
from instructax.stages.benchmark.random_inputs import (
    eos_id_for,
    random_comparisons,
    random_policy,
    random_prompts,
    random_text,
)
from instructax.stages.ppo import algorithm
from instructax.stages.ppo import stage as ppo_train
from instructax.stages.ppo.compiled import CompiledIteration, abstract_ppo_state
from instructax.training.optimizer import make_optimizer
from instructax.training.settings import settings_from
from instructax.training.state import (
    AddAdapters,
    abstract_state,
    adapter_initializer,
    compile_update,
    init_state,
    no_adapters,
    start_from,
)
from instructax.training.supervised import (
    SupervisedSettings,
    supervised_program,
    supervised_update,
)
from instructax.types import Params, PpoState, Prompts

# Length of the learning-rate schedule; no speed depends on it.
TOTAL_STEPS = 1000

# Metrics of a PPO iteration that the record needs.
PPO_METRICS = ("tokens", "response_length", "padding", "prefill_padding", "update_padding")


@dataclasses.dataclass(frozen=True)
class Work:
    """A workload: a call that runs one repetition, and how much it computes."""

    # (phase) → metrics of one repetition; `phase(name)` is a context manager that times it
    run: Callable[[Any], Mapping[str, float]]
    # metrics of a repetition → its tokens
    tokens: Callable[[Mapping[str, float]], float]
    # metrics of a repetition → its operations
    operations: Callable[[Mapping[str, float]], float]
    # () → the current state that is trained, or the parameters that are sampled from
    state: Callable[[], Any]


@contextlib.contextmanager
def untimed(name: str) -> Iterator[None]:
    """A phase that is not timed."""
    yield


def build_work(config: Any) -> tuple[Callable[..., Work], jax.sharding.Mesh]:
    """Looks up the workload of a config's stage.

    Returns:
      (a function from (config, mesh, ending) to the workload, the config's mesh). Raises
      ConfigError if the stage trains nothing, or if the values of the config do not fit
      each other or the mesh.
    """
    # Stage → (check of the config, maker of the workload).
    stages = {
        # Both have the same update and differ in their data only.
        "pretrain": (pretrain.validate, supervised_work),
        "sft": (sft.validate, supervised_work),
        "reward_model": (reward.validate, reward_work),
        "ppo": (ppo_train.validate, ppo_work),
    }
    require(
        config.stage in stages,
        f"config.stage = {config.stage!r} trains nothing: give one of {', '.join(stages)}",
    )
    check, make = stages[config.stage]
    mesh = sharding.make_mesh(config.mesh)
    # The benchmark skips `open_run`, so it has to validate the config itself.
    check(config, mesh)
    return make, mesh


def supervised_work(config: Any, mesh: jax.sharding.Mesh, _: float) -> Work:
    """Updates of `pretrain` or `sft`, on rows without padding."""
    model = Transformer(config.model, config.compute, "tokens", mesh)
    program = supervised_program(config, model, mesh, TOTAL_STEPS)
    # The same program, settings and compiled update as `train_supervised`.
    settings = settings_from(SupervisedSettings, config)
    add_adapters = no_adapters
    if hasattr(config, "lora"):
        add_adapters = adapter_initializer(config)
    step = _compile_step(
        supervised_update, program, model, program.optimizer, mesh, add_adapters
    )
    state = init_state(model, program.optimizer, jax.random.key(0), mesh, add_adapters)
    # Each row is one document, so attention covers the whole row.
    length = config.data.limits.sequence_tokens
    batch = sharding.shard_rows(random_text(config, config.batch_size), mesh)

    def operations(metrics: Mapping[str, float]) -> float:
        # Every token has a loss, so the head computes logits everywhere.
        forward = forward_operations(
            config.model, metrics["tokens"], length, metrics["tokens"]
        )
        return update_cost(config) * forward

    return _update_work(step, state, batch, settings, operations)


def reward_work(config: Any, mesh: jax.sharding.Mesh, _: float) -> Work:
    """Updates of the reward model, on prompts and responses of full length."""
    model = Transformer(config.model, config.compute, "scalar", mesh)
    optimizer = make_optimizer(config.optimizer)
    limits = config.data.limits
    program = reward.RewardModelProgram(
        model=model,
        optimizer=optimizer,
        schedule=config.optimizer,
        mesh=mesh,
        total_steps=TOTAL_STEPS,
        row_tokens=limits.comparison_tokens,
    )
    # The peak learning rate is an argument of the compiled update.
    settings = settings_from(reward.RewardModelSettings, config)
    add_adapters = adapter_initializer(config)
    step = _compile_step(
        reward.update_reward_model, program, model, optimizer, mesh, add_adapters
    )
    state = init_state(model, optimizer, jax.random.key(0), mesh, add_adapters)
    batch = sharding.shard_rows(random_comparisons(config), mesh)

    def operations(metrics: Mapping[str, float]) -> float:
        # The prompt runs once. Each response costs what it adds to the prompt alone: its
        # tokens attend to the prompt.
        prompt_tokens = limits.prompt_tokens
        sequence_tokens = prompt_tokens + limits.response_tokens
        prompt = forward_operations(config.model, prompt_tokens, prompt_tokens, 0)
        sequence = forward_operations(config.model, sequence_tokens, sequence_tokens, 0)
        comparison = prompt + limits.completions * (sequence - prompt)
        return update_cost(config) * config.batch_size * comparison

    return _update_work(step, state, batch, settings, operations)


def _compile_step(
    update: Callable[..., Any],
    program: Any,
    model: Transformer,
    optimizer: Any,
    mesh: jax.sharding.Mesh,
    add_adapters: AddAdapters,
) -> Callable[[Any, Any, Any], Any]:
    """The compiled update, as the stage runs it: `step(state, batch, settings)`."""
    abstract = abstract_state(model, optimizer, mesh, add_adapters)
    return compile_update(update, program, abstract, mesh)


def _update_work(
    step: Callable[[Any, Any, Any], Any],
    state: Any,
    batch: Any,
    settings: Any,
    operations: Callable[[Mapping[str, float]], float],
) -> Work:
    """The workload that repeats one update on the same batch."""
    # A list, because the state is donated: only its newest version may be used.
    states = [state]

    def run(phase: Any) -> Mapping[str, float]:
        with phase("update"):
            states[0], metrics = jax.block_until_ready(step(states[0], batch, settings))
        return {name: float(metrics[name]) for name in ("tokens", "padding")}

    return Work(
        run=run,
        tokens=lambda metrics: metrics["tokens"],
        operations=operations,
        state=lambda: states[0],
    )


def ppo_work(config: Any, mesh: jax.sharding.Mesh, ending: float, runs: int = 0) -> Work:
    """Iterations of PPO.

    Args:
      config: config of the stage `ppo`.
      mesh: its mesh.
      ending: probability that a response ends at a token.
      runs: 0 runs the three programs of a normal run; n > 0 runs n runs with different
        seeds in one program.
    """
    program = ppo_train.make_program(config, mesh, eos_id_for(config, ending))
    settings = settings_from(algorithm.PpoSettings, config)
    policy = random_policy(program, ending)
    # The reward model, and the first value model.
    reward_params = init_state(
        program.value_model, program.value_optimizer, jax.random.key(1), mesh
    ).params
    state = _ppo_state(config, program, policy, reward_params)
    text_rows = 0
    if config.ptx_coef > 0:
        text_rows = config.ptx_rows * config.minibatches * config.inner_epochs
    text = random_text(config, text_rows) if text_rows else None
    batch = sharding.shard_rows((random_prompts(config), text), mesh)

    if runs:
        # All leaves of state and settings get a leading axis of runs.
        state = jax.tree.map(lambda x: jnp.stack([x] * runs), state)
        iterate = _iterate_runs(program, settings, policy, reward_params, runs)
    else:
        abstract = abstract_ppo_state(
            program, adapter_initializer(config, 0), adapter_initializer(config, 1)
        )
        iterate = CompiledIteration(
            program, abstract, settings, policy, reward_params, config.tolerance
        )
    states = [state]

    def run(phase: Any) -> Mapping[str, float]:
        states[0], metrics, _, _ = iterate(states[0], batch, phase)
        # The mean over runs, if there are several.
        return {name: float(jnp.mean(metrics[name])) for name in PPO_METRICS}

    return Work(
        run=run,
        tokens=lambda metrics: max(runs, 1) * metrics["tokens"],
        operations=lambda metrics: (
            max(runs, 1) * iteration_operations(config, metrics, text_rows)
        ),
        state=lambda: states[0],
    )


def _ppo_state(
    config: Any, program: algorithm.PpoProgram, policy: Params, reward_params: Params
) -> PpoState:
    """The state of step 0, as the stage creates it from its two parents."""
    started = start_from(
        policy, program.policy_optimizer, program.mesh, adapter_initializer(config, 0)
    )
    value = start_from(
        reward_params, program.value_optimizer, program.mesh, adapter_initializer(config, 1)
    )
    # A copy, because the state is donated and must not hold a buffer twice.
    return PpoState(policy=started, value=value, ema=jax.tree.map(jnp.copy, started.params))


def _iterate_runs(
    program: algorithm.PpoProgram,
    settings: algorithm.PpoSettings,
    policy: Params,
    reward_params: Params,
    runs: int,
) -> Callable[..., Any]:
    """An iteration of `runs` runs in one program, called like `CompiledIteration`."""
    settings = jax.tree.map(lambda x: jnp.stack([x] * runs), settings)
    # Different seeds, so the runs sample responses of different lengths.
    settings = dataclasses.replace(settings, seed=jnp.arange(runs, dtype=jnp.int32))
    # State and settings differ between runs; parents, prompts and text are shared.
    vmapped = jax.vmap(
        partial(algorithm.iteration, program), in_axes=(0, None, None, None, None, 0)
    )
    # The states are donated, as in a normal run.
    compiled: Any = jax.jit(vmapped, donate_argnums=0)

    def iterate(state: Any, batch: Any, phase: Any) -> Any:
        with phase("iteration"):
            return jax.block_until_ready(
                compiled(state, policy, reward_params, *batch, settings)
            )

    return iterate


def sampling_work(config: Any, mesh: jax.sharding.Mesh, ending: float) -> Work:
    """The rollout of PPO alone, with new random keys in each repetition."""
    program = ppo_train.make_program(config, mesh, eos_id_for(config, ending))
    settings = settings_from(algorithm.PpoSettings, config)
    policy = random_policy(program, ending)
    prompts = sharding.shard_rows(random_prompts(config), mesh)
    rollout = jax.jit(partial(algorithm.rollout, program))

    # The same in every repetition: it depends on the prompts only.
    def padding_of(prompts: Prompts) -> jax.Array:
        return prefill_padding(program.policy, prompts, sharding.num_row_shards(mesh))

    padding = float(jax.jit(padding_of)(prompts))
    step = [0]  # the number of the repetition, which selects its random keys

    def run(phase: Any) -> Mapping[str, float]:
        # Other keys, other responses: with `ending` their lengths vary between repetitions.
        step[0] += 1
        with phase("rollout"):
            rollouts = jax.block_until_ready(
                rollout(policy, prompts, jnp.int32(step[0]), settings)
            )
        return {"tokens": float(rollouts.mask.sum()), "prefill_padding": padding}

    def operations(metrics: Mapping[str, float]) -> float:
        # Prompts run through the network as well, but only responses need logits.
        prompt_tokens = config.batch_size * config.data.limits.prompt_tokens
        all_tokens = prompt_tokens + metrics["tokens"]
        length = all_tokens / config.batch_size
        return forward_operations(config.model, all_tokens, length, metrics["tokens"])

    return Work(
        run=run,
        tokens=lambda metrics: metrics["tokens"],
        operations=operations,
        state=lambda: policy,
    )
