"""Loads the tensors of a file into our parameters, one at a time, each directly into the
mesh's layout.

Besides the parameters, the host holds one tensor and one chunk of it in our layout.
"""

import dataclasses
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instructax.config import require
from instructax.models.config import ModelConfig
from instructax.models.pretrained.hf_folder import Tensors
from instructax.models.pretrained.weight_maps import (
    PREFIXES,
    TENSORS,
    TensorSpec,
    split_tensor,
    tensor_shape,
)
from instructax.sharding import leaf_path
from instructax.types import Array, Params

# Elements of a tensor that are converted to our layout at one time.
CHUNK_ELEMENTS = 1 << 22
# Buffers that files of older versions of transformers hold beside the parameters.
IGNORED = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
# Names of the output head. With tied embeddings a file may hold a copy of them under one.
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight")
MAX_LISTED = 5  # names in an error


@dataclasses.dataclass(frozen=True)
class TensorTarget:
    """Where one tensor of a file belongs."""

    spec: TensorSpec
    layer: int | None


def parameter_path(leaf: str, in_layer: bool) -> str:
    """The path of a spec's leaf in the parameters."""
    return f"blocks/{leaf}" if in_layer else leaf


def expected_tensors(
    family: str, config: ModelConfig, parameters: Iterable[str]
) -> dict[str, TensorTarget]:
    """Name of every tensor that a file of this model must hold → where it belongs.

    `parameters` are the paths of our parameters.
    """
    # A family's table lists more than one model has, such as biases or an untied head.
    existing = set(parameters)
    targets = {}
    for spec in TENSORS[family]:
        in_layer = "{}" in spec.name
        if any(parameter_path(leaf, in_layer) not in existing for leaf in spec.leaves):
            continue
        for layer in range(config.num_layers) if in_layer else (None,):
            targets[spec.name.format(layer)] = TensorTarget(spec, layer)
    return targets


def match_names(
    family: str, stored: Iterable[str], expected: Iterable[str], source: Path
) -> dict[str, str]:
    """Expected name → its name in the file `source`.

    A file may leave out the trunk's prefix, and newer GPT-NeoX files name the head
    differently. Raises ConfigError with the names of missing or unexpected tensors.
    """
    stored = set(stored)
    names = {}
    missing = []
    for name in expected:
        # In order of preference.
        candidates = [name, name.removeprefix(PREFIXES[family])]
        if name in OUTPUT_HEADS:
            candidates.extend(OUTPUT_HEADS)
        present = [candidate for candidate in candidates if candidate in stored]
        if present:
            names[name] = present[0]
        else:
            missing.append(name)
    require(
        not missing,
        f"{source}: the file of this {family} model lacks {_listed(sorted(missing))}: "
        "download it again",
    )

    unexpected = {name for name in stored - set(names.values()) if not IGNORED.search(name)}
    # With tied embeddings no head is expected, but a copy of the embedding may be stored.
    if not any(name in OUTPUT_HEADS for name in names):
        unexpected -= set(OUTPUT_HEADS)
    require(
        not unexpected,
        f"{source}: the file of this {family} model has tensors that it should not: "
        f"{_listed(sorted(unexpected))}: give a model without them",
    )
    return names


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, names[:MAX_LISTED])) + more


def read_params(
    tensors: Tensors, family: str, config: ModelConfig, abstract: Params, *, source: Path
) -> Params:
    """Reads parameters from a file.

    Args:
      tensors: the tensors of the file.
      family: the family of the file.
      config: its architecture.
      abstract: shapes and shardings of our parameters.
      source: the file or its folder, for error messages.

    Returns:
      The parameters; those that the family's table lacks (the bias of a scalar head) are
      zero.

    Raises:
      ConfigError: a tensor is missing, unexpected, or of another shape or dtype.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    shapes = {leaf_path(path): leaf for path, leaf in paths}
    targets = expected_tensors(family, config, shapes)
    names = match_names(family, tensors, targets, source)
    # All parameters are allocated first, each in its final sharding, and then filled.
    params = {path: _zeros(leaf) for path, leaf in shapes.items()}

    # A function of its own, so that each tensor is freed before the next one is read.
    def load_tensor(name: str, target: TensorTarget) -> None:
        # On the host, in the dtype of the file.
        tensor = tensors[name]()
        wanted = tensor_shape(target.spec, config)
        require(
            tensor.shape == wanted,
            f"{source}: tensor {name!r} is {list(tensor.shape)}, but the model's config "
            f"makes it {list(wanted)}: give tensors and config of the same model",
        )
        # Views of it: a fused tensor gives several parameters.
        parts = split_tensor(tensor, target.spec, config)
        for leaf, part in zip(target.spec.leaves, parts, strict=True):
            path = parameter_path(leaf, target.layer is not None)
            params[path] = write_parameter(
                params[path], part, target.layer, target.spec.offset
            )

    for name, target in targets.items():
        load_tensor(names[name], target)
    return jax.tree.unflatten(structure, params.values())


def _zeros(leaf: Any) -> Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def write_parameter(
    leaf: Array, part: np.ndarray, layer: int | None, offset: float
) -> Array:
    """Writes `part` + `offset` into a parameter, chunk by chunk.

    Args:
      leaf: the parameter; its memory is donated.
      part: the new values: all of the parameter, or one layer of its first axis.
      layer: the layer; None for all of it.
      offset: added to the values.
    """
    # The parameter's own sharding, which the result must have again.
    sharding: Any = leaf.sharding
    # The layout of one layer: the parameter's without the leading layer axis.
    spec = [*sharding.spec, *(None,) * leaf.ndim][: leaf.ndim]
    layout = NamedSharding(sharding.mesh, P(*spec[leaf.ndim - part.ndim :]))

    # Cut chunks along the longest axis that is not sharded; if all are, use one chunk.
    shard_shape = layout.shard_shape(part.shape)
    unsharded = [axis for axis in range(part.ndim) if shard_shape[axis] == part.shape[axis]]
    axis = max(unsharded, key=lambda axis: part.shape[axis], default=0)
    length = part.shape[axis]
    step = max(1, CHUNK_ELEMENTS * length // part.size) if unsharded else length
    for start in range(0, length, step):
        chunk = part[(slice(None),) * axis + (slice(start, start + step),)]

        def shard_of(index: Any, chunk: np.ndarray = chunk) -> np.ndarray:
            return np.ascontiguousarray(chunk[index])

        # Each device gets only its shard of the chunk.
        array = jax.make_array_from_callback(chunk.shape, layout, shard_of)
        leaf = _write(leaf, array, layer or 0, start, axis, offset, sharding)
        # Wait, or the chunks of calls that have not run yet accumulate on the host.
        leaf = jax.block_until_ready(leaf)
    return leaf


@partial(jax.jit, donate_argnums=0, static_argnums=(4, 5, 6))
def _write(
    leaf: Array,
    chunk: Array,
    layer: int,
    start: int,
    axis: int,
    offset: float,
    layout: NamedSharding,
) -> Array:
    chunk = chunk.astype(leaf.dtype)
    # In float32, after the cast.
    if offset:
        chunk = chunk + offset
    has_layers = leaf.ndim - chunk.ndim  # 0 or 1 leading axis of layers
    starts: list[Any] = [0] * leaf.ndim
    starts[has_layers + axis] = start
    if has_layers:
        starts[0] = layer
        chunk = chunk[None]
    leaf = jax.lax.dynamic_update_slice(leaf, chunk, starts)
    return jax.lax.with_sharding_constraint(leaf, layout)
