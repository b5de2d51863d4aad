"""Tensors of a file into our parameters, one at a time, each straight to where the mesh
wants it.

On the host there are at one time the tensor that is read and a piece of it in our layout,
besides the parameters.
"""

import dataclasses
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instructax.config import require
from instructax.models import ModelConfig
from instructax.models.pretrained.hf_folder import Tensors
from instructax.models.pretrained.weight_maps import (
    PREFIXES,
    TENSORS,
    Row,
    parts_of,
    shape_of,
)
from instructax.sharding import leaf_path
from instructax.types import Array, Params

PIECE = 1 << 22  # elements of a tensor that are laid out anew at a time
# Buffers that files of older versions of transformers hold besides parameters.
HARMLESS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
HEADS = (
    "lm_head.weight",
    "embed_out.weight",
)  # of a tied head a file may hold the embedding once more
SHOWN = 5  # names in an error


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor of a file belongs."""

    row: Row
    layer: int | None


def leaf_name(leaf: str, layered: bool) -> str:
    """The path of a row's parameter in the tree."""
    return f"blocks/{leaf}" if layered else leaf


def places_of(family: str, config: ModelConfig, leaves: Iterable[str]) -> dict[str, Place]:
    """Every tensor that a file of this model must hold, by name; `leaves` are the paths of
    our parameters."""
    found, have = {}, set(leaves)
    for row in TENSORS[family]:
        layered = "{}" in row.name
        if all(leaf_name(leaf, layered) in have for leaf in row.leaves):
            for layer in range(config.num_layers) if layered else (None,):
                found[row.name.format(layer)] = Place(row, layer)
    return found


def stored_names(
    family: str, stored: Iterable[str], wanted: Iterable[str]
) -> dict[str, str]:
    """Wanted name → the name under which the file has it: its own, that without the trunk's
    prefix, or, of GPT-NeoX's head, the one of newer files. Raises ValueError with the names
    if some are missing or too many."""
    have, prefix, found = set(stored), PREFIXES[family], {}
    for name in wanted:
        others = (name.removeprefix(prefix), *(HEADS if name in HEADS else ()))
        found[name] = next((other for other in (name, *others) if other in have), "")
    missing = sorted(name for name, other in found.items() if not other)
    require(not missing, f"the file of this {family} model lacks {_listed(missing)}")
    spare = {name for name in have - set(found.values()) if not HARMLESS.search(name)}
    unknown = sorted(spare if any(name in HEADS for name in found) else spare - set(HEADS))
    require(
        not unknown,
        f"the file of this {family} model has tensors that it should not: {_listed(unknown)}",
    )
    return found


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def read_params(
    tensors: Tensors, family: str, config: ModelConfig, abstract: Params
) -> Params:
    """The parameters of `abstract` (shapes with shardings) from a file of `family`; what
    its table lacks, the bias of a scalar head, is zero.

    Raises ValueError with the name of a tensor that is missing, unexpected, or of another
    shape or dtype.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    shapes = {leaf_path(path): leaf for path, leaf in paths}
    places = places_of(family, config, shapes)
    names = stored_names(family, tensors, places)
    leaves = {name: _zeros(leaf) for name, leaf in shapes.items()}

    def place_one(
        name: str, place: Place
    ) -> None:  # whose end frees the tensor before the next one is read
        tensor, wanted = tensors[name](), shape_of(place.row, config)
        require(
            tensor.shape == wanted,
            f"tensor {name!r} is {list(tensor.shape)}, but config.json makes it {list(wanted)}",
        )
        for leaf, part in zip(
            place.row.leaves, parts_of(tensor, place.row, config), strict=True
        ):
            path = leaf_name(leaf, place.layer is not None)
            leaves[path] = put(leaves[path], part, place.layer, place.row.plus)

    for name, place in places.items():
        place_one(names[name], place)
    return jax.tree.unflatten(structure, leaves.values())


def _zeros(leaf: Any) -> Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def put(leaf: Array, part: np.ndarray, layer: int | None, plus: float) -> Array:
    """`leaf`, whose memory is taken, with `part` + `plus` in it: all of it, or one of the
    layers of its first axis."""
    of_leaf: Any = leaf.sharding
    spec = [*of_leaf.spec, *(None,) * leaf.ndim][: leaf.ndim]
    layout = NamedSharding(of_leaf.mesh, P(*spec[leaf.ndim - part.ndim :]))
    # Pieces along the longest axis that is on every device whole; of none, the part in one
    # piece.
    whole = [
        axis
        for axis in range(part.ndim)
        if layout.shard_shape(part.shape)[axis] == part.shape[axis]
    ]
    axis = max(whole, key=lambda axis: part.shape[axis], default=0)
    step = max(1, PIECE * part.shape[axis] // part.size) if whole else part.shape[axis]
    for start in range(0, part.shape[axis], step):
        piece = part[(slice(None),) * axis + (slice(start, start + step),)]
        given = jax.make_array_from_callback(
            piece.shape, layout, lambda index, x=piece: np.ascontiguousarray(x[index])
        )
        # Waits, or the pieces of calls that have not run yet would add up.
        leaf = jax.block_until_ready(
            _write(leaf, given, layer or 0, start, axis, plus, of_leaf)
        )
    return leaf


@partial(jax.jit, donate_argnums=0, static_argnums=(4, 5, 6))
def _write(
    leaf: Array,
    piece: Array,
    layer: int,
    start: int,
    axis: int,
    plus: float,
    layout: NamedSharding,
) -> Array:
    piece = piece.astype(leaf.dtype)
    piece = piece + plus if plus else piece
    layered = leaf.ndim - piece.ndim
    starts: list[Any] = [0] * leaf.ndim
    starts[layered + axis] = start
    if layered:
        starts[0] = layer
    leaf = jax.lax.dynamic_update_slice(leaf, piece[None] if layered else piece, starts)
    return jax.lax.with_sharding_constraint(leaf, layout)
