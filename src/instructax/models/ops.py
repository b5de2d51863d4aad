"""Operations that JAX would derive worse: backward passes of the network, and loops under
`vmap`.

XLA:CPU fuses what computes an array into every product that reads it, and computes it again
there: in the backward pass of a transformer, the norms and activations of all later layers.
Here such arrays are written to memory once. The mathematics is that of the derived
gradients; on other accelerators XLA is left alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

custom_vmap: Any = jax.custom_batching.custom_vmap
custom_vjp: Any = jax.custom_vjp  # whose stubs forget what a decorated function returns


def materialized(x: Array) -> Array:
    """`x`; on CPUs XLA may not fuse what computes it with what reads it."""
    kept: Any = jax.lax.platform_dependent(
        x, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )
    return kept


@partial(custom_vjp, nondiff_argnums=(0, 3))
def product(axes: str, x: Array, y: Array, matmul_dtype: str) -> Array:
    """Einstein's sum of two arrays: with `axes` "td,df->tf" it is Σ_d x[t, d] · y[d, f], of
    the dtype of x.

    Both are rounded to the dtype `matmul_dtype`; sums are float32. Each axis is one of two
    of the three arrays, or of all.
    """
    return _product_forward(axes, x, y, matmul_dtype)[0]


def _product_forward(
    axes: str, x: Array, y: Array, matmul_dtype: str
) -> tuple[Array, tuple[Array, Array]]:
    rounded = x.astype(matmul_dtype)
    return _einsum(axes, rounded, y.astype(matmul_dtype), x.dtype), (rounded, y)


def _product_backward(
    axes: str, matmul_dtype: str, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """d x = gradient · y and d y = x · gradient, each summed over the axes that it lacks."""
    of_x, of_y, of_result = axes.replace("->", ",").split(",")
    (x, y), dtype = kept, gradient.dtype
    x, gradient = materialized(x), materialized(gradient.astype(matmul_dtype))
    by_x = _einsum(f"{of_result},{of_y}->{of_x}", gradient, y.astype(matmul_dtype), dtype)
    # Both are summed over their first axes, so that the left one has to be transposed: the
    # smaller one.
    (left, of_left), (right, of_right) = sorted(
        [(x, of_x), (gradient, of_result)], key=lambda pair: pair[0].size
    )
    by_y = _einsum(f"{of_left},{of_right}->{of_y}", left, right, dtype)
    return by_x, by_y.astype(y.dtype)


def _einsum(axes: str, x: Array, y: Array, dtype: Any) -> Array:
    """As `product`, of `dtype`; what is transposed for it is written to memory."""
    of_x, of_y, of_result = axes.replace("->", ",").split(",")
    batch = "".join(axis for axis in of_x if axis in of_y and axis in of_result)
    summed = "".join(axis for axis in of_x if axis in of_y and axis not in of_result)
    free = "".join(axis for axis in of_x if axis not in of_y)
    x, of_x = _transposed(x, of_x, batch + free + summed), batch + free + summed
    contracted = tuple(map(of_x.index, summed)), tuple(map(of_y.index, summed))
    along = tuple(map(of_x.index, batch)), tuple(map(of_y.index, batch))

    def into(sums: Any) -> Callable[[Array, Array], Array]:
        return lambda x, y: jax.lax.dot_general(
            x, y, (contracted, along), preferred_element_type=sums
        ).astype(dtype)

    result: Any
    if dtype == jnp.float32:
        result = into(jnp.float32)(x, y)
    else:  # sixteen bits, which XLA:CPU multiplies fast into float32 alone
        result = jax.lax.platform_dependent(
            x, y, cpu=into(jnp.float32), default=into(dtype)
        )
    return _transposed(
        result, batch + free + "".join(axis for axis in of_y if axis not in of_x), of_result
    )


def _transposed(x: Array, axes: str, wanted: str) -> Array:
    if axes == wanted:
        return x
    return materialized(jnp.transpose(materialized(x), tuple(map(axes.index, wanted))))


product.defvjp(_product_forward, _product_backward)


@partial(custom_vjp, nondiff_argnums=(1, 2))
def normalized(x: Array, centred: bool, epsilon: float) -> Array:
    """(x − mean) / √(variance + ε) over the last axis if `centred` (LayerNorm), else x /
    √(mean of x² + ε) (RMSNorm): f32[..., D] → f32[..., D]."""
    return _normalized_forward(x, centred, epsilon)[0]


def _normalized_forward(
    x: Array, centred: bool, epsilon: float
) -> tuple[Array, tuple[Array, Array]]:
    if centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)
    y = x * inverse
    return y, (y, inverse)


def _normalized_backward(
    centred: bool, epsilon: float, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array]:
    """(g − y · mean(g · y)), less the mean of g if centred, times 1 / √(…)."""
    y, inverse = kept
    of_x = gradient - y * jnp.mean(gradient * y, axis=-1, keepdims=True)
    if centred:
        of_x = of_x - jnp.mean(gradient, axis=-1, keepdims=True)
    return (materialized(of_x * inverse),)


normalized.defvjp(_normalized_forward, _normalized_backward)


@partial(custom_vjp, nondiff_argnums=(1,))
def gelu(x: Array, approximate: bool = True) -> Array:
    """GELU in its tanh form, as GPT-2's, or with the exact normal distribution, as
    GPT-NeoX's: dtype[...] → dtype[...]. Only x is kept for the backward pass."""
    return jax.nn.gelu(x, approximate=approximate)


