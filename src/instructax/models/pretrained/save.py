"""Our parameters as a Hugging Face folder that transformers loads: the way back of
`reading`, by the same table."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from instructax.models import ModelConfig
from instructax.models.pretrained.hf_folder import INDEX, ONE
from instructax.models.pretrained.load import Place, leaf_name, places_of
from instructax.models.pretrained.weight_maps import shape_of, tensor_of
from instructax.sharding import leaf_path
from instructax.types import Params

SHARD_BYTES = 2 << 30  # of one file of tensors
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def tensors_of(
    params: Params, family: str, config: ModelConfig, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of the family's file, one at a time, rounded to `dtype`."""
    leaves = {
        leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name, place in places_of(family, config, leaves).items():
        layered = place.layer is not None
        ours = [leaves[leaf_name(leaf, layered)] for leaf in place.row.leaves]
        parts = [
            np.asarray(leaf[place.layer] if layered else leaf) - np.float32(place.row.plus)
            for leaf in ours
        ]
        yield name, tensor_of(parts, place.row, config).astype(DTYPES[dtype])


def bytes_of(place: Place, config: ModelConfig, dtype: str) -> int:
    """Size of one tensor in a file."""
    return int(np.prod(shape_of(place.row, config))) * DTYPES[dtype].itemsize


def save_tensors(
    folder: Path, params: Params, family: str, config: ModelConfig, dtype: str
) -> None:
    """Writes `model.safetensors`, or shards of about `SHARD_BYTES` and their index, into
    `folder`."""
    leaves = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    shards: list[list[str]] = [[]]
    room, total = SHARD_BYTES, 0
    for name, place in places_of(family, config, leaves).items():
        size = bytes_of(place, config, dtype)
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room, total = room - size, total + size
    count = len(shards)
    files = (
        [ONE]
        if count == 1
        else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    tensors = tensors_of(params, family, config, dtype)
    for file, names in zip(files, shards, strict=True):
        save_file(
            {name: tensor for name, (_, tensor) in zip(names, tensors, strict=False)},
            folder / file,
            {"format": "pt"},
        )
    if count > 1:
        places = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        write_json(
            folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places}
        )


def write_json(path: Path, value: Any) -> None:
    """JSON as transformers writes it."""
    path.write_text(
        json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
