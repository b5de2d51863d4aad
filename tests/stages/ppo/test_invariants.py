"""The invariants that stop a run of PPO."""

import math

import jax.numpy as jnp
import pytest

from instructax.stages.ppo.invariants import InvariantError, check_rollouts, check_update

ROLLOUTS = {"sampler_gap": 0.01, "ref_gap": 0.01}
UPDATE = {
    "first_ratio_gap": 0.01,
    "first_clipped_fraction": 0.0,
    "policy_loss": jnp.float32(0.5),
    "value_loss": 0.5,
    "ptx_loss": 0.5,
}


def test_within_the_tolerance_nothing_is_raised():
    check_rollouts(ROLLOUTS, first=True, tolerance=0.01)
    check_rollouts({**ROLLOUTS, "ref_gap": 5.0}, first=False, tolerance=0.01)
    check_update(UPDATE, tolerance=0.01)
    check_update(
        {name: x for name, x in UPDATE.items() if name != "ptx_loss"}, tolerance=0.01
    )


@pytest.mark.parametrize("gap", [0.0101, math.nan, math.inf])
def test_a_gap_between_sampler_and_recomputed_logprobs_stops_the_run(gap):
    with pytest.raises(
        InvariantError,
        match=r"sampled and recomputed .* differ by .* \(tolerance 0\.01\): look for",
    ):
        check_rollouts({**ROLLOUTS, "sampler_gap": gap}, first=False, tolerance=0.01)


@pytest.mark.parametrize("gap", [0.0101, math.nan])
def test_a_first_policy_that_is_not_the_reference_stops_the_run(gap):
    with pytest.raises(
        InvariantError, match=r"before the first update .* look at policy_parent"
    ):
        check_rollouts({**ROLLOUTS, "ref_gap": gap}, first=True, tolerance=0.01)


@pytest.mark.parametrize(
    "change",
    [{"first_ratio_gap": 0.02}, {"first_ratio_gap": math.nan}]
    + [{"first_clipped_fraction": x} for x in (0.02, math.nan)],
)
def test_a_first_ratio_off_one_stops_the_run(change):
    with pytest.raises(
        InvariantError,
        match=(
            r"at the first optimizer step the ratio differs from 1 by .* dropout "
            r"and dtype"
        ),
    ):
        check_update({**UPDATE, **change}, tolerance=0.01)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("policy_loss", "optimizer"),
        ("value_loss", "value_optimizer"),
        ("ptx_loss", "optimizer"),
    ],
)
@pytest.mark.parametrize("loss", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(name, optimizer, loss):
    expected = (
        f"^{name} is (nan|-inf), which must be finite: lower "
        rf"config\.{optimizer}\.learning_rate"
    )
    with pytest.raises(InvariantError, match=expected):
        check_update({**UPDATE, name: jnp.float32(loss)}, tolerance=0.01)
