"""Hugging Face model folders: `config.json`, and tensors in `model.safetensors` or in
shards with an index.

Nothing in a folder is executed, and no file name in it may point outside it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers NumPy's dtype bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from instructax.config import ConfigError, require

# Name of a tensor → a function that reads it.
Tensors = Mapping[str, Callable[[], np.ndarray]]

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What is downloaded from the hub.
DOWNLOADED_FILES = (
    "*.safetensors",
    "*.json",
    "merges.txt",
    "vocab.bpe",
    "*.jinja",
    "*.gguf",
)
# safetensors' names of the dtypes that are read.
FLOAT_DTYPES = ("F32", "F16", "BF16")


def locate_model(source: str) -> Path:
    """The local path of a model, downloaded from the Hugging Face hub if necessary.

    Args:
      source: a folder, a GGUF file, or the name of a repository on the hub.

    Raises:
      ConfigError: `source` is none of these, or the hub does not provide it.
    """
    path = Path(source)
    if path.exists():
        return path
    # "name" or "organization/name"; anything else looks like a path.
    may_be_repository = (
        source.count("/") <= 1
        and not source.startswith((".", "/", "~"))
        and not source.endswith(".gguf")
    )
    require(
        may_be_repository,
        f"no folder or file {source!r}: give one with config.json and safetensors, or a "
        ".gguf file",
    )
    advice = "download it elsewhere and give its folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"no folder {source!r}, and huggingface_hub is not installed: install it, or "
            f"{advice}"
        ) from None
    try:
        return Path(snapshot_download(source, allow_patterns=list(DOWNLOADED_FILES)))
    except Exception as error:
        # No network, no such repository or no access: many classes of several libraries.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"no folder {source!r}, and the Hugging Face hub gives none ({reason}): "
            f"{advice}"
        ) from None


def read_hf_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} has no {path.name}: give the folder of a model"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from None
    require(isinstance(content, dict), f"{path} does not hold an object")
    return content


def open_tensors(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """All tensors of a folder; reading gives float32, float16 or bfloat16.

    Raises ConfigError for files that are missing, damaged, or not those of the index.
    """
    indexed: dict[str, Any] = {}  # tensor → file
    # An index takes precedence over a single file.
    if (folder / INDEX).exists():
        weight_map = read_hf_json(folder / INDEX).get("weight_map")
        require(
            isinstance(weight_map, dict) and bool(weight_map),
            f"{folder / INDEX} has no weight_map",
        )
        indexed = dict(weight_map or {})
        names = sorted({_check_name(folder, name) for name in indexed.values()})
    else:
        require(
            (folder / SINGLE_FILE).exists(),
            f"{folder} has neither {SINGLE_FILE} nor {INDEX}: save the model as "
            "safetensors",
        )
        names = [SINGLE_FILE]

    readers: dict[str, Callable[[], np.ndarray]] = {}
    stored: dict[str, str] = {}  # tensor → file
    for name in names:
        # Opening reads the header only; tensors are read when their function is called.
        shard = _open(folder / name)
        for tensor in shard.keys():  # noqa: SIM118 (not a mapping)
            stored[tensor] = name
            readers[tensor] = _reader(shard, tensor, folder / name)
    # The index must agree with the files, or tensors would be missing later.
    for tensor, name in indexed.items():
        require(
            stored.get(tensor) == name,
            f"{folder / INDEX} says that {name} holds {tensor!r}, but it does not",
        )
    return readers


def _check_name(folder: Path, name: Any) -> str:
    """The name of a shard, if it is a plain file name in `folder`."""
    # No path separators: a shard must not be read from elsewhere.
    plain = (
        isinstance(name, str)
        and name == Path(name).name
        and "\\" not in name
        and name.endswith(".safetensors")
    )
    require(
        plain,
        f"{folder / INDEX} names the file {name!r}: shards must be .safetensors files of "
        "the same folder",
    )
    require(
        (folder / name).is_file(),
        f"{folder} lacks {name}, which {INDEX} names: download it again",
    )
    return name


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is damaged or no safetensors file ({error}): download it again"
        ) from None


def _reader(shard: Any, tensor: str, path: Path) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        # From the header. Quantized and integer tensors need other code.
        dtype = shard.get_slice(tensor).get_dtype()
        require(
            dtype in FLOAT_DTYPES,
            f"{path}: {tensor!r} is of dtype {dtype}; only {', '.join(FLOAT_DTYPES)} are "
            "read",
        )
        return shard.get_tensor(tensor)

    return read
