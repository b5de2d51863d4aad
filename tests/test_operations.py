"""Operations with gradients by hand against the gradients that JAX derives, and that only CPUs get a barrier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax.operations import materialized, normalized, product


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape) + 0.3


def plain_product(x, kernel, contracted):
    return jnp.tensordot(x, kernel, contracted)


def plain_normalized(x, centred, epsilon):
    y = x - x.mean(-1, keepdims=True) if centred else x
    return y / jnp.sqrt((y**2).mean(-1, keepdims=True) + epsilon)


def pulled_back(function, *args):
    """The output, and the gradients of its product with fixed random numbers."""
    y, pull = jax.vjp(function, *args)
    return y, *pull(normal(9, *y.shape))


@pytest.mark.parametrize(
    ("x", "kernel", "contracted"),
    [((2, 3, 4), (4, 5), 1), ((2, 3, 4), (4, 5, 2), 1), ((2, 3, 5, 2), (5, 2, 4), 2), ((2, 3, 4), (4,), 1)],
)
def test_products_and_their_gradients(x, kernel, contracted):
    args = normal(0, *x), normal(1, *kernel)
    ours = pulled_back(lambda a, b: product(a, b, contracted), *args)
    theirs = pulled_back(lambda a, b: plain_product(a, b, contracted), *args)
    assert [y.shape for y in ours] == [y.shape for y in theirs]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_norms_and_their_gradients(centred, epsilon):
    x = normal(0, 3, 4, 7)
    ours = pulled_back(lambda x: normalized(x, centred, epsilon), x)
    theirs = pulled_back(lambda x: plain_normalized(x, centred, epsilon), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_a_norm_of_two_numbers_by_hand():
    """1, 3: mean 2, deviations ∓1, variance 1: ∓1 / √(1 + 3) at ε = 3; without the mean 1 / √(5 + 4) and 3 / 3."""
    np.testing.assert_allclose(normalized(jnp.array([1.0, 3.0]), True, 3.0), [-0.5, 0.5])
    np.testing.assert_allclose(normalized(jnp.array([1.0, 3.0]), False, 4.0), [1 / 3, 1.0])


def test_gradients_in_sixteen_bits_stay_in_sixteen_bits():
    args = normal(0, 2, 4).astype(jnp.bfloat16), normal(1, 4, 5).astype(jnp.bfloat16)
    of_x, of_kernel = jax.grad(lambda a, b: product(a, b, 1).astype(jnp.float32).sum(), argnums=(0, 1))(*args)
    assert of_x.dtype == of_kernel.dtype == jnp.bfloat16


def test_several_runs_side_by_side():
    x, kernels = normal(0, 2, 4), normal(1, 3, 4, 5)

    def of_kernel(kernel):
        return jax.grad(lambda k: (normalized(product(x, k, 1), True, 1e-5) ** 3).sum())(kernel)

    together = jax.vmap(of_kernel)(kernels)
    np.testing.assert_allclose(together, jnp.stack([of_kernel(kernel) for kernel in kernels]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 1), ("tpu", 0), ("cuda", 0)])
def test_only_cpus_have_a_barrier(platform, barriers):
    lowered = jax.jit(lambda x: materialized(x) + 1).trace(jnp.ones(3)).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("optimization_barrier") == barriers
