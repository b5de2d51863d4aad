"""A Hugging Face folder: `config.json` and tensors in `model.safetensors`, or in shards
with an index.

Nothing in a folder is code, and no name in it leads out of it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the dtype bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from instructax.config import ConfigError, require

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = (
    "*.safetensors",
    "*.json",
    "merges.txt",
    "vocab.bpe",
    "*.jinja",
    "*.gguf",
)  # what is taken from the hub
FLOATS = ("F32", "F16", "BF16")


def located(source: str) -> Path:
    """The folder or GGUF file `source`, or the local copy of the repository of that name on
    the Hugging Face hub.

    Raises ValueError if it is neither, or cannot be had.
    """
    path = Path(source)
    if path.exists():
        return path
    named = (
        source.count("/") <= 1
        and not source.startswith((".", "/", "~"))
        and not source.endswith(".gguf")
    )
    require(
        named,
        f"no folder or file {source!r}: give one with config.json and safetensors, or a .gguf file",
    )
    advice = "download it elsewhere and give its folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"no folder {source!r}, and huggingface_hub is not installed: install it, or {advice}"
        ) from None
    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except Exception as error:  # no network, no such repository, no access: many classes, of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"no folder {source!r}, and the Hugging Face hub gives none ({reason}): {advice}"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} has no {path.name}: give the folder of a model"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from None
    require(isinstance(found, dict), f"{path} does not hold an object")
    return found


def open_tensors(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Tensor's name → a function that reads it, float32, float16 or bfloat16.

    Raises ValueError for files that are missing, damaged, or not those that the index
    names.
    """
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        require(
            isinstance(places, dict) and bool(places), f"{folder / INDEX} has no weight_map"
        )
    else:
        require(
            (folder / ONE).exists(),
            f"{folder} has neither {ONE} nor {INDEX}: save the model as safetensors",
        )
        places = None
    names = (
        sorted({_plain_name(folder, file) for file in places.values()}) if places else [ONE]
    )
    shards = {name: _open(folder / name) for name in names}
    held = {tensor: name for name, shard in shards.items() for tensor in shard.keys()}  # noqa: SIM118 (no mapping)
    for tensor, name in (places or {}).items():
        require(
            held.get(tensor) == name,
            f"{folder / INDEX} says that {name} holds {tensor!r}, but it does not",
        )
    return {
        tensor: _reader(shards[name], tensor, folder / name)
        for tensor, name in held.items()
    }


def _plain_name(folder: Path, name: Any) -> str:
    plain = (
        isinstance(name, str)
        and name == Path(name).name
        and "\\" not in name
        and name.endswith(".safetensors")
    )
    require(
        plain,
        f"{folder / INDEX} names the file {name!r}: shards must be .safetensors files of the same folder",
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
        dtype = shard.get_slice(tensor).get_dtype()
        require(
            dtype in FLOATS,
            f"{path}: {tensor!r} is of dtype {dtype}; only {', '.join(FLOATS)} are read",
        )
        return shard.get_tensor(tensor)

    return read


Tensors = Mapping[str, Callable[[], np.ndarray]]
