"""What made a run: `workdir/manifest.json` with its stage, config, model, tokenizer, data,
parents and versions.

Parents are the runs whose parameters this one started from, so the manifests of a chain of
stages lead back to its first data. A manifest holds nothing of the run's own time or
progress: a resumed run writes the same one.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import instructax
from instructax.config import ConfigError
from instructax.runtime.files import to_jsonable, write_json
from instructax.runtime.redaction import redact

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
FIELDS = ("stage", "config", "model", "tokenizer", "data", "parents", "versions")


def write_manifest(
    workdir: Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    tokenizer_hash: str,
    tokenizer_path: str,
    data_hashes: Mapping[str, str],
    parents: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Writes `manifest.json`, atomically and by process 0 alone, and returns what it holds.

    Args:
      config: the whole config of the run, nested.
      model: the fields of its ModelConfig.
      tokenizer_path: where the tokenizer came from, for people; its hash is what is compared.
      data_hashes: name of a data set → its hash.
      parents: field of the config that names a run → its workdir, stage, step and manifest hash; {} for a first stage.
    """
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    manifest = to_jsonable(
        redact(
            {
                "stage": stage,
                "config": config,
                "model": model,
                "tokenizer": {"hash": tokenizer_hash, "path": tokenizer_path},
                "data": data_hashes,
                "parents": parents,
                "versions": {"instructax": instructax.__version__, **versions},
            }
        )
    )
    if jax.process_index() == 0:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        write_json(Path(workdir) / "manifest.json", manifest)
    return manifest


def read_manifest(workdir: Path) -> dict[str, Any]:
    """What `write_manifest` wrote to `workdir`. Raises ValueError if it is absent,
    unreadable or incomplete."""
    path = Path(workdir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"no {path}: {workdir} is not the workdir of a run; run that stage first, or correct it"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): restore a copy of it") from None
    missing = [
        field for field in FIELDS if not isinstance(manifest, dict) or field not in manifest
    ]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}: it was not written by this program; restore a copy of it"
        )
    return manifest


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest as JSON with sorted keys: 64 hexadecimal digits."""
    return hashlib.sha256(
        json.dumps(to_jsonable(manifest), sort_keys=True, allow_nan=False).encode()
    ).hexdigest()


def check_parent(
    parent: Mapping[str, Any], *, tokenizer_hash: str, tokenizer_path: str
) -> None:
    """Raises ValueError if the run with the manifest `parent` has another tokenizer than
    this one."""
    theirs = parent["tokenizer"]
    if theirs["hash"] != tokenizer_hash:
        raise ConfigError(
            f"the parent ({parent['stage']}) has the tokenizer {theirs['hash']} of {theirs['path']}, this run has "
            f"{tokenizer_hash} of {tokenizer_path}: token ids would mean other text; set the tokenizer of the config"
        )


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each value that differs, such as `optimizer.learning_rate: 1e-05
    (stored) != 2e-05 (given)`.

    Compares what JSON keeps, so that a tuple equals the list it is stored as. Lines are
    sorted by dotted name.
    """
    stored, given = flatten(to_jsonable(old)), flatten(to_jsonable(new))
    return [
        f"{name}: {stored.get(name, 'absent')} (stored) != {given.get(name, 'absent')} (given)"
        for name in sorted(stored | given)
        if stored.get(name) != given.get(name)
    ]


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name → repr of the leaf: 1 and 1.0 and True differ, as they do in a config. An
    empty dict is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: repr(tree)}
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return found
