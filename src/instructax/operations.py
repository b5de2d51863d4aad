"""Operations that JAX would derive worse: backward passes of the network, and loops under `vmap`.

XLA:CPU fuses what computes an array into every product that reads it, and computes it again there: in the backward pass
of a transformer, the norms and activations of all later layers. Here such arrays are written to memory once. The
mathematics is that of the derived gradients; on other accelerators XLA is left alone.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

custom_vmap: Any = jax.custom_batching.custom_vmap
custom_vjp: Any = jax.custom_vjp  # whose stubs forget what a decorated function returns


def materialized(x: Array) -> Array:
    """`x`; on CPUs XLA may not fuse what computes it with what reads it."""
    kept: Any = jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    return kept


@partial(custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, contracted: int) -> Array:
    """Σ x · kernel over the last axes of x and the first of the kernel, `contracted` of them:
    dtype[..., contracted axes], dtype[contracted axes, *features] → dtype[..., *features]."""
    return _product_forward(x, kernel, contracted)[0]


def _product_forward(x: Array, kernel: Array, contracted: int) -> tuple[Array, tuple[Array, Array]]:
    axes = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    return jax.lax.dot_general(x, kernel, (axes, ((), ()))), (x, kernel)


def _product_backward(contracted: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """d x = gradient · kernelᵀ over the features, d kernel = xᵀ · gradient over the rows."""
    x, kernel = kept
    x, gradient = materialized(x), materialized(gradient)
    rows = tuple(range(x.ndim - contracted))
    features = tuple(range(len(rows), gradient.ndim)), tuple(range(contracted, kernel.ndim))
    of_x = jax.lax.dot_general(gradient, kernel, (features, ((), ())))
    return of_x, jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))


product.defvjp(_product_forward, _product_backward)


@partial(custom_vjp, nondiff_argnums=(1, 2))
def normalized(x: Array, centred: bool, epsilon: float) -> Array:
    """(x − mean) / √(variance + ε) over the last axis if `centred` (LayerNorm), else x / √(mean of x² + ε) (RMSNorm):
    f32[..., D] → f32[..., D]."""
    return _normalized_forward(x, centred, epsilon)[0]


def _normalized_forward(x: Array, centred: bool, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    if centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)
    y = x * inverse
    return y, (y, inverse)


def _normalized_backward(centred: bool, epsilon: float, kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    """(g − y · mean(g · y)), less the mean of g if centred, times 1 / √(…)."""
    y, inverse = kept
    of_x = gradient - y * jnp.mean(gradient * y, axis=-1, keepdims=True)
    if centred:
        of_x = of_x - jnp.mean(gradient, axis=-1, keepdims=True)
    return (materialized(of_x * inverse),)


normalized.defvjp(_normalized_forward, _normalized_backward)


@custom_vmap
def anywhere(flag: Array) -> Array:
    """`flag` b[]; under `vmap` whether it holds for any of the batch, and one answer for all.

    A loop that ends by it is one loop for the whole batch. Else `vmap` lets each go on by itself: it keeps the state of
    those that have ended by copying all of it at every step.
    """
    return flag


@anywhere.def_vmap
def _(_size: int, _batched: list[bool], flags: Array) -> tuple[Array, bool]:
    return jnp.any(flags, axis=0), False


@custom_vmap
def largest(number: Array) -> Array:
    """`number` i32[]; under `vmap` the largest of the batch, for all: a loop's end, as `anywhere`."""
    return number


@largest.def_vmap
def _(_size: int, _batched: list[bool], numbers: Array) -> tuple[Array, bool]:
    return jnp.max(numbers, axis=0), False
