"""What checks cost: the pair of programs really differs in the check, and every part is measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructax import overhead, reward
from instructax.optimizer import apply_gradients
from instructax.types import TrainState
from test_benchmark import config_of

pytest_plugins = ("chain",)
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("arg", ["sft,S", "reward2,S", pytest.param("ppo,S", marks=pytest.mark.slow)])
def test_every_part_is_measured(arg):
    found = overhead.measure(config_of(arg), pairs=2)
    parts = {name: value for name, value in found.items() if name not in ("step", "share")}
    assert list(parts) == ["update check", "beats and ledger", "finite check at saves", "hashing at saves"]
    assert all(np.isfinite(value) and value >= 0 for value in parts.values())
    assert all(parts[name] > 0 for name in parts if name != "update check")
    assert found["share"] == pytest.approx(sum(parts.values()) / found["step"])
    assert [line.split("  ")[0] for line in overhead.table(found)] == ["step", *parts, "all checks"]


def test_without_the_check_any_gradient_moves_the_state():
    params = {"x": jnp.ones(2)}
    optimizer = optax.identity()
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    gradients = {"x": jnp.array([jnp.nan, 1.0])}
    with overhead.unchecked(reward):
        moved = jax.jit(lambda: reward.apply_gradients(optimizer, state, gradients, 0.5))()
        np.testing.assert_array_equal(moved.params["x"], [np.nan, 0.5])
    assert reward.apply_gradients is apply_gradients
    np.testing.assert_array_equal(apply_gradients(optimizer, state, gradients, 0.5).params["x"], [1.0, 1.0])


def test_a_stage_that_trains_nothing_is_one_line():
    with pytest.raises(ValueError, match=r"config\.stage = 'evaluate' trains nothing"):
        overhead.measure(type("Config", (), {"stage": "evaluate"}), pairs=1)
    with pytest.raises(ValueError, match=r"^config\.batch_size = 8 rows must be a positive multiple of 3"):
        overhead.measure(dataclasses.replace(config_of("sft,S"), accumulate=3), pairs=1)
