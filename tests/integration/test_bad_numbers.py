"""Extreme rollouts: each case trains with finite numbers, or is skipped and counted without
changing the state."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.stages.ppo import algorithm
from instructax.stages.ppo.experience import diagnostics, make_experience
from instructax.stages.ppo.invariants import InvariantError, check_update
from instructax.types import Experience, PpoState, Rollouts, Scored

pytest_plugins = ("tests.support.pipeline_fixture",)

ROWS = 8
COLUMNS = 7
PROGRAM = stages.ppo_program(stages.mesh_of())
SETTINGS = stages.ppo_settings(no_eos_penalty=0.5)
NO_TOKEN = np.zeros((ROWS, COLUMNS), bool)
ONE_TOKEN = np.arange(COLUMNS)[None, :] < np.ones((ROWS, 1), int)
ALL_TOKENS = np.ones((ROWS, COLUMNS), bool)


def scored_rollouts(**changes: Any) -> Scored:
    """Scored rollouts of several lengths; `changes` replaces arrays by name."""
    rng = np.random.default_rng(0)
    shape = (ROWS, COLUMNS)
    lengths = np.array([1, 7, 3, 5, 2, 7, 4, 6])
    arrays: dict[str, Any] = {
        "responses": rng.integers(tiny_models.VOCAB_SIZE, size=shape).astype(np.int32),
        "mask": np.arange(COLUMNS)[None, :] < lengths[:, None],
        "logprobs": -rng.uniform(1, 4, shape).astype(np.float32),
        "ended": lengths < COLUMNS,
        "values": rng.normal(size=shape).astype(np.float32),
        "scores": rng.normal(size=ROWS).astype(np.float32),
    }
    arrays["ref_logprobs"] = arrays["logprobs"] + 0.1 * rng.normal(size=shape).astype(
        np.float32
    )
    arrays |= {
        name: change(arrays) if callable(change) else change
        for name, change in changes.items()
    }
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    prompts = tiny_models.ragged_prompts([1, 5, 3, 6, 2, 4, 6, 1], columns=6)
    own = {name: arrays.pop(name) for name in ("responses", "mask", "logprobs", "ended")}
    return Scored(rollouts=Rollouts(prompts=prompts, **own), **arrays)


def experience_of(scored: Scored) -> tuple[Experience, Any]:
    """(experience, rewards f32[B, R]) as computed by PPO."""
    logprobs = scored.rollouts.logprobs
    return make_experience(
        scored,
        logprobs,
        SETTINGS,
        no_eos_rule="subtract",
        whiten_rewards=False,
        whiten_advantages=True,
    )


@cache
def start() -> PpoState:
    return stages.ppo_state(PROGRAM)


@cache
def compiled():
    return jax.jit(partial(algorithm.update, PROGRAM))


def run_update(experience: Experience) -> tuple[PpoState, dict[str, float]]:
    state, metrics = compiled()(start(), experience, None, SETTINGS)
    return state, {name: float(x) for name, x in metrics.items()}


def plant_value(name: str, value: float) -> dict[str, Any]:
    """Sets row 1, token 2 of an array to `value`."""

    def change(arrays: dict[str, Any]) -> Any:
        array = arrays[name].copy()
        array[(1, 2)[: array.ndim]] = value
        return array

    return {name: change}


TRAINS = {
    "no answer has a token": {"mask": NO_TOKEN, "ended": np.zeros(ROWS, bool)},
    "one answer has no token": {
        "mask": lambda a: a["mask"] & (np.arange(ROWS) != 3)[:, None]
    },
    "every first token ends": {"mask": ONE_TOKEN, "ended": np.ones(ROWS, bool)},
    "no answer ends": {"mask": ALL_TOKENS, "ended": np.zeros(ROWS, bool)},
    "all scores are equal": {
        "scores": np.ones(ROWS, np.float32),
        "ref_logprobs": lambda a: a["logprobs"],
    },
    "scores of 1e9": {"scores": lambda a: a["scores"] * np.float32(1e9)},
    "one score of 1e9": plant_value("scores", 1e9),
    "a reference that all but excludes a token": plant_value("ref_logprobs", -1e4),
    "values of 1e9": {"values": lambda a: a["values"] * np.float32(1e9)},
}
SKIPS = {
    "a score that is NaN": plant_value("scores", np.nan),
    "a score that is infinite": plant_value("scores", np.inf),
    "scores of 1e30": {"scores": lambda a: a["scores"] * np.float32(1e30)},
    "a value that is NaN": plant_value("values", np.nan),
    "a reference that excludes a token": plant_value("ref_logprobs", -np.inf),
    "a policy that excludes a token that it drew": plant_value("logprobs", np.nan),
}


@pytest.mark.parametrize("case", TRAINS)
def test_it_trains_with_finite_numbers(case):
    scored = scored_rollouts(**TRAINS[case])
    experience, rewards = experience_of(scored)
    figures = diagnostics(
        scored,
        scored.rollouts.logprobs,
        -scored.rollouts.logprobs,
        rewards,
        experience.returns,
    )
    state, metrics = run_update(experience)
    assert metrics["skipped"] == 0
    assert all(np.isfinite(float(x)) for x in (*figures.values(), *metrics.values()))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("case", SKIPS)
def test_it_is_skipped_counted_and_changes_nothing(case):
    """Both optimizer steps are skipped where whitening spreads the value over the batch. A
    network with only finite gradients is updated."""
    experience, _ = experience_of(scored_rollouts(**SKIPS[case]))
    state, metrics = run_update(experience)
    assert metrics["skipped"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    if not np.isfinite(np.asarray(experience.advantages)).any(
        where=np.asarray(experience.rollouts.mask)
    ):
        stages.assert_trees_equal(state.policy.params, start().policy.params)


def test_a_loss_that_is_infinite_is_named_too():
    _, metrics = run_update(experience_of(scored_rollouts(**SKIPS["scores of 1e30"]))[0])
    close = {"first_ratio_gap": 0.0, "first_clipped_fraction": 0.0}
    expected = (
        "value_loss is inf, which must be finite: lower "
        r"config\.value_optimizer\.learning_rate or look at the scale of the scores"
    )
    with pytest.raises(InvariantError, match=expected):
        check_update(metrics | close, tolerance=0.1)


def test_without_a_token_nothing_moves():
    state, _ = run_update(
        experience_of(scored_rollouts(**TRAINS["no answer has a token"]))[0]
    )
    stages.assert_trees_equal(state.policy.params, start().policy.params)
    stages.assert_trees_equal(state.value.params, start().value.params)


def test_advantages_without_spread_are_zero():
    """One token each, equal scores and values: whitened advantages are 0, not 0 / 0."""
    same = {
        "scores": np.full(ROWS, 3, np.float32),
        "values": np.zeros((ROWS, COLUMNS), np.float32),
    }
    same |= {
        "mask": ONE_TOKEN,
        "ended": np.ones(ROWS, bool),
        "ref_logprobs": lambda a: a["logprobs"],
    }
    experience, _ = experience_of(scored_rollouts(**same))
    np.testing.assert_array_equal(experience.advantages, np.zeros((ROWS, COLUMNS)))
    state, metrics = run_update(experience)
    assert metrics["policy_grad_norm"] == 0 and metrics["value_grad_norm"] > 0
    stages.assert_trees_equal(state.policy.params, start().policy.params)


def test_an_answer_without_a_token_gets_no_reward_and_gives_none_away():
    _, rewards = experience_of(scored_rollouts(**TRAINS["one answer has no token"]))
    _, others = experience_of(scored_rollouts())
    np.testing.assert_array_equal(rewards[3], np.zeros(COLUMNS))
    np.testing.assert_array_equal(
        np.delete(rewards, 3, axis=0), np.delete(others, 3, axis=0)
    )


def test_an_answer_that_never_ends_pays_for_it_once():
    ended, endless = (
        experience_of(scored_rollouts(mask=ALL_TOKENS, ended=np.full(ROWS, e)))[1]
        for e in (True, False)
    )
    paid = np.zeros((ROWS, COLUMNS), np.float32)
    paid[:, -1] = 0.5
    np.testing.assert_allclose(ended - endless, paid, atol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("old", [-1e4, -np.inf, -1e30])
def test_a_ratio_beyond_all_numbers_is_held_at_one_that_is(old, advantage):
    """The old log-probability of one token makes the ratio overflow."""
    experience, _ = experience_of(scored_rollouts())
    scaled = jnp.abs(experience.advantages) * advantage
    odd = dataclasses.replace(
        experience,
        old_logprobs=experience.old_logprobs.at[1, 2].set(old),
        advantages=scaled,
    )
    state, metrics = run_update(odd)
    assert np.isfinite(metrics["policy_loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert metrics["skipped"] == 0  # from e⁸⁰ on, the ratio has no gradient
