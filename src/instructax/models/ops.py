"""Operations with hand-written gradients for XLA:CPU, and loop conditions under `vmap`.

A reader may skip every backward pass here: the gradients are mathematically those that JAX
derives, and other accelerators get the same program without the barriers. They exist
because XLA:CPU fuses the computation of an array into every matrix product that reads it,
and repeats it there, which in the backward pass of a transformer recomputes the norms and
activations of all later layers. `materialize` writes such arrays to memory once;
docs/performance.md has the measurements.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# The type stubs of both lose the signature of the decorated function.
custom_vmap: Any = jax.custom_batching.custom_vmap
custom_vjp: Any = jax.custom_vjp


def materialize(x: Array) -> Array:
    """Returns `x`; on CPUs XLA may not fuse its computation into the operations that read
    it."""
    result: Any = jax.lax.platform_dependent(
        x, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )
    return result


@partial(custom_vjp, nondiff_argnums=(0, 3))
def einsum(axes: str, x: Array, y: Array, matmul_dtype: str) -> Array:
    """`jnp.einsum` of two arrays with rounded operands.

    Args:
      axes: such as "td,df->tf". Each axis occurs in exactly two of the three arrays, or in
        all three.
      x, y: the operands, rounded to `matmul_dtype`.
      matmul_dtype: dtype of the operands; sums are float32.

    Returns:
      An array of the dtype of x.
    """
    return _einsum_forward(axes, x, y, matmul_dtype)[0]


def _einsum_forward(
    axes: str, x: Array, y: Array, matmul_dtype: str
) -> tuple[Array, tuple[Array, Array]]:
    # Save the rounded x: the backward pass needs no more, and bfloat16 is half the bytes.
    rounded = x.astype(matmul_dtype)
    result = _contract(axes, rounded, y.astype(matmul_dtype), x.dtype)
    return result, (rounded, y)


def _einsum_backward(
    axes: str, matmul_dtype: str, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    # For z = x · y: dx = dz · yᵀ and dy = xᵀ · dz, both as einsums over the same names.
    x_axes, y_axes, out_axes = axes.replace("->", ",").split(",")
    x, y = residuals
    dtype = gradient.dtype
    # Computed once, not again inside each matrix product that reads them.
    x = materialize(x)
    gradient = materialize(gradient.astype(matmul_dtype))
    x_gradient = _contract(
        f"{out_axes},{y_axes}->{x_axes}", gradient, y.astype(matmul_dtype), dtype
    )
    # Both operands are contracted over their first axes, so the left one has to be
    # transposed: take the smaller one.
    if x.size <= gradient.size:
        y_gradient = _contract(f"{x_axes},{out_axes}->{y_axes}", x, gradient, dtype)
    else:
        y_gradient = _contract(f"{out_axes},{x_axes}->{y_axes}", gradient, x, dtype)
    return x_gradient, y_gradient.astype(y.dtype)


def _contract(axes: str, x: Array, y: Array, dtype: Any) -> Array:
    """As `einsum`, with the result in `dtype`; what is transposed is materialized."""
    x_axes, y_axes, out_axes = axes.replace("->", ",").split(",")
    # Every axis is in one of four groups, by the arrays that have it.
    batch = "".join(a for a in x_axes if a in y_axes and a in out_axes)
    summed = "".join(a for a in x_axes if a in y_axes and a not in out_axes)
    x_only = "".join(a for a in x_axes if a not in y_axes)
    y_only = "".join(a for a in y_axes if a not in x_axes)

    # dot_general puts batch axes first, then those of x alone, then those of y alone.
    x = _transpose(x, x_axes, batch + x_only + summed)
    x_axes = batch + x_only + summed
    contracted = (tuple(map(x_axes.index, summed)), tuple(map(y_axes.index, summed)))
    batched = (tuple(map(x_axes.index, batch)), tuple(map(y_axes.index, batch)))

    def dot_into(accumulator: Any) -> Callable[[Array, Array], Array]:
        def dot(x: Array, y: Array) -> Array:
            result = jax.lax.dot_general(
                x, y, (contracted, batched), preferred_element_type=accumulator
            )
            return result.astype(dtype)

        return dot

    result: Any
    if dtype == jnp.float32:
        result = dot_into(jnp.float32)(x, y)
    else:
        # XLA:CPU multiplies 16-bit operands fast only into float32.
        result = jax.lax.platform_dependent(
            x, y, cpu=dot_into(jnp.float32), default=dot_into(dtype)
        )
    return _transpose(result, batch + x_only + y_only, out_axes)


def _transpose(x: Array, axes: str, wanted: str) -> Array:
    if axes == wanted:
        return x
    # On both sides, or XLA:CPU would fuse the transposition into the product.
    order = tuple(map(axes.index, wanted))
    return materialize(jnp.transpose(materialize(x), order))


einsum.defvjp(_einsum_forward, _einsum_backward)


@partial(custom_vjp, nondiff_argnums=(1, 2))
def normalize(x: Array, center: bool, epsilon: float) -> Array:
    """Normalizes the last axis: f32[..., D] → f32[..., D].

    (x − mean) / √(variance + ε) if `center` (LayerNorm), else x / √(mean of x² + ε)
    (RMSNorm).
    """
    return _normalize_forward(x, center, epsilon)[0]


def _normalize_forward(
    x: Array, center: bool, epsilon: float
) -> tuple[Array, tuple[Array, Array]]:
    if center:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    # 1 / the standard deviation: f32[..., 1].
    inverse = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)
    y = x * inverse
    return y, (y, inverse)


def _normalize_backward(
    center: bool, epsilon: float, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array]:
    """(g − y · mean(g · y)), minus mean(g) if centered, times 1 / √(…)."""
    # y is the normalized x, so x itself need not be saved.
    y, inverse = residuals
    x_gradient = gradient - y * jnp.mean(gradient * y, axis=-1, keepdims=True)
    if center:
        x_gradient = x_gradient - jnp.mean(gradient, axis=-1, keepdims=True)
    return (materialize(x_gradient * inverse),)


normalize.defvjp(_normalize_forward, _normalize_backward)


@partial(custom_vjp, nondiff_argnums=(1,))
def gelu(x: Array, approximate: bool = True) -> Array:
    """GELU, elementwise: the tanh approximation (GPT-2) or the exact form (GPT-NeoX).

    Saves only x for the backward pass.
    """
    return jax.nn.gelu(x, approximate=approximate)


def _gelu_forward(x: Array, approximate: bool) -> tuple[Array, Array]:
    return gelu(x, approximate), x


def _gelu_backward(approximate: bool, x: Array, gradient: Array) -> tuple[Array]:
    # Recomputes the activation from x, which is cheap next to storing its parts.
    derived = partial(jax.nn.gelu, approximate=approximate)
    return jax.vjp(derived, materialize(x))[1](gradient)


gelu.defvjp(_gelu_forward, _gelu_backward)


@partial(custom_vjp, nondiff_argnums=(2,))
def softmax_weighted_sum(scores: Array, values: Array, matmul_dtype: str) -> Array:
    """softmax(scores) · values: f32[B, H, Q, S], dtype[B, H, S, d] → f32[B, H, Q, d].

    The gradient of the scores is w · (dw − Σ_s w · dw). The sum over S keys equals the sum
    over the d components of output · gradient (Dao et al., 2022), which is much cheaper.
    """
    return _softmax_weighted_sum_forward(scores, values, matmul_dtype)[0]


def _softmax_weighted_sum_forward(
    scores: Array, values: Array, matmul_dtype: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    # Saved for the backward pass in float32; the product rounds its own copy.
    weights = jax.nn.softmax(scores, axis=-1)
    output = einsum("bhqs,bhsd->bhqd", weights, values, matmul_dtype)
    return output, (weights, values, output)


def _softmax_weighted_sum_backward(
    matmul_dtype: str, residuals: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array]:
    weights, values, output = residuals
    product = partial(einsum, "bhqs,bhsd->bhqd", matmul_dtype=matmul_dtype)
    _, pull_back = jax.vjp(product, weights, values)
    weight_gradient, value_gradient = pull_back(gradient)
    # Σ_s w · dw, as a sum over d components: [B, H, Q, 1]
    correction = jnp.sum(output * gradient, axis=-1, keepdims=True)
    return weights * (weight_gradient - correction), value_gradient


softmax_weighted_sum.defvjp(_softmax_weighted_sum_forward, _softmax_weighted_sum_backward)


def softcap(x: Array, cap: float) -> Array:
    """cap · tanh(x / cap), within ±cap (Gemma Team, 2024); x itself if `cap` is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


@custom_vmap
def any_over_batch(flag: Array) -> Array:
    """Returns `flag` b[]; under `vmap`, one flag for the whole batch: whether any is True.

    As the condition of a while loop it makes one loop for the whole batch. A batched
    condition would make `vmap` copy the state of all finished elements at every step.
    """
    return flag


@any_over_batch.def_vmap
def _(_size: int, _batched: list[bool], flags: Array) -> tuple[Array, bool]:
    # The result is not batched: one flag for all.
    return jnp.any(flags, axis=0), False


@custom_vmap
def max_over_batch(number: Array) -> Array:
    """Returns `number` i32[]; under `vmap`, the largest of the batch for all: a loop bound
    like `any_over_batch`."""
    return number


@max_over_batch.def_vmap
def _(_size: int, _batched: list[bool], numbers: Array) -> tuple[Array, bool]:
    return jnp.max(numbers, axis=0), False
