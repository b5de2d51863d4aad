"""What a run will hold on each device, from shapes alone: no data is read, nothing is
allocated."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from instructax import sharding
from instructax.config import require
from instructax.models import (
    ComputeConfig,
    ModelConfig,
    Transformer,
    decoding_config,
    init_cache,
    parameter_count,
)
from instructax.models.init import abstract_params
from instructax.sharding import MeshConfig
from instructax.training.optimizer import make_optimizer
from instructax.training.state import abstract_state, adapter_initializer

GIB = 2**30


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh without devices; `data = -1` counts as 1: copies change nothing of what a
    device holds but its rows."""
    require(
        config.fsdp > 0 and config.tensor > 0 and (config.data > 0 or config.data == -1),
        f"config.mesh = {config.data} × {config.fsdp} × {config.tensor}: axes must be positive (data may be -1)",
    )
    shape = (max(config.data, 1), config.fsdp, config.tensor)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def bytes_per_device(tree: Any) -> int:
    """Bytes of the largest piece of each leaf of an abstract tree."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def memory(config: Any) -> dict[str, int]:
    """Bytes that stay on one device throughout the run, by what they are; `config` is the
    config of any stage."""
    mesh: Any = abstract_mesh(config.mesh)

    def plain(model: ModelConfig, head: Any) -> Any:
        return abstract_params(Transformer(model, config.compute, head), mesh)

    def state(model: ModelConfig, head: Any, optimizer: Any) -> Any:
        network = Transformer(model, config.compute, head)
        return abstract_state(
            network, make_optimizer(optimizer), mesh, adapter_initializer(config)
        )

    if config.stage == "supervised":
        return _state_bytes("model", state(config.model, "tokens", config.optimizer))
    if config.stage == "reward":
        return _state_bytes("reward model", state(config.model, "scalar", config.optimizer))
    policy = state(config.model, "tokens", config.optimizer)
    value = state(config.reward_model, "scalar", config.value_optimizer)
    row_ways = sharding.num_row_shards(mesh)
    rows = -(-config.batch_size // row_ways)
    slots = min(config.compute.slots, rows)
    head_ways = (
        mesh.size // row_ways
    )  # devices with the same rows have other heads of the cache
    prompt_tokens = config.data.limits.prompt_tokens
    length = prompt_tokens + config.data.limits.response_tokens
    return {
        **_state_bytes("policy", policy),
        **_state_bytes("value network", value),
        "averaged policy": bytes_per_device(policy.params),
        "reference policy": bytes_per_device(plain(config.model, "tokens")),
        "reward model": bytes_per_device(plain(config.reward_model, "scalar")),
        "cache of the prompts": _cache_bytes(
            config.model, config.compute, rows, prompt_tokens
        )
        // head_ways,
        "cache of the sampler": _cache_bytes(config.model, config.compute, slots, length)
        // head_ways,
    }


def _state_bytes(name: str, state: Any) -> dict[str, int]:
    return {
        name: bytes_per_device(state.params),
        f"optimizer of the {name}": bytes_per_device(state.opt_state),
    }


def _cache_bytes(model: ModelConfig, compute: ComputeConfig, rows: int, length: int) -> int:
    cache = jax.eval_shape(
        lambda: init_cache(model, decoding_config(compute), rows, length)
    )
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(cache))


def report(config: Any) -> str:
    """Parameters and memory per device, as lines to print."""
    models: Mapping[str, tuple[ModelConfig, Any]] = {
        "model": (config.model, "scalar" if config.stage == "reward" else "tokens"),
        **(
            {"reward_model": (config.reward_model, "scalar")}
            if config.stage == "ppo"
            else {}
        ),
    }
    lines: list[str] = []
    mesh: Any = abstract_mesh(config.mesh)
    for name, (model, head) in models.items():
        shapes = abstract_params(Transformer(model, config.compute, head), mesh)
        lines.append(f"{name}: {parameter_count(shapes):,} parameters")
    more = ", or a multiple (config.mesh.data = -1)" if config.mesh.data == -1 else ""
    lines.append(
        "mesh: "
        + " × ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
        + f" = {mesh.size} devices{more}"
    )
    held = memory(config)
    lines += [f"{name:<32}{size / GIB:10.3f} GiB per device" for name, size in held.items()]
    lines.append(
        f"{'held throughout':<32}{sum(held.values()) / GIB:10.3f} GiB per device; gradients and activations on top"
    )
    return "\n".join(lines)
