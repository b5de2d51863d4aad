"""An estimate of the device memory of a run, from shapes alone: no file is read and no
array is allocated. Gradients, activations and what XLA needs besides are not counted.

Each stage adds up its own arrays in `memory(config, mesh)`. This module has the functions
that stages share, and the report of a dry run.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from instructax import sharding
from instructax.checkpoints.parents import Head
from instructax.config import require
from instructax.models.config import ComputeConfig, ModelConfig, decoding_config
from instructax.models.init import abstract_params
from instructax.models.kv_cache import init_cache
from instructax.models.transformer import Transformer, parameter_count
from instructax.sharding import MeshConfig
from instructax.training.optimizer import OptimizerConfig, make_optimizer
from instructax.training.state import abstract_state, adapter_initializer, no_adapters

GIB = 2**30  # bytes


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh without devices.

    `data = -1` counts as 1: more copies of the model leave each device only fewer rows.
    """
    require(
        config.fsdp > 0 and config.tensor > 0 and (config.data > 0 or config.data == -1),
        f"config.mesh = {config.data} × {config.fsdp} × {config.tensor}: axes must be "
        "positive (data may be -1)",
    )
    # In the order of `sharding.AXES`.
    shape = (max(config.data, 1), config.fsdp, config.tensor)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def bytes_per_device(tree: Any) -> int:
    """Bytes of one shard of each leaf of an abstract tree, added up."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        # Raises ValueError if the mesh does not divide the shape.
        shard = leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shard)) * leaf.dtype.itemsize
    return total


def parameter_bytes(
    model: ModelConfig, compute: ComputeConfig, head: Head, mesh: Any
) -> int:
    """Bytes per device of the parameters of a network that is not trained."""
    network = Transformer(model, compute, head)
    return bytes_per_device(abstract_params(network, mesh))


def training_bytes(
    name: str,
    config: Any,
    model: ModelConfig,
    head: Head,
    optimizer: OptimizerConfig,
    mesh: Any,
) -> dict[str, int]:
    """Bytes per device of a network that is trained, and of its optimizer.

    Args:
      name: what the report calls the network.
      config: Config of the stage; its `compute` and, if it has one, `lora` are used.
      model: architecture of the network.
      head: its head.
      optimizer: its optimizer.
      mesh: the mesh, with or without devices.

    Returns:
      `name` -> bytes of the parameters, "optimizer of the `name`" -> bytes of its state.
    """
    # Stages without LoRA train every parameter.
    network = Transformer(model, config.compute, head)
    add_adapters = adapter_initializer(config) if hasattr(config, "lora") else no_adapters
    # With LoRA the optimizer holds moments of the adapters alone.
    state = abstract_state(network, make_optimizer(optimizer), mesh, add_adapters)
    return {
        name: bytes_per_device(state.params),
        f"optimizer of the {name}": bytes_per_device(state.opt_state),
    }


def cache_bytes(
    model: ModelConfig, compute: ComputeConfig, rows: int, length: int, mesh: Any
) -> int:
    """Bytes per device of a KV cache for `rows` rows of `length` tokens on that device."""
    # Shapes only: a cache of the whole batch may not fit into host memory.
    cache = jax.eval_shape(
        lambda: init_cache(model, decoding_config(compute), rows, length)
    )
    total = 0
    for leaf in jax.tree.leaves(cache):
        total += int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    # Devices with the same rows hold different heads of the cache.
    head_shards = mesh.size // sharding.num_row_shards(mesh)
    return total // head_shards


def memory_report(config: Any, held: Mapping[str, int]) -> str:
    """The report of a dry run: parameters, mesh and memory per device, one per line.

    Args:
      config: Config of a stage.
      held: what the stage's `memory` returns.
    """
    if not held:
        return "nothing is trained"
    mesh: Any = abstract_mesh(config.mesh)
    # Stages that use a reward model count its parameters on a line of their own.
    lines = [_parameter_line("model", config.model, config.head, config.compute, mesh)]
    if hasattr(config, "reward_model"):
        scalar = (config.reward_model, "scalar", config.compute, mesh)
        lines.append(_parameter_line("reward_model", *scalar))

    # An AbstractMesh has the smallest size if `data` is left open.
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    more = ", or a multiple (config.mesh.data = -1)" if config.mesh.data == -1 else ""
    lines.append(f"mesh: {axes} = {mesh.size} devices{more}")

    # Columns: name, GiB.
    for name, size in held.items():
        lines.append(f"{name:<32}{size / GIB:10.3f} GiB per device")
    total = sum(held.values()) / GIB
    lines.append(
        f"{'held throughout':<32}{total:10.3f} GiB per device; gradients and activations "
        "on top"
    )
    return "\n".join(lines)


def _parameter_line(
    name: str, model: ModelConfig, head: Head, compute: ComputeConfig, mesh: Any
) -> str:
    # The number of parameters of the whole network, not of one device.
    shapes = abstract_params(Transformer(model, compute, head), mesh)
    return f"{name}: {parameter_count(shapes):,} parameters"
