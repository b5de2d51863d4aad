"""Operations with hand-written gradients against JAX's gradients; only CPU programs get a
barrier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax.models.ops import einsum, gelu, materialize, normalize, softmax_weighted_sum


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape) + 0.3


def reference_normalize(x, centred, epsilon):
    y = x - x.mean(-1, keepdims=True) if centred else x
    return y / jnp.sqrt((y**2).mean(-1, keepdims=True) + epsilon)


def output_and_gradients(function, *args):
    """The output, and the gradients of its inner product with fixed random numbers."""
    y, pull = jax.vjp(function, *args)
    return y, *pull(normal(9, *y.shape))


SHAPES = {"a": 2, "b": 3, "d": 4, "f": 5, "g": 7, "h": 2, "q": 6, "s": 8}
PRODUCTS = ["abd,df->abf", "abd,dfg->abfg", "abfg,fgh->abh", "abd,d->ab", "ad,vd->av"]
PRODUCTS += ["bhqd,bhsd->bhqs", "bhqs,bhsd->bhqd"]  # the contractions of attention


def arrays(axes):
    of_x, of_y, _ = axes.replace("->", ",").split(",")
    sizes = [[SHAPES.get(axis, 9) for axis in names] for names in (of_x, of_y)]
    return normal(0, *sizes[0]), normal(1, *sizes[1])


@pytest.mark.parametrize("axes", PRODUCTS)
def test_einsum_and_its_gradients(axes):
    ours = jax.jit(
        lambda *args: output_and_gradients(
            lambda x, y: einsum(axes, x, y, "float32"), *args
        )
    )(*arrays(axes))
    theirs = output_and_gradients(lambda x, y: jnp.einsum(axes, x, y), *arrays(axes))
    assert [y.shape for y in ours] == [y.shape for y in theirs]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs
    )


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("axes", PRODUCTS)
def test_only_operands_are_rounded(axes):
    """Products of bfloat16 numbers are exact in float32, and here their sums are too, up to
    the order."""
    x, y = arrays(axes)
    ours = jax.jit(
        lambda *args: output_and_gradients(
            lambda x, y: einsum(axes, x, y, "bfloat16"), *args
        )
    )(x, y)
    result, pull = jax.vjp(lambda x, y: jnp.einsum(axes, x, y), rounded(x), rounded(y))
    theirs = result, *pull(rounded(normal(9, *result.shape)))
    assert {found.dtype for found in ours} == {jnp.dtype("float32")}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs
    )
    exact = jnp.einsum(axes, x, y)
    assert 1e-4 < float(jnp.max(jnp.abs(ours[0] - exact)) / jnp.max(jnp.abs(exact))) < 1e-2


def test_gelu_and_its_gradient():
    x = 3 * normal(0, 3, 5)
    ours, theirs = (
        output_and_gradients(gelu, x),
        output_and_gradients(lambda x: jax.nn.gelu(x, approximate=True), x),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs
    )
    kept = jax.tree.leaves(jax.vjp(gelu, x)[1])
    assert sum(leaf.size for leaf in kept) == x.size


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_norms_and_their_gradients(centred, epsilon):
    x = normal(0, 3, 4, 7)
    ours = output_and_gradients(lambda x: normalize(x, centred, epsilon), x)
    theirs = output_and_gradients(lambda x: reference_normalize(x, centred, epsilon), x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs
    )


@pytest.mark.parametrize(("matmul_dtype", "apart"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_softmax_weighted_sum_and_its_gradients(matmul_dtype, apart):
    """Scores differ widely; some are masked, and in one row all are."""
    scores = 4 * normal(0, 2, 3, 5, 7)
    values = normal(1, 2, 3, 7, 4)
    scores = scores.at[:, :, :, 2].set(-1e30).at[0, 1, 3].set(-1e30)
    ours = jax.jit(
        lambda *args: output_and_gradients(
            lambda s, v: softmax_weighted_sum(s, v, matmul_dtype), *args
        )
    )(scores, values)
    theirs = output_and_gradients(
        lambda s, v: jax.nn.softmax(s, axis=-1) @ v, scores, values
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=apart * jnp.max(jnp.abs(b))
        ),
        ours,
        theirs,
    )
    assert {found.dtype for found in ours} == {jnp.dtype("float32")}


def test_softmax_weighted_sum_by_hand():
    """Weights 1/4 and 3/4 of 2 and 6 give 5. With an output gradient of 1, w (dw − Σ w dw)
    is 1/4 (2 − 5) and 3/4 (6 − 5)."""
    scores = jnp.log(jnp.array([[[[1.0, 3.0]]]]))
    values = jnp.array([[[[2.0], [6.0]]]])
    mean, pull = jax.vjp(lambda s, v: softmax_weighted_sum(s, v, "float32"), scores, values)
    np.testing.assert_allclose(mean, [[[[5.0]]]], rtol=1e-6)
    of_scores, of_values = pull(jnp.ones_like(mean))
    np.testing.assert_allclose(of_scores, [[[[-0.75, 0.75]]]], rtol=1e-6)
    np.testing.assert_allclose(of_values, [[[[0.25], [0.75]]]], rtol=1e-6)


def test_normalize_by_hand():
    """1, 3: mean 2, deviations ∓1, variance 1. This gives ∓1 / √(1 + 3) at ε = 3; without
    the mean, 1 / √(5 + 4) and 3 / 3."""
    np.testing.assert_allclose(normalize(jnp.array([1.0, 3.0]), True, 3.0), [-0.5, 0.5])
    np.testing.assert_allclose(normalize(jnp.array([1.0, 3.0]), False, 4.0), [1 / 3, 1.0])


def test_bfloat16_gradients_stay_bfloat16():
    args = normal(0, 2, 4).astype(jnp.bfloat16), normal(1, 4, 5).astype(jnp.bfloat16)
    of_x, of_kernel = jax.grad(
        lambda x, y: einsum("ad,df->af", x, y, "bfloat16").astype(jnp.float32).sum(),
        argnums=(0, 1),
    )(*args)
    assert of_x.dtype == of_kernel.dtype == jnp.bfloat16


def test_ops_under_vmap():
    x = normal(0, 2, 4)
    kernels = normal(1, 3, 4, 5)

    def of_kernel(kernel):
        return jax.grad(
            lambda k: (
                normalize(einsum("ad,df->af", x, k, "float32"), True, 1e-5) ** 3
            ).sum()
        )(kernel)

    together = jax.vmap(of_kernel)(kernels)
    np.testing.assert_allclose(
        together, jnp.stack([of_kernel(kernel) for kernel in kernels]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 1), ("tpu", 0), ("cuda", 0)])
def test_only_cpu_programs_have_barriers(platform, barriers):
    lowered = (
        jax.jit(lambda x: materialize(x) + 1)
        .trace(jnp.ones(3))
        .lower(lowering_platforms=(platform,))
    )
    assert lowered.as_text().count("optimization_barrier") == barriers


@pytest.mark.parametrize(
    ("platform", "sums"), [("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")]
)
def test_bfloat16_products_accumulate_in_float32_on_cpus_only(platform, sums):
    """Elsewhere float32 results would double the size of collectives and saved
    activations."""
    x, y = (a.astype(jnp.bfloat16) for a in arrays("ad,df->af"))
    traced = jax.jit(lambda x, y: einsum("ad,df->af", x, y, "bfloat16")).trace(x, y)
    (line,) = [
        line
        for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
        if "dot_gen" in line
    ]
    assert line.rstrip().endswith(f"-> tensor<2x5x{sums}>")
