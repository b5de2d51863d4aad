"""Adam against a loop in plain Python, schedules at hand-computed points, weight decay and
clipping."""

import functools
import math
from fractions import Fraction as F

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.support import tiny_models

from instructax.models.init import init_params
from instructax.models.transformer import Transformer
from instructax.training.optimizer import (
    apply_gradients,
    learning_rate_at,
    make_optimizer,
    moving_average,
    skipped,
    weight_decay_mask,
)
from instructax.training.state import new_state
from instructax.types import TrainState

BETA1, BETA2, EPSILON = F(9, 10), F(19, 20), F(1, 10)  # an epsilon large enough to matter
GRADIENTS = [F(1, 2), F(-3, 4), F(1, 8)]
RATES = [F(1, 10), F(1, 5), F(1, 20)]


def adam(start: F, gradients: list[F], rates: list[F], decay: F = F(0)) -> list[float]:
    """The parameter x after each step.

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  x ← x − rate · (m̂ / (√v̂ + ε) + decay · x)
    """
    x = start
    m = F(0)
    v = F(0)
    path = []
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g**2
        root = F(math.sqrt(v / (1 - BETA2**t)))
        x -= rate * (m / (1 - BETA1**t) / (root + EPSILON) + decay * x)
        path.append(float(x))
    return path


def state_of(params, **changes) -> tuple[TrainState, object]:
    values = {
        "beta1": float(BETA1),
        "beta2": float(BETA2),
        "epsilon": float(EPSILON),
        **changes,
    }
    optimizer = make_optimizer(tiny_models.optimizer_config(**values))
    return new_state(params, optimizer), optimizer


def run(params, gradients_of, **changes) -> list:
    """Parameters after each of the three steps, with the gradients `gradients_of(g)`."""
    state, optimizer = state_of(params, **changes)
    path = []
    for g, rate in zip(GRADIENTS, RATES, strict=True):
        state = apply_gradients(optimizer, state, gradients_of(float(g)), jnp.float32(rate))
        path.append(state.params)
    assert state.step == 0  # the stage has its own step counter
    return path


def test_adam_equals_the_plain_loop():
    path = run({"scale": jnp.float32(2.0)}, lambda g: {"scale": jnp.float32(g)})
    np.testing.assert_allclose(
        [p["scale"] for p in path], adam(F(2), GRADIENTS, RATES), rtol=1e-6
    )


def test_the_first_step_by_hand():
    """Bias correction makes m̂ = g and √v̂ = |g|: the step is rate · g / (|g| + ε) = 1/10 ·
    (1/2) / (3/5) = 1/12."""
    assert adam(F(2), GRADIENTS[:1], RATES[:1]) == [pytest.approx(2 - 1 / 12)]


def test_only_matrices_decay():
    """kernel ← kernel − rate · (direction + decay · kernel). The bias next to it does not
    decay."""
    both = {"kernel": jnp.float32(2.0), "bias": jnp.float32(2.0)}
    path = run(
        both,
        lambda g: {"kernel": jnp.float32(g), "bias": jnp.float32(g)},
        weight_decay=0.25,
    )
    kernel = adam(F(2), GRADIENTS, RATES, decay=F(1, 4))
    bias = adam(F(2), GRADIENTS, RATES)
    np.testing.assert_allclose([p["kernel"] for p in path], kernel, rtol=1e-6)
    np.testing.assert_allclose([p["bias"] for p in path], bias, rtol=1e-6)


@pytest.mark.parametrize(
    "config", [tiny_models.gpt_config(tied_embeddings=False), tiny_models.llama_config()]
)
def test_what_decays_in_a_network(config):
    """Tables and matrices decay. Biases and norms do not, even where the layer stack makes
    them [L, D]."""
    model = Transformer(config, tiny_models.compute(), "scalar")
    marked = weight_decay_mask(
        jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    )
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): m
        for path, m in jax.tree.leaves_with_path(marked)
    }
    assert {name for name, mark in names.items() if not mark} == {
        n for n in names if n.endswith(("bias", "scale"))
    }
    assert {"embedding", "scalar_head/kernel", "blocks/mlp/down/kernel"} <= {
        name for name, mark in names.items() if mark
    }
    assert ("positions" in names) == (config.positions == "learned") and names.get(
        "positions", True
    )


