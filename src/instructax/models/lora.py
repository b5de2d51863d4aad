"""Low-rank adapters (LoRA, Hu et al., 2021).

x · W becomes x · W + alpha / rank · (x · A) · B. Only A, B and the scalar head, if there is
one, are trained.

A and B are leaves beside the kernel W of each linear map of the layers, and alpha / rank is
a third leaf, so the parameters alone say whether and how they are adapted. B starts at
zero: an adapted network starts bitwise equal to its parent. `trainable` selects what
gradients, Adam moments and averages cover; `merge_lora` adds A · B to the kernels, for
samplers and for later stages.

The paper trains all parameters; adapters are our addition for small machines.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from instructax.config import check_positive, check_range
from instructax.types import Array, Params

# Leaves of an adapter, beside `kernel`.
A = "lora_a"
B = "lora_b"
SCALE = "lora_scale"
# Linear map → how many axes of its kernel it contracts, after the leading layer axis.
CONTRACTED_AXES = {
    "query": 1,
    "key": 1,
    "value": 1,
    "out": 2,
    "up": 1,
    "gate": 1,
    "down": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters of a run."""

    # 0 = none: all parameters are trained
    rank: int
    # An adapter's output is multiplied by alpha / rank
    alpha: float

    def __post_init__(self):
        check_range(self, {"rank": 0})
        check_positive(self, "alpha")


def add_lora(params: Params, config: LoraConfig, key: Array) -> Params:
    """`params` with adapters, A ~ N(0, 1 / inputs) and B = 0; unchanged for rank 0."""
    if config.rank == 0:
        return params
    # One key per name, so that a map's adapter does not depend on which others exist.
    split = jax.random.split(key, len(CONTRACTED_AXES))
    keys = dict(zip(CONTRACTED_AXES, split, strict=True))

    def add(name: str, linear: Params) -> Params:
        kernel = linear["kernel"]  # [num_layers, *inputs, *outputs]
        layers = kernel.shape[0]
        inputs, outputs = _inputs_and_outputs(name, kernel)
        # Std 1 / √inputs, so A · x has the scale of x.
        a = jax.random.normal(keys[name], (layers, *inputs, config.rank), jnp.float32)
        return {
            **linear,
            A: a / np.sqrt(np.prod(inputs)),
            B: jnp.zeros((layers, config.rank, *outputs), jnp.float32),
            SCALE: jnp.full((layers,), config.alpha / config.rank, jnp.float32),
        }

    return {**params, "blocks": _map_linears(add, params["blocks"])}


def merge_lora(params: Params) -> Params:
    """The same network without adapters; parameters without adapters are unchanged."""

    def merge(name: str, linear: Params) -> Params:
        # Such as the linear maps of a network that was trained in full.
        if A not in linear:
            return linear
        kernel = linear["kernel"]
        rank = linear[A].shape[-1]
        a = linear[A].reshape(len(kernel), -1, rank)  # [layers, inputs, rank]
        b = linear[B].reshape(len(kernel), rank, -1)  # [layers, rank, outputs]
        # Full precision: the merged network must equal the adapted one up to rounding.
        delta = jnp.einsum("lir,lro->lio", a, b, precision="highest")
        # [layers, 1, ..., 1], to multiply a kernel [layers, *inputs, *outputs]
        scale = linear[SCALE].reshape(-1, *(1,) * (kernel.ndim - 1))

        merged = {leaf: x for leaf, x in linear.items() if leaf not in (A, B, SCALE)}
        kernel_dtype = kernel.dtype
        kernel = kernel + scale * delta.reshape(kernel.shape)
        merged["kernel"] = kernel.astype(kernel_dtype)
        return merged

    if "blocks" not in params:
        return params
    return {**params, "blocks": _map_linears(merge, params["blocks"])}


def trainable(params: Params) -> Params:
    """The subtree that is trained: all parameters, or A, B and the scalar head if there are
    adapters."""
    if not _has_lora(params):
        return params

    def adapters(tree: Params) -> Params:
        selected = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                if below := adapters(leaf):
                    selected[name] = below
            elif name in (A, B):
                selected[name] = leaf
        return selected

    # The scalar head has no adapter, so it is trained in full.
    selected = {"blocks": adapters(params["blocks"])}
    if "scalar_head" in params:
        selected["scalar_head"] = params["scalar_head"]
    return selected


def merge_trees(part: Params, params: Params) -> Params:
    """`params` with the leaves of its subtree `part` replaced."""
    if not isinstance(params, dict) or not isinstance(part, dict):
        return part
    # Shallow copies along the path; leaves are shared, not copied.
    merged = dict(params)
    for name in params:
        if name in part:
            merged[name] = merge_trees(part[name], params[name])
    return merged


def _has_lora(params: Params) -> bool:
    if not isinstance(params, dict):
        return False
    # All linear maps of a network are adapted or none, so looking at one group suffices.
    mlp = params.get("blocks", {}).get("mlp", {})
    return any(A in linear for linear in mlp.values())


def _inputs_and_outputs(
    name: str, kernel: Array
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and output axes of a kernel [num_layers, *inputs, *outputs]."""
    # Axis 0 is the layer.
    first_output = 1 + CONTRACTED_AXES[name]
    return kernel.shape[1:first_output], kernel.shape[first_output:]


def _map_linears(change: Callable[[str, Params], Params], blocks: Params) -> Params:
    """`blocks` with the leaves of each linear map replaced by `change(name, leaves)`."""
    changed = dict(blocks)
    for group in ("attention", "mlp"):
        if group not in blocks:
            continue
        changed[group] = dict(blocks[group])
        for name, leaves in blocks[group].items():
            if "kernel" in leaves:  # not the norms of query and key
                changed[group][name] = change(name, leaves)
    return changed
