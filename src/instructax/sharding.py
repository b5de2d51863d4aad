"""The device mesh and the table of array layouts; the only file that names mesh axes.

The mesh has three axes: `data` (replicas of the parameters), `fsdp` (parameters and
optimizer state sharded, gathered when used) and `tensor` (matrices sharded, activations
exchanged). Batch rows are sharded over `data` and `fsdp`. Under `jax.jit` with these
shardings the compiler inserts the communication. What the literature calls `pjit` is
`jax.jit` today.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instructax.config import ConfigError

# The NVIDIA driver has one folder per GPU here.
GPUS = Path("/proc/driver/nvidia/gpus")

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # axes that batch rows are sharded over

# Pattern → layout, matched against the end of a leaf's path; the first match wins.
# Optimizer moments and averages have the paths of their parameters as suffix, so they share
# the rule. The leading axis of everything under `blocks` is the layer.
#
# Letters: L layers, D embed_dim, H heads, d head_dim, F mlp_dim, V vocabulary, T positions,
# r LoRA rank.
LAYOUTS: tuple[tuple[str, P], ...] = (
    # [L, D, H, d]
    (r"attention/(query|key|value)/kernel", P(None, "fsdp", "tensor", None)),
    # [L, H, d]
    (r"attention/(query|key|value)/bias", P(None, "tensor", None)),
    # [L, H, d, D]
    (r"attention/out/kernel", P(None, "tensor", None, "fsdp")),
    # [L, D, F]
    (r"mlp/(up|gate)/kernel", P(None, "fsdp", "tensor")),
    # [L, F]
    (r"mlp/(up|gate)/bias", P(None, "tensor")),
    # [L, F, D]
    (r"mlp/down/kernel", P(None, "tensor", "fsdp")),
    # [L, D]
    (r"(out|down)/bias", P()),
    # [L, D, r]
    (r"(query|key|value|up|gate)/lora_a", P(None, "fsdp", None)),
    # [L, r, H, d] or [L, r, F]
    (r"(query|key|value|up|gate)/lora_b", P(None, None, "tensor")),
    # [L, H, d, r] or [L, F, r]
    (r"(out|down)/lora_a", P(None, "tensor")),
    # [L, r, D]
    (r"(out|down)/lora_b", P(None, None, "fsdp")),
    # [L]
    (r"lora_scale", P()),
    # [L, D] or [D]
    (r"norm/(scale|bias)", P()),
    # [V, D] and [T, D]: D is sharded, because vocabularies of 257 or 50257 divide by
    # nothing.
    (r"(params|mu|nu|ema|^)/?embedding", P(None, ("tensor", "fsdp"))),
    (r"(params|mu|nu|ema|^)/?positions", P(None, ("tensor", "fsdp"))),
    # [D]
    (r"scalar_head/kernel", P()),
    # []
    (r"scalar_head/bias", P()),
    # [V, D]
    (r"(params|mu|nu|ema|^)/?head/kernel", P(None, ("tensor", "fsdp"))),
    # []
    (r"(step|count)", P()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; `data = -1` takes all remaining devices."""

    data: int
    fsdp: int
    tensor: int


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Creates the mesh.

    Args:
      config: the size of each axis.
      devices: the devices to use; None means all.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or JAX would run on
        the CPU of a machine that has GPUs.
    """
    if devices is None:
        _refuse_idle_gpus()
        devices = jax.devices()
    # The axes whose size the config always states.
    fixed = config.fsdp * config.tensor
    data = config.data
    if data == -1 and fixed > 0:
        data = len(devices) // fixed
    if min(data, config.fsdp, config.tensor) < 1 or data * fixed != len(devices):
        raise ConfigError(
            f"mesh.data × mesh.fsdp × mesh.tensor = {config.data} × {config.fsdp} × "
            f"{config.tensor} must equal the number of devices, {len(devices)}"
        )
    # `make_mesh` defaults to explicit axes, with which the model would state every layout.
    return jax.make_mesh(
        (data, config.fsdp, config.tensor),
        AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def one_device_mesh() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), devices=jax.devices()[:1])


def _refuse_idle_gpus() -> None:
    """Raises ConfigError if JAX found no GPU on a machine that has some.

    JAX itself only warns, and would train a hundred times slower on the CPU.
    """
    gpus = sorted(GPUS.iterdir()) if GPUS.is_dir() else []
    platforms = getattr(jax.config, "jax_platforms", None) or ""
    # An explicit JAX_PLATFORMS=cpu means that the user wants it.
    cpu_requested = "cpu" in platforms
    if gpus and jax.default_backend() == "cpu" and not cpu_requested:
        raise ConfigError(
            f"this machine has {len(gpus)} NVIDIA GPUs, but JAX would run on the CPU: "
            "install jax[cuda13] and read its warnings, or set JAX_PLATFORMS=cpu"
        )


def leaf_path(path: tuple[Any, ...]) -> str:
    """A pytree path as a string such as `params/blocks/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matching_rule(path: str) -> tuple[str, P]:
    """The (pattern, layout) of `LAYOUTS` for a leaf. Raises ValueError if none matches."""
    for pattern, spec in LAYOUTS:
        if re.search(f"{pattern}$", path):
            return pattern, spec
    raise ValueError(
        f"no layout for the leaf {path!r}: add a rule to instructax.sharding.LAYOUTS"
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree of NamedShardings for a tree of arrays or shapes.

    Raises:
      ValueError: no rule matches a leaf.
      ConfigError: the shape of a leaf is not divisible by its mesh axes.
    """

    def sharding_of(path, leaf) -> NamedSharding:
        name = leaf_path(path)
        _, spec = matching_rule(name)
        # A spec may be shorter than the shape: the remaining axes are replicated.
        for size, axes in zip(leaf.shape, spec, strict=False):
            if axes is None:
                continue
            num_shards = math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes))
            if size % num_shards:
                raise ConfigError(
                    f"{name} {leaf.shape}: {size} does not divide by mesh axes {axes} = "
                    f"{num_shards}: change model or mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: the leading axis sharded over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of an array that every device holds in full."""
    return NamedSharding(mesh, P())


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards that batch rows are split into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Builds global arrays [B, ...] from the rows that this process has read."""
    sharding = row_sharding(mesh)

    def to_global(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(to_global, tree)


def constrain_rows(tree: Any, mesh: Mesh, *, axis: int = 0) -> Any:
    """Inside jit: keeps the axis `axis` of every array sharded as batch rows are."""
    # None for every axis before the rows.
    spec = P(*(None,) * axis, ROW_AXES)
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


def shard_map_attention(
    function: Callable[..., Any], mesh: Mesh | None
) -> Callable[..., Any]:
    """Runs an attention kernel on each device's own rows and heads.

    Args:
      function: maps query, key, value [B, H, T, d] and segments [B, T] to [B, H, T, d];
        must not mix rows or heads.
      mesh: None means a single device.
    """
    if mesh is None:
        return function
    rows_and_heads = P(ROW_AXES, "tensor")
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(rows_and_heads, rows_and_heads, rows_and_heads, P(ROW_AXES)),
        out_specs=rows_and_heads,
        # Pallas kernels do not declare which axes their outputs vary over.
        check_vma=False,
    )


def abstract_arrays(tree: Any, mesh: Mesh) -> Any:
    """`tree` as ShapeDtypeStructs with shardings: the target of a checkpoint restore."""

    def abstract(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, tree, shardings(tree, mesh))
