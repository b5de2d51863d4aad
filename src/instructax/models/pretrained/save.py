"""Saves our parameters as a Hugging Face folder that transformers loads, by the same tables
that `load` reads."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from instructax.models.config import ModelConfig
from instructax.models.pretrained.hf_folder import INDEX, SINGLE_FILE
from instructax.models.pretrained.load import TensorTarget, expected_tensors, parameter_path
from instructax.models.pretrained.weight_maps import join_tensor, tensor_shape
from instructax.sharding import leaf_path
from instructax.types import Params

# Size of one file of tensors, approximately.
SHARD_BYTES = 2 << 30
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def export_tensors(
    params: Params, family: str, config: ModelConfig, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of the family's file, one at a time, rounded to `dtype`."""
    leaves = {
        leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name, target in expected_tensors(family, config, leaves).items():
        in_layer = target.layer is not None
        parts = []
        # One layer at a time is copied to the host.
        for leaf in target.spec.leaves:
            value = leaves[parameter_path(leaf, in_layer)]
            value = value[target.layer] if in_layer else value
            parts.append(np.asarray(value) - np.float32(target.spec.offset))
        # A generator: the whole model is never on the host in the file's layout.
        yield name, join_tensor(parts, target.spec, config).astype(DTYPES[dtype])


def tensor_bytes(target: TensorTarget, config: ModelConfig, dtype: str) -> int:
    """Size of one tensor in a file."""
    return int(np.prod(tensor_shape(target.spec, config))) * DTYPES[dtype].itemsize


def save_tensors(
    folder: Path, params: Params, family: str, config: ModelConfig, dtype: str
) -> None:
    """Writes `model.safetensors`, or shards of about SHARD_BYTES and their index."""
    leaves = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    targets = expected_tensors(family, config, leaves)

    shards: list[list[str]] = [[]]  # names of the tensors of each file
    # Fill one file after another; a tensor is never split.
    free = SHARD_BYTES
    total = 0
    for name, target in targets.items():
        size = tensor_bytes(target, config, dtype)
        if shards[-1] and size > free:
            shards.append([])
            free = SHARD_BYTES
        shards[-1].append(name)
        free -= size
        total += size

    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = [SINGLE_FILE]
    # Tensors come in the order of `targets`, so each file takes the next ones.
    tensors = export_tensors(params, family, config, dtype)
    weight_map: dict[str, str] = {}
    for file, names in zip(files, shards, strict=True):
        save_file(dict(islice(tensors, len(names))), folder / file, {"format": "pt"})
        # The index names the file of every tensor.
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_hf_json(folder / INDEX, index)


def write_hf_json(path: Path, value: Any) -> None:
    """Writes JSON in transformers' format."""
    # Sorted, so that equal models give equal files.
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
