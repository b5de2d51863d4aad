"""Masked means and whitening: worked examples, plain references, and masked entries that
must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tests.support import references

from instructax import masking

SEEDS = range(5)
GARBAGE = [1e30, -1e30, np.nan, np.inf, -np.inf]


def case(seed: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    mask = references.ragged_mask(rng, 4, 6)
    # A hole: these functions do not depend on where the real entries are.
    mask[1, 0] = False
    return jnp.asarray(rng.normal(1.5, 2.0, mask.shape), dtype), jnp.asarray(mask)


def test_masked_mean_by_hand():
    x = jnp.array([[-1.3, 0.7, 99.0], [0.2, 99.0, 99.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    # (-1.3 + 0.7 + 0.2) / 3; the mean of the two row means would be -0.05.
    np.testing.assert_allclose(masking.masked_mean(x, mask), -0.4 / 3, rtol=1e-6)


def test_masked_sum_by_hand():
    x = jnp.array([[-1.25, 0.75, 99.0], [0.25, jnp.nan, 99.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    assert masking.masked_sum(x, mask) == -0.25


def test_masked_variance_by_hand():
    x = jnp.array([[1.0, 99.0], [2.0, 4.0]])
    mask = jnp.array([[True, False], [True, True]])
    # Of 1, 2, 4: (1 + 4 + 16) / 3 − (7 / 3)² = 14 / 9.
    np.testing.assert_allclose(masking.masked_variance(x, mask), 14 / 9, rtol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_by_hand(shift_mean):
    x = jnp.array([[1.0, 99.0], [2.0, 4.0]])
    mask = jnp.array([[True, False], [True, True]])
    # Of 1, 2, 4: mean 7/3, population variance (1 + 4 + 16) / 3 - 49/9 = 14/9, deviations
    # -4/3, -1/3, 5/3.
    back = 0.0 if shift_mean else 7 / 3
    root = 14**0.5
    expected = [[-4 / root + back, 0.0], [-1 / root + back, 5 / root + back]]
    np.testing.assert_allclose(
        masking.whiten(x, mask, shift_mean=shift_mean), expected, rtol=2e-6
    )


def test_whiten_adds_epsilon_to_the_variance():
    # The variance of 0 and 0.0002 is 1e-8, as large as epsilon: each is 1e-4 / sqrt(2e-8)
    # from the mean.
    whitened = masking.whiten(
        jnp.array([0.0, 2e-4]), jnp.array([True, True]), shift_mean=True
    )
    np.testing.assert_allclose(whitened, [-(0.5**0.5), 0.5**0.5], rtol=1e-5)


def test_whiten_survives_a_large_mean():
    # Computed as mean square minus squared mean, this variance of 1 would be lost.
    x = jnp.array([4095.0, 4097.0, 4095.0, 4097.0])
    whitened = masking.whiten(x, jnp.ones(4, bool), shift_mean=True)
    np.testing.assert_allclose(whitened, [-1, 1, -1, 1], rtol=1e-5)


def test_token_count_by_hand():
    count = masking.token_count(jnp.array([[True, False, True], [False, False, True]]))
    assert count.shape == ()
    assert count.dtype == jnp.float32
    assert count == 3.0
    assert masking.token_count(jnp.zeros((2, 3), bool)) == 0.0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_equal_to_the_plain_reference(seed, dtype):
    x, mask = case(seed, dtype)
    result = masking.masked_mean(x, mask)
    assert result.dtype == jnp.float32
    assert result.shape == ()
    np.testing.assert_allclose(
        result, references.masked_mean(np.asarray(x), np.asarray(mask)), rtol=1e-5
    )
    for shift_mean in (True, False):
        whitened = masking.whiten(x, mask, shift_mean=shift_mean)
        assert whitened.dtype == jnp.float32
        expected = references.whiten(np.asarray(x), np.asarray(mask), shift_mean=shift_mean)
        np.testing.assert_allclose(whitened, expected, rtol=1e-5, atol=1e-5)


def test_counts_are_not_rounded_to_bfloat16():
    # bfloat16 cannot represent 257; a count in the dtype of x would be 256.
    x = jnp.zeros(257, jnp.bfloat16).at[0].set(1.0)
    np.testing.assert_allclose(
        masking.masked_mean(x, jnp.ones(257, bool)), 1 / 257, rtol=1e-6
    )


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_entries_do_not_matter(garbage):
    x, mask = case(0)
    dirty = jnp.where(mask, x, garbage)
    assert masking.masked_mean(dirty, mask) == masking.masked_mean(x, mask)
    slope = jax.grad(masking.masked_mean)(dirty, mask)
    np.testing.assert_allclose(slope, mask / mask.sum(), rtol=1e-6)
    for shift_mean in (True, False):
        whitened = masking.whiten(dirty, mask, shift_mean=shift_mean)
        np.testing.assert_array_equal(
            whitened, masking.whiten(x, mask, shift_mean=shift_mean)
        )
        np.testing.assert_array_equal(whitened[~mask], 0.0)


@pytest.mark.parametrize("garbage", [1.0, *GARBAGE])
def test_empty_mask_gives_zeros(garbage):
    x = jnp.full((2, 3), garbage)
    mask = jnp.zeros((2, 3), bool)
    value, slope = jax.value_and_grad(masking.masked_mean)(x, mask)
    assert value == 0.0
    np.testing.assert_array_equal(slope, 0.0)
    for shift_mean in (True, False):
        np.testing.assert_array_equal(masking.whiten(x, mask, shift_mean=shift_mean), 0.0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_of_equal_numbers(shift_mean):
    x = jnp.array([0.7, 0.7, 3.0])
    mask = jnp.array([True, True, False])
    expected = [0.0, 0.0, 0.0] if shift_mean else [0.7, 0.7, 0.0]
    np.testing.assert_allclose(
        masking.whiten(x, mask, shift_mean=shift_mean), expected, atol=1e-6
    )


def test_whiten_has_unit_variance_and_the_documented_mean():
    x, mask = case(1)
    for shift_mean, mean in ((True, 0.0), (False, masking.masked_mean(x, mask))):
        whitened = masking.whiten(x, mask, shift_mean=shift_mean)
        np.testing.assert_allclose(masking.masked_mean(whitened, mask), mean, atol=1e-6)
        np.testing.assert_allclose(
            masking.masked_mean((whitened - mean) ** 2, mask), 1.0, rtol=1e-5
        )


def test_whiten_ignores_shift_and_positive_scale():
    x, mask = case(2)
    np.testing.assert_allclose(
        masking.whiten(3.0 * x - 1.7, mask, shift_mean=True),
        masking.whiten(x, mask, shift_mean=True),
        atol=1e-5,
    )


def functions(x, mask):
    return (
        masking.masked_mean(x, mask),
        masking.token_count(mask),
        masking.whiten(x, mask, shift_mean=True),
        masking.whiten(x, mask, shift_mean=False),
    )


def assert_close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
        actual,
        expected,
    )


def test_jit_and_vmap_give_the_same_results():
    cases = [case(seed) for seed in SEEDS]
    plain = [functions(*arguments) for arguments in cases]
    assert_close([jax.jit(functions)(*arguments) for arguments in cases], plain)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    assert_close(
        jax.vmap(functions)(*stacked),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *plain),
    )


def test_eight_devices_average_over_the_whole_batch():
    rng = np.random.default_rng(0)
    mask = jnp.asarray(references.ragged_mask(rng, 8, 5))
    x = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))
    assert len(rows.device_set) == 8
    assert_close(
        jax.jit(functions)(jax.device_put(x, rows), jax.device_put(mask, rows)),
        functions(x, mask),
    )
