"""What the benchmark measures: a stage's own programs, on random parameters and tokens.

Operations are those of the model, 2 for each multiplication and addition: per token of a
forward pass 2 · (N + V · D) with N the parameters of the layers and V · D those of the head
(where its scores are needed), and 2 · L · H · d · T for causal attention over T tokens;
three times as many with the backward pass, or twice where adapters alone are trained. What
is computed twice is counted once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax import sharding
from instructax.config import require
from instructax.generation import prefill_padding
from instructax.models import ModelConfig, Transformer
from instructax.stages import pretrain, sft
from instructax.stages import reward_model as reward
from instructax.stages.ppo import algorithm
from instructax.stages.ppo import stage as ppo_train
from instructax.stages.ppo.compiled import CompiledIteration, abstract_ppo_state
from instructax.training.optimizer import make_optimizer
from instructax.training.settings import settings_from
from instructax.training.state import (
    abstract_state,
    adapter_initializer,
    compile_update,
    init_state,
    start_from,
)
from instructax.training.supervised import (
    SupervisedSettings,
    supervised_program,
    supervised_update,
)
from instructax.types import Comparisons, LmBatch, Params, PpoState, Prompts


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured: a call, and what it does."""

    run: Callable[
        [Any], Mapping[str, float]
    ]  # (phase) → figures of one repetition; phases are timed by it
    tokens: Callable[[Mapping[str, float]], float]  # of one repetition, from its figures
    operations: Callable[[Mapping[str, float]], float]
    state: Callable[[], Any]  # what is trained, as it is now, or sampled from


@contextlib.contextmanager
def untimed(name: str) -> Iterator[None]:
    """A phase that nobody times."""
    yield


