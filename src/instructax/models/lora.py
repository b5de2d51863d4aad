"""Low-rank adapters (LoRA, Hu et al., 2021): x · W becomes x · W + alpha / rank · (x · A) ·
B, and A and B alone are trained, with the scalar head if there is one.

A and B are leaves beside the kernel W of each linear map of the layers, with alpha / rank
as a third leaf: a tree of parameters says of itself whether it is adapted, and how. B
starts at 0, so that an adapted network begins as its parent, to the bit. `trainable` is
what gradients, Adam's moments and averages are made of; `merge_lora` puts A · B into the
kernels, for a sampler and for whoever starts from the run.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from instructax.config import check_positive, check_range
from instructax.types import Array, Params

A, B, SCALE = "lora_a", "lora_b", "lora_scale"  # beside `kernel`
# Each linear map of the layers, and how many axes of its kernel its product sums over.
CONTRACTED = {"query": 1, "key": 1, "value": 1, "out": 2, "up": 1, "gate": 1, "down": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of a run."""

    rank: int  # 0 = none, and all parameters are trained
    alpha: float  # what adapters add is multiplied by alpha / rank

    def __post_init__(self):
        check_range(self, {"rank": 0})
        check_positive(self, "alpha")


def add_lora(params: Params, config: LoraConfig, key: Array) -> Params:
    """`params` with adapters: A from N(0, 1 / the number of inputs), B = 0. With rank 0
    `params` themselves."""
    if config.rank == 0:
        return params
    keys = dict(zip(CONTRACTED, jax.random.split(key, len(CONTRACTED)), strict=True))

    def added(name: str, linear: Params) -> Params:
        kernel = linear["kernel"]
        layers, (inputs, outputs) = kernel.shape[0], _inputs_and_outputs(name, kernel)
        a = jax.random.normal(keys[name], (layers, *inputs, config.rank), jnp.float32)
        return {
            **linear,
            A: a / np.sqrt(np.prod(inputs)),
            B: jnp.zeros((layers, config.rank, *outputs), jnp.float32),
            SCALE: jnp.full((layers,), config.alpha / config.rank, jnp.float32),
        }

    return {**params, "blocks": _with_linears(params["blocks"], added)}


def merge_lora(params: Params) -> Params:
    """The parameters of the same network without adapters; those without any as they are."""

    def summed(name: str, linear: Params) -> Params:
        if A not in linear:
            return linear
        kernel = linear["kernel"]
        a, b = linear[A].reshape(len(kernel), -1, linear[A].shape[-1]), linear[B]
        change = jnp.einsum(
            "lir,lro->lio", a, b.reshape(*b.shape[:2], -1), precision="highest"
        )
        scale = linear[SCALE].reshape(-1, *(1,) * (kernel.ndim - 1))
        plain = {leaf: x for leaf, x in linear.items() if leaf not in (A, B, SCALE)}
        return {
            **plain,
            "kernel": (kernel + scale * change.reshape(kernel.shape)).astype(kernel.dtype),
        }

    return (
        {**params, "blocks": _with_linears(params["blocks"], summed)}
        if "blocks" in params
        else params
    )


def trainable(params: Params) -> Params:
    """The part of a tree of parameters that is trained: of an adapted one A, B and the
    scalar head, else all of it."""
    if not _adapted(params):
        return params

    def part(tree: Params) -> Params:
        below = {
            name: part(leaf) if isinstance(leaf, dict) else leaf
            for name, leaf in tree.items()
        }
        return {
            name: leaf
            for name, leaf in below.items()
            if (leaf if isinstance(leaf, dict) else name in (A, B))
        }

    head = {name: leaf for name, leaf in params.items() if name == "scalar_head"}
    return {"blocks": part(params["blocks"]), **head}


def merge_trees(part: Params, params: Params) -> Params:
    """`params` with the leaves of `part`, which has some of theirs."""
    if not isinstance(params, dict) or not isinstance(part, dict):
        return part
    return {
        name: merge_trees(part[name], leaf) if name in part else leaf
        for name, leaf in params.items()
    }


def _adapted(params: Params) -> bool:
    return isinstance(params, dict) and any(
        A in linear for linear in params.get("blocks", {}).get("mlp", {}).values()
    )


def _inputs_and_outputs(
    name: str, kernel: Array
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    border = 1 + CONTRACTED[name]
    return kernel.shape[1:border], kernel.shape[border:]


def _with_linears(blocks: Params, change: Callable[[str, Params], Params]) -> Params:
    """`blocks` with each linear map's leaves replaced by `change(its name, they)`."""
    return {
        name: {
            part: change(part, leaves) if "kernel" in leaves else leaves
            for part, leaves in group.items()
        }
        if name in ("attention", "mlp")
        else group
        for name, group in blocks.items()
    }