def _gelu_backward(approximate: bool, x: Array, gradient: Array) -> tuple[Array]:
    return jax.vjp(partial(jax.nn.gelu, approximate=approximate), materialized(x))[1](
        gradient
    )


gelu.defvjp(lambda x, approximate: (gelu(x, approximate), x), _gelu_backward)


@partial(custom_vjp, nondiff_argnums=(2,))
def softmax_mean(scores: Array, values: Array, matmul_dtype: str) -> Array:
    """The mean of values, weighted by the softmax of scores: f32[B, H, Q, S], dtype[B, H,
    S, d] → f32[B, H, Q, d].

    What is multiplied is rounded to the dtype `matmul_dtype`. Backward, the scores'
    gradient is w · (dw − Σ_s w · dw), and that sum is Σ_d of outputs times their gradient
    (Dao et al., 2022): d numbers, where there may be thousands of keys.
    """
    return _softmax_mean_forward(scores, values, matmul_dtype)[0]


def _softmax_mean_forward(
    scores: Array, values: Array, matmul_dtype: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    weights = jax.nn.softmax(scores, axis=-1)
    mean = product("bhqs,bhsd->bhqd", weights, values, matmul_dtype)
    return mean, (weights, values, mean)


def _softmax_mean_backward(
    matmul_dtype: str, kept: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array]:
    weights, values, mean = kept
    pull = jax.vjp(
        partial(product, "bhqs,bhsd->bhqd", matmul_dtype=matmul_dtype), weights, values
    )[1]
    of_weights, of_values = pull(gradient)
    return weights * (
        of_weights - jnp.sum(mean * gradient, axis=-1, keepdims=True)
    ), of_values


softmax_mean.defvjp(_softmax_mean_forward, _softmax_mean_backward)


def soft_capped(x: Array, cap: float) -> Array:
    """cap · tanh(x / cap), which never leaves −cap … cap (Gemma Team, 2024); x itself with
    a cap of 0."""
    return cap * jnp.tanh(x / cap) if cap else x


@custom_vmap
def any_over_batch(flag: Array) -> Array:
    """`flag` b[]; under `vmap` whether it holds for any of the batch, and one answer for
    all.

    A loop that ends by it is one loop for the whole batch. Else `vmap` lets each go on by
    itself: it keeps the state of those that have ended by copying all of it at every step.
    """
    return flag


@any_over_batch.def_vmap
def _(_size: int, _batched: list[bool], flags: Array) -> tuple[Array, bool]:
    return jnp.any(flags, axis=0), False


@custom_vmap
def max_over_batch(number: Array) -> Array:
    """`number` i32[]; under `vmap` the largest of the batch, for all: a loop's end, as
    `any_over_batch`."""
    return number


@max_over_batch.def_vmap
def _(_size: int, _batched: list[bool], numbers: Array) -> tuple[Array, bool]:
    return jnp.max(numbers, axis=0), False