def work_of(config: Any) -> tuple[Callable[..., Work], jax.sharding.Mesh]:
    """(what makes the work of a config's stage from (config, mesh, ending); the config's
    mesh). Raises ConfigError if the stage trains nothing, or the config's values do not fit
    each other or the mesh."""
    stages = {
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
    check(config, mesh)
    return make, mesh


def passes(config: Any) -> int:
    """Forward passes that the operations of a forward and a backward pass are: gradients by
    inputs and by what is trained are one each."""
    return 2 if hasattr(config, "lora") and config.lora.rank else 3


def forward_operations(
    config: ModelConfig, tokens: float, length: float, scored: float
) -> float:
    """Of `tokens` in texts of `length`, of which the head scores the vocabulary at
    `scored`."""
    block = (
        config.embed_dim
        * config.head_dim
        * (2 * config.num_heads + 2 * config.num_kv_heads)
    )
    block += config.embed_dim * config.mlp_dim * (3 if config.gated_mlp else 2)
    near = min(config.sliding_window, length)
    # A window of w lets the tokens of a text of T see w − w² / 2T of them on average, the
    # whole text T / 2.
    seen = (config.num_layers - len(config.window_layers)) * length / 2 + len(
        config.window_layers
    ) * (near - near**2 / (2 * max(length, 1)))
    attention = 4 * config.num_heads * config.head_dim * seen
    return (
        tokens * (2 * config.num_layers * block + attention)
        + 2 * scored * config.vocab_size * config.embed_dim
    )


def _tokens(config: ModelConfig, shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(0).integers(config.vocab_size, size=shape).astype(np.int32)


def _filled(shape: tuple[int, ...], value: Any) -> Any:
    """A numpy array; typed as Any since `types` names the jax arrays that it becomes on a
    device."""
    return np.full(shape, value)


def supervised_work(config: Any, mesh: jax.sharding.Mesh, _: float) -> Work:
    model = Transformer(config.model, config.compute, "tokens", mesh)
    program = supervised_program(config, model, mesh, 1000)
    settings = settings_from(SupervisedSettings, config)
    adapt = (
        adapter_initializer(config) if hasattr(config, "lora") else lambda params: params
    )
    abstract = abstract_state(model, program.optimizer, mesh, adapt)
    step = compile_update(partial(supervised_update, program), abstract, mesh)
    state = [init_state(model, program.optimizer, jax.random.key(0), mesh, adapt)]
    length = config.data.limits.sequence_tokens
    batch = sharding.shard_rows(_text(config, config.batch_size), mesh)

    def run(phase: Any) -> Mapping[str, float]:
        with phase("update"):
            state[0], metrics = jax.block_until_ready(step(state[0], batch, settings))
        return {name: float(metrics[name]) for name in ("tokens", "padding")}

    def operations(figures: Mapping[str, float]) -> float:
        return passes(config) * forward_operations(
            config.model, figures["tokens"], length, figures["tokens"]
        )

    return Work(run, lambda figures: figures["tokens"], operations, lambda: state[0])


def reward_work(config: Any, mesh: jax.sharding.Mesh, _: float) -> Work:
    model, optimizer = (
        Transformer(config.model, config.compute, "scalar", mesh),
        make_optimizer(config.optimizer),
    )
    limits, rows = config.data.limits, config.batch_size
    program = reward.RewardModelProgram(
        model=model,
        optimizer=optimizer,
        schedule=config.optimizer,
        mesh=mesh,
        total_steps=1000,
        row_tokens=limits.comparison_tokens,
    )
    settings = settings_from(reward.RewardModelSettings, config)
    adapt = adapter_initializer(config)
    abstract = abstract_state(model, optimizer, mesh, adapt)
    step = compile_update(partial(reward.update_reward_model, program), abstract, mesh)
    state = [init_state(model, optimizer, jax.random.key(0), mesh, adapt)]
    shape = (rows, limits.completions, limits.response_tokens)
    ranks: Any = np.broadcast_to(np.arange(limits.completions, dtype=np.int32), shape[:2])
    batch = Comparisons(
        prompts=_prompts(config),
        responses=_tokens(config.model, shape),
        mask=_filled(shape, True),
        ranks=ranks,
        valid=_filled(shape[:2], True),
        labeler=_filled((rows,), np.int32(0)),
    )
    batch = sharding.shard_rows(batch, mesh)

    def run(phase: Any) -> Mapping[str, float]:
        with phase("update"):
            state[0], metrics = jax.block_until_ready(step(state[0], batch, settings))
        return {name: float(metrics[name]) for name in ("tokens", "padding")}

    def operations(figures: Mapping[str, float]) -> float:
        # A response is what prompt and response have more than the prompt.
        prompt, whole = limits.prompt_tokens, limits.prompt_tokens + limits.response_tokens
        asked, answered = (
            forward_operations(config.model, length, length, 0)
            for length in (prompt, whole)
        )
        return passes(config) * rows * (asked + limits.completions * (answered - asked))

    return Work(run, lambda figures: figures["tokens"], operations, lambda: state[0])


def ppo_work(config: Any, mesh: jax.sharding.Mesh, ending: float, runs: int = 0) -> Work:
    """The three programs of an iteration; with `runs`, that many runs of other seeds side
    by side in one program."""
    program, settings = (
        ppo_train.make_program(config, mesh, _eos_id(config, ending)),
        settings_from(algorithm.PpoSettings, config),
    )
    policy = _policy(program, ending)
    scorer = init_state(
        program.value_model, program.value_optimizer, jax.random.key(1), mesh
    ).params
    adapt = adapter_initializer(config, 0), adapter_initializer(config, 1)
    started = start_from(policy, program.policy_optimizer, mesh, adapt[0])
    state = PpoState(
        policy=started,
        value=start_from(scorer, program.value_optimizer, mesh, adapt[1]),
        ema=jax.tree.map(jnp.copy, started.params),
    )
    rows = (
        config.ptx_rows * config.minibatches * config.inner_epochs
        if config.ptx_coef > 0
        else 0
    )
    batch = sharding.shard_rows(
        (_prompts(config), _text(config, rows) if rows else None), mesh
    )
    iterate: Any
    if runs:
        settings = jax.tree.map(lambda x: jnp.stack([x] * runs), settings)
        settings = dataclasses.replace(settings, seed=jnp.arange(runs, dtype=jnp.int32))
        states = [jax.tree.map(lambda x: jnp.stack([x] * runs), state)]
        many = jax.vmap(
            partial(algorithm.iteration, program), in_axes=(0, None, None, None, None, 0)
        )
        iterate = jax.jit(many, donate_argnums=0)
    else:
        states = [state]
        iterate = CompiledIteration(
            program,
            abstract_ppo_state(program, *adapt),
            settings,
            policy,
            scorer,
            config.tolerance,
        )

    def run(phase: Any) -> Mapping[str, float]:
        if runs:
            with phase("iteration"):
                states[0], metrics, _, _ = jax.block_until_ready(
                    iterate(states[0], policy, scorer, *batch, settings)
                )
        else:
            states[0], metrics, _, _ = iterate(states[0], batch, phase)
        names = (
            "tokens",
            "response_length",
            "padding",
            "prefill_padding",
            "update_padding",
        )
        return {name: float(jnp.mean(metrics[name])) for name in names}

    def operations(figures: Mapping[str, float]) -> float:
        length = figures["tokens"] / config.batch_size
        answers = config.batch_size * figures["response_length"]
        policy = forward_operations(config.model, figures["tokens"], length, answers)
        scalar = forward_operations(config.reward_model, figures["tokens"], length, 0)
        width = config.data.limits.sequence_tokens
        text = forward_operations(config.model, rows * width, width, rows * width)
        # The sampler, the reference, the value and the reward; both networks' updates; and
        # the text's.
        once = (
            2 * policy
            + 2 * scalar
            + passes(config) * (config.inner_epochs * (policy + scalar) + text)
        )
        return max(runs, 1) * once

    return Work(
        run, lambda figures: max(runs, 1) * figures["tokens"], operations, lambda: states[0]
    )


def sampling_work(config: Any, mesh: jax.sharding.Mesh, ending: float) -> Work:
    program, settings = (
        ppo_train.make_program(config, mesh, _eos_id(config, ending)),
        settings_from(algorithm.PpoSettings, config),
    )
    policy, prompts = _policy(program, ending), sharding.shard_rows(_prompts(config), mesh)
    rollout = jax.jit(partial(algorithm.rollout, program))
    padding = float(
        jax.jit(
            lambda p: prefill_padding(program.policy, p, sharding.num_row_shards(mesh))
        )(prompts)
    )
    step = [0]

    def run(phase: Any) -> Mapping[str, float]:
        step[0] += 1
        with phase("rollout"):
            rollouts = jax.block_until_ready(
                rollout(policy, prompts, jnp.int32(step[0]), settings)
            )
        return {"tokens": float(rollouts.mask.sum()), "prefill_padding": padding}

    def operations(figures: Mapping[str, float]) -> float:
        asked = config.batch_size * config.data.limits.prompt_tokens
        length = (asked + figures["tokens"]) / config.batch_size
        return forward_operations(
            config.model, asked + figures["tokens"], length, figures["tokens"]
        )

    return Work(run, lambda figures: figures["tokens"], operations, lambda: policy)


def _text(config: Any, rows: int) -> LmBatch:
    """Rows of one text each, without padding."""
    shape = (rows, config.data.limits.sequence_tokens)
    positions: Any = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return LmBatch(
        tokens=_tokens(config.model, shape),
        segments=_filled(shape, np.int32(1)),
        positions=positions,
        loss_mask=positions > 0,
    )


def _prompts(config: Any) -> Prompts:
    shape = (config.batch_size, config.data.limits.prompt_tokens)
    return Prompts(tokens=_tokens(config.model, shape), mask=_filled(shape, True))


def _eos_id(config: Any, ending: float) -> int:
    """The last token's, or one that no token has: then nothing ends before the limit."""
    return config.model.vocab_size - (ending > 0)


def _policy(program: algorithm.PpoProgram, ending: float) -> Params:
    """Random parameters. To end a response with about the probability `ending` at each
    token, the final norm's bias and the end token's embedding share a direction that no
    other token has."""
    params = init_state(
        program.policy, program.policy_optimizer, jax.random.key(0), program.mesh
    ).params
    if ending == 0:
        return params
    vocabulary, width = params["embedding"].shape
    direction = jnp.full((width,), width**-0.5)
    # The other logits are spread around 0, so that their exponentials are more than 1 on
    # average.
    spread = program.policy.config.init_std**2 * (width + 1)
    logit = jnp.log(ending / (1 - ending) * vocabulary) + spread / 2
    norm = {**params["final_norm"], "bias": direction}
    return {
        **params,
        "final_norm": norm,
        "embedding": params["embedding"].at[program.eos_id].set(logit * direction),
    }
