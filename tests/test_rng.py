"""Random keys are a function of (seed, purpose, step, sample) and nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax import rng


def data(key: jax.Array) -> tuple[int, ...]:
    return tuple(int(x) for x in jax.random.key_data(key))


def test_the_rule_is_two_folds_in_a_fixed_order():
    """Runs resumed after an upgrade rely on these numbers; reordering the list of purposes
    would change them."""
    for number, purpose in enumerate(
        ("init", "dropout", "rollout", "minibatches", "evaluate")
    ):
        expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), number), 5)
        assert data(rng.step_key(7, purpose, 5)) == data(expected)


def test_keys_differ_by_seed_purpose_and_step():
    keys = {
        data(rng.step_key(*key))
        for key in itertools.product((0, 1, 2), rng.PURPOSES, (0, 1, 2))
    }
    assert len(keys) == 3 * len(rng.PURPOSES) * 3


def test_a_traced_step_gives_the_same_key():
    compiled = jax.jit(lambda step: rng.step_key(3, "rollout", step))
    assert data(compiled(jnp.int32(9))) == data(rng.step_key(3, "rollout", 9))
    assert compiled._cache_size() == 1
    assert data(compiled(jnp.int32(10))) == data(rng.step_key(3, "rollout", 10))
    assert compiled._cache_size() == 1


def test_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError):
        rng.step_key(0, "shuffle", 0)


def test_a_samples_key_does_not_depend_on_the_other_samples():
    key = rng.step_key(0, "rollout", 2)
    together = jax.random.key_data(rng.sample_keys(key, jnp.arange(6)))
    moved = jax.random.key_data(rng.sample_keys(key, jnp.array([4, 1])))
    np.testing.assert_array_equal(moved, together[jnp.array([4, 1])])
    assert len({tuple(row) for row in np.asarray(together).tolist()}) == 6
    assert tuple(np.asarray(together)[3].tolist()) == data(jax.random.fold_in(key, 3))
