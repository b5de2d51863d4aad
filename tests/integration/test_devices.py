"""The same results on one device and on every mesh of eight: two updates of each stage,
with rollouts and scores."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax import sharding
from instructax.models.config import ModelConfig
from instructax.models.transformer import Transformer
from instructax.stages import reward_model
from instructax.stages.ppo.compiled import CompiledIteration, abstract_ppo_state
from instructax.training import supervised
from instructax.training.optimizer import make_optimizer
from instructax.training.settings import OptimizerSettings
from instructax.training.state import abstract_state, layouts, no_adapters, start_from
from instructax.types import PpoState

pytest_plugins = ("tests.support.pipeline_fixture",)

ONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]  # data, fsdp, tensor
# With a large epsilon, Adam does not turn gradients that are only rounding errors into full
# steps.
OPTIMIZER = tiny_models.optimizer_config(epsilon=1e-3, clip_norm=1.0, weight_decay=0.1)
GPT = tiny_models.gpt_config()
LLAMA = tiny_models.llama_config()


def compiled(update: Any, program: Any, abstract: Any) -> Any:
    """`update` compiled with the shardings that the stages use."""
    shardings = layouts(abstract)
    rows = sharding.row_sharding(program.mesh)
    everywhere = sharding.replicated(program.mesh)
    return jax.jit(
        partial(update, program),
        in_shardings=(shardings, rows, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def two_updates(update: Any, program: Any, settings: Any, batches: Any) -> dict[str, Any]:
    """Metrics, parameters and optimizer state after two updates from random parameters."""
    state = start_from(
        tiny_models.random_params(program.model),
        program.optimizer,
        program.mesh,
        no_adapters,
    )
    step = compiled(
        update,
        program,
        abstract_state(program.model, program.optimizer, program.mesh, no_adapters),
    )
    metrics = []
    for batch in batches:
        state, figures = step(state, sharding.shard_rows(batch, program.mesh), settings)
        metrics.append(figures)
    return jax.device_get({"state": state, "metrics": metrics})


@cache
def supervised_run(
    shape: tuple[int, int, int], config: ModelConfig = GPT
) -> dict[str, Any]:
    program = supervised.SupervisedProgram(
        model=Transformer(config, tiny_models.compute(), "tokens"),
        optimizer=make_optimizer(OPTIMIZER),
        schedule=OPTIMIZER,
        mesh=stages.mesh_of(*shape),
        total_steps=10,
        num_microbatches=2,
        has_dropout=True,
    )
    settings = stages.supervised_settings(learning_rate=0.01, dropout=0.2)
    return two_updates(
        supervised.supervised_update,
        program,
        settings,
        [stages.packed_rows(16, 14, seed) for seed in (0, 1)],
    )


@cache
def reward_run(shape: tuple[int, int, int], config: ModelConfig = LLAMA) -> dict[str, Any]:
    program = reward_model.RewardModelProgram(
        model=Transformer(config, tiny_models.compute(), "scalar"),
        optimizer=make_optimizer(OPTIMIZER),
        schedule=OPTIMIZER,
        mesh=stages.mesh_of(*shape),
        total_steps=10,
        row_tokens=6 + 4 * 5,
    )
    settings = reward_model.RewardModelSettings(
        optimizer=OptimizerSettings(learning_rate=jnp.float32(0.01))
    )
    answers = (3, 1, 4, 2, 4, 2, 3, 4)
    return two_updates(
        reward_model.update_reward_model,
        program,
        settings,
        [stages.comparisons(answers, 5, seed) for seed in (0, 1)],
    )


@cache
def ppo_run(
    shape: tuple[int, int, int], policy: ModelConfig = GPT, scorer: ModelConfig = LLAMA
) -> dict[str, Any]:
    """Two iterations of PPO-ptx."""
    mesh = stages.mesh_of(*shape)
    networks = {
        "policy": Transformer(policy, tiny_models.compute(), "tokens"),
        "value_model": Transformer(scorer, tiny_models.compute(), "scalar"),
    }
    program = stages.ppo_program(mesh, optimizer=OPTIMIZER, **networks)
    state: PpoState = stages.ppo_state(program)
    reward_params = stages.copy_of(state.value.params)
    iterate = CompiledIteration(
        program,
        abstract_ppo_state(program),
        stages.ppo_settings(),
        stages.copy_of(state.policy.params),
        reward_params,
        1e-3,
    )
    seen = []
    for step in range(2):
        lengths = np.random.default_rng(step).integers(1, 7, 16)
        prompts = tiny_models.ragged_prompts(lengths, columns=6, seed=step)
        batch = sharding.shard_rows((prompts, stages.packed_rows(16, 14, step)), mesh)
        state, metrics, rollouts, scores = iterate(state, batch, stages.no_phase)
        metrics = {
            name: x
            for name, x in metrics.items()
            if name
            not in ("sampler_gap", "sampler_gap_max", "ratio_gap", "first_ratio_gap")
        }
        seen.append({"metrics": metrics, "rollouts": rollouts, "scores": scores})
    return jax.device_get({"state": state, "seen": seen})


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    stages.assert_trees_close(got, wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_supervised(shape):
    """With dropout and gradient accumulation."""
    assert_same(supervised_run(shape), supervised_run(ONE))


@pytest.mark.parametrize("shape", MESHES)
def test_reward(shape):
    assert_same(reward_run(shape), reward_run(ONE))


@pytest.mark.parametrize(
    "shape",
    [*(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[:2]), MESHES[2]],
)
def test_ppo(shape):
    got = ppo_run(shape)
    wanted = ppo_run(ONE)
    for ours, theirs in zip(got["seen"], wanted["seen"], strict=True):
        np.testing.assert_array_equal(
            ours["rollouts"].responses, theirs["rollouts"].responses
        )
        np.testing.assert_array_equal(ours["rollouts"].mask, theirs["rollouts"].mask)
    assert_same(got, wanted)


@pytest.mark.slow
def test_the_other_family_in_each_stage():
    """The sampler has an untied head, grouped queries and rotary positions; the scorer has
    biases and a position table.

    On either mesh the sampler's log-probabilities equal the scorer's; otherwise the
    iteration would stop with an error.
    """
    mesh = (2, 2, 2)
    assert_same(supervised_run(mesh, LLAMA), supervised_run(ONE, LLAMA))
    assert_same(reward_run(mesh, GPT), reward_run(ONE, GPT))
    got = ppo_run(mesh, LLAMA, GPT)
    wanted = ppo_run(ONE, LLAMA, GPT)
    for ours, theirs in zip(got["seen"], wanted["seen"], strict=True):
        np.testing.assert_array_equal(
            ours["rollouts"].responses, theirs["rollouts"].responses
        )
    assert_same(got, wanted)


def test_every_part_of_the_state_has_the_layout_in_the_table():
    mesh = stages.mesh_of(2, 2, 2)
    state = stages.ppo_state(stages.ppo_program(mesh, optimizer=OPTIMIZER))
    kernels = [
        (path, leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
        if sharding.leaf_path(path).endswith("mlp/up/kernel")
    ]
    # Parameters and two moments of both networks, and the averaged policy.
    assert len(kernels) == 7
    for _, leaf in kernels:
        layers, width, columns = leaf.shape
        assert {piece.data.shape for piece in leaf.addressable_shards} == {
            (layers, width // 2, columns // 2)
        }