@pytest.mark.parametrize(
    ("clip_norm", "factor"), [(1.0, F(1, 5)), (10.0, F(1)), (0.0, F(1))]
)
def test_clipping_by_the_global_norm(clip_norm, factor):
    """Gradients 3 and 4 have norm 5. Above the limit both are scaled by limit / 5; a limit
    of 0 means no clipping."""
    state, optimizer = state_of(
        {"a": jnp.float32(0), "b": jnp.float32(0)}, clip_norm=clip_norm
    )
    state = apply_gradients(
        optimizer, state, {"a": jnp.float32(3), "b": jnp.float32(4)}, jnp.float32(1)
    )
    (moments,) = [part.mu for part in state.opt_state if hasattr(part, "mu")]
    expected = [float((1 - BETA1) * g * factor) for g in (3, 4)]
    np.testing.assert_allclose([moments["a"], moments["b"]], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, 3e38]
)  # the last one's square is not finite
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_gradients_that_are_not_finite_change_nothing(value, clip_norm):
    state, optimizer = state_of(
        {"a": jnp.float32(2), "b": jnp.float32(5)}, clip_norm=clip_norm
    )
    good = {"a": jnp.float32(3), "b": jnp.float32(4)}
    state = apply_gradients(optimizer, state, good, jnp.float32(1))
    bad = {**good, "b": jnp.float32(value)}
    after = apply_gradients(optimizer, state, bad, jnp.float32(1))
    assert jax.tree.map(float, after) == jax.tree.map(float, state)
    again = apply_gradients(optimizer, after, good, jnp.float32(1))
    assert np.isfinite(jax.tree.leaves(again)).all() and float(again.params["b"]) < float(
        after.params["b"]
    )
    norms = [optax.tree.norm(gradients) for gradients in (good, bad)]
    assert [float(skipped(norm)) for norm in norms] == [0.0, 1.0] and float(
        skipped(*norms)
    ) == 1.0


PEAK = F(1, 100)
# PPO (paper, C.4).
CONSTANT = {"schedule": "constant", "warmup_steps": 10, "warmup_from": 0.1}
# SFT and RM (paper, C.1, C.2).
COSINE = {"schedule": "cosine", "warmup_steps": 0, "final_fraction": 0.1}
LINEAR = {
    "schedule": "linear",
    "warmup_steps": 4,
    "warmup_from": 0.0,
    "final_fraction": 0.2,
}
POINTS = [
    (CONSTANT, 0, F(1, 10)),
    (CONSTANT, 5, F(11, 20)),  # 1/10 + 9/10 · 5/10
    (CONSTANT, 9, F(91, 100)),
    (CONSTANT, 10, F(1)),
    (CONSTANT, 499, F(1)),
    (COSINE, 0, F(1)),
    (COSINE, 25, 0.1 + 0.9 * (1 + math.sqrt(1 / 2)) / 2),
    (COSINE, 50, F(11, 20)),
    (COSINE, 100, F(1, 10)),
    (COSINE, 120, F(1, 10)),  # constant after the end
    (LINEAR, 0, F(0)),
    (LINEAR, 1, F(1, 4)),
    (LINEAR, 4, F(1)),
    (LINEAR, 28, F(4, 5)),  # A quarter of the way from 4 to 100: 1/5 + 4/5 · 3/4.
    (LINEAR, 100, F(1, 5)),
    ({**COSINE, "warmup_steps": 4, "warmup_from": 0.5}, 2, F(3, 4)),
]


@pytest.mark.parametrize(("schedule", "step", "fraction"), POINTS)
def test_schedules_at_points_by_hand(schedule, step, fraction):
    config = tiny_models.optimizer_config(**schedule)
    rate = learning_rate_at(
        jnp.int32(step), peak=float(PEAK), config=config, total_steps=100
    )
    assert rate.dtype == jnp.float32 and rate.shape == ()
    assert float(rate) == pytest.approx(float(PEAK) * float(fraction), rel=1e-5, abs=1e-9)


def test_a_warm_up_longer_than_the_run_is_harmless():
    config = tiny_models.optimizer_config(**LINEAR)
    rates = [
        float(learning_rate_at(jnp.int32(s), peak=1.0, config=config, total_steps=2))
        for s in range(3)
    ]
    assert rates == [0.0, 0.25, 0.5]


def test_another_peak_does_not_recompile():
    config = tiny_models.optimizer_config(**CONSTANT)
    optimizer = make_optimizer(config)

    @jax.jit
    def step(state, peak):
        rate = learning_rate_at(state.step, peak=peak, config=config, total_steps=100)
        return apply_gradients(optimizer, state, {"kernel": jnp.ones(())}, rate)

    state = new_state({"kernel": jnp.float32(1.0)}, optimizer)
    moves = [
        1.0 - float(step(state, jnp.float32(peak)).params["kernel"]) for peak in (0.5, 0.25)
    ]
    # A tenth of the peak, in Adam's first direction, 1.
    assert moves == pytest.approx([0.05, 0.025], rel=1e-4)
    assert step._cache_size() == 1


def test_vmap_over_peaks():
    config = tiny_models.optimizer_config(**COSINE)
    rate = functools.partial(
        learning_rate_at, jnp.int32(50), config=config, total_steps=100
    )
    np.testing.assert_allclose(
        jax.vmap(lambda peak: rate(peak=peak))(jnp.array([1.0, 2.0])),
        [0.55, 1.1],
        rtol=1e-6,
    )


def test_moving_average_by_hand():
    """3/4 · 8 + 1/4 · (−4) = 5, and 3/4 · 5 + 1/4 · (−4) = 11/4."""
    average = {"a": jnp.array([8.0])}
    params = {"a": jnp.array([-4.0])}
    once = moving_average(average, params, 0.75)
    assert float(once["a"][0]) == 5.0
    assert float(moving_average(once, params, jnp.float32(0.75))["a"][0]) == 2.75
