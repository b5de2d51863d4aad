"""The device mesh and the one table of layouts; the only file that names mesh axes.

Axes: `data` (copies of the parameters), `fsdp` (parameters and optimizer state in pieces,
gathered when used) and `tensor` (matrices in pieces, activations exchanged). Batch rows are
split over `data` and `fsdp`. Under `jax.jit` with these shardings the compiler writes the
communication; `pjit` is today this very function.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# First match wins, against the end of a leaf's path: optimizer moments and averages follow
# their parameters. The leading axis of everything under `blocks` is the layer.
LAYOUTS: tuple[tuple[str, P], ...] = (
    (
        r"attention/(query|key|value)/kernel",
        P(None, "fsdp", "tensor", None),
    ),  # [L, D, H, d]
    (r"attention/(query|key|value)/bias", P(None, "tensor", None)),  # [L, H, d]
    (r"attention/out/kernel", P(None, "tensor", None, "fsdp")),  # [L, H, d, D]
    (r"mlp/(up|gate)/kernel", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"mlp/(up|gate)/bias", P(None, "tensor")),  # [L, F]
    (r"mlp/down/kernel", P(None, "tensor", "fsdp")),  # [L, F, D]
    (r"(out|down)/bias", P()),  # [L, D]
    (r"(query|key|value|up|gate)/lora_a", P(None, "fsdp", None)),  # [L, D, r]
    (
        r"(query|key|value|up|gate)/lora_b",
        P(None, None, "tensor"),
    ),  # [L, r, H, d] or [L, r, F]
    (r"(out|down)/lora_a", P(None, "tensor")),  # [L, H, d, r] or [L, F, r]
    (r"(out|down)/lora_b", P(None, None, "fsdp")),  # [L, r, D]
    (r"lora_scale", P()),  # [L]
    (r"norm/(scale|bias)", P()),  # [L, D] or [D]
    # The width is split, not the vocabulary: 257 and 50257 words divide by nothing.
    (r"(params|mu|nu|ema|^)/?embedding", P(None, ("tensor", "fsdp"))),  # [V, D]
    (r"(params|mu|nu|ema|^)/?positions", P(None, ("tensor", "fsdp"))),  # [T, D]
    (r"scalar_head/kernel", P()),  # [D]
    (r"scalar_head/bias", P()),  # []
    (r"(params|mu|nu|ema|^)/?head/kernel", P(None, ("tensor", "fsdp"))),  # [V, D]
    (r"(step|count)", P()),  # []
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; `data = -1` takes all that the others leave."""

    data: int
    fsdp: int
    tensor: int


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all, if None). Raises ValueError when the sizes do not
    multiply to their number, or when all devices are processors while the machine has GPUs.
    """
    if devices is None:
        _refuse_idle_gpus()
        devices = jax.devices()
    fixed = config.fsdp * config.tensor
    data = len(devices) // fixed if config.data == -1 and fixed > 0 else config.data
    if min(data, config.fsdp, config.tensor) < 1 or data * fixed != len(devices):
        raise ValueError(
            f"mesh.data × mesh.fsdp × mesh.tensor = {config.data} × {config.fsdp} × {config.tensor} must equal the "
            f"number of devices, {len(devices)}"
        )
    # Explicit axes, the default of make_mesh, would ask the model to state every layout.
    return jax.make_mesh(
        (data, config.fsdp, config.tensor),
        AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def _refuse_idle_gpus() -> None:
    """JAX only warns where it finds GPUs that it cannot use, and would go on a hundred
    times as slow."""
    gpus = sorted(GPUS.iterdir()) if GPUS.is_dir() else []
    if (
        gpus
        and jax.default_backend() == "cpu"
        and "cpu" not in (getattr(jax.config, "jax_platforms", None) or "")
    ):
        raise ValueError(
            f"this machine has {len(gpus)} NVIDIA GPUs, but JAX would compute on the processor: install "
            "jax[cuda13] and look at what it warns of, or set JAX_PLATFORMS=cpu"
        )


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as `params/blocks/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def rule_of(name: str) -> tuple[str, P]:
    """The table's (pattern, layout) for a leaf. Raises ValueError if no rule matches."""
    for pattern, spec in LAYOUTS:
        if re.search(f"{pattern}$", name):
            return pattern, spec
    raise ValueError(
        f"no layout for the leaf {name!r}: add a rule to instructax.sharding.LAYOUTS"
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree of NamedShardings for a tree of arrays or shapes.

    Raises ValueError, with the leaf's path, if no rule matches it or its shape does not
    divide by the mesh.
    """

    def sharding_of(path, leaf) -> NamedSharding:
        name = path_name(path)
        spec = rule_of(name)[1]
        for size, axes in zip(leaf.shape, spec, strict=False):
            ways = (
                int(np.prod([mesh.shape[axis] for axis in np.atleast_1d(axes)]))
                if axes is not None
                else 1
            )
            if size % ways:
                raise ValueError(
                    f"{name} {leaf.shape}: {size} does not divide by mesh axes {axes} = {ways}: change model or mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def unused_rules(trees: Any) -> list[str]:
    """Patterns of the table that are the first match of no leaf of `trees`; a rule nothing
    uses is a mistake."""
    used = {
        rule_of(path_name(path))[0]
        for path, _ in jax.tree_util.tree_leaves_with_path(trees)
    }
    return [pattern for pattern, _ in LAYOUTS if pattern not in used]


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Batch rows, the leading axis, over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def row_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many pieces batch rows are split."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Global arrays, split by rows, from the rows that this process has read."""
    sharding = row_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def constrain_rows(tree: Any, mesh: Mesh, *, axis: int = 0) -> Any:
    """Inside jit: keeps axis `axis` of every array split as batch rows are."""
    spec = P(*(None,) * axis, ROWS)
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)), tree
    )


def by_rows_and_heads(
    function: Callable[..., Any], mesh: Mesh | None
) -> Callable[..., Any]:
    """`function` of query, key and value [B, heads, T, d] and segments [B, T] on each
    device's own rows and heads, which it must not mix. Without a mesh there is one device.
    """
    if mesh is None:
        return function
    own = P(ROWS, "tensor")
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(own, own, own, P(ROWS)),
        out_specs=own,
        check_vma=False,
    )


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and layouts of `tree`, without data: what a checkpoint is restored
    into."""
    layouts = shardings(tree, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layouts
    )
