"""The manifest of a run: `workdir/manifest.json` names its stage, config, model and head,
tokenizer, data, parents and library versions.

Reading a workdir needs its manifest alone, never the code of its stage. Parents are the
runs whose parameters this one started from, so the manifests of a chain of stages lead back
to its first data. A manifest has nothing about time or progress, so a resumed run writes
the same bytes.

Workdirs of earlier versions are read through the rename tables further down. A reader of
current workdirs may skip that part.
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

# Libraries whose versions a manifest records: they can change numbers.
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Entries that every manifest has.
MANIFEST_FIELDS = (
    "stage",
    "config",
    "model",
    "head",
    "tokenizer",
    "data",
    "parents",
    "versions",
)


def write_manifest(
    workdir: Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    head: str | None,
    tokenizer_hash: str,
    tokenizer_path: str,
    data_hashes: Mapping[str, str],
    parents: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Writes `manifest.json` atomically, on process 0 only.

    Args:
      workdir: folder of the run; created if it does not exist.
      stage: name of the stage.
      config: the whole config of the run, nested.
      model: fields of the ModelConfig of the saved network.
      head: head of the saved network, "tokens" or "scalar"; None if the run saves none.
      tokenizer_hash: hash of the tokenizer; later stages compare it with their own.
      tokenizer_path: where the tokenizer came from, for human readers.
      data_hashes: name of a data set -> its hash.
      parents: config field that names a parent -> its workdir, stage, step and hashes;
        {} if there is none.

    Returns:
      The content of the manifest.
    """
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    # As JSON stores it, and without anything that looks like a secret.
    manifest = to_jsonable(
        redact(
            {
                "stage": stage,
                "config": config,
                "model": model,
                "head": head,
                "tokenizer": {"hash": tokenizer_hash, "path": tokenizer_path},
                "data": data_hashes,
                "parents": parents,
                "versions": {"instructax": instructax.__version__, **versions},
            }
        )
    )
    # Other processes return the same content without writing it.
    if jax.process_index() == 0:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        write_json(Path(workdir) / "manifest.json", manifest)
    return manifest


def read_manifest(workdir: Path) -> dict[str, Any]:
    """The manifest of the run in `workdir`, in the names of this version.

    Raises ConfigError if the file is absent, unreadable or incomplete.
    """
    path = Path(workdir) / "manifest.json"
    manifest = upgrade_manifest(_load(path))
    missing = [field for field in MANIFEST_FIELDS if field not in manifest]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}: it was not written by this program; "
            "restore a copy of it"
        )
    return manifest


def stored_manifest_hash(workdir: Path) -> str:
    """Hash of the manifest as it is stored, so that it stays the same when a later version
    renames entries."""
    return manifest_hash(_load(Path(workdir) / "manifest.json"))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"no {path}: {path.parent} is not the workdir of a run; run that stage first, "
            "or correct the path"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): restore a copy of it") from None
    # Any other JSON is reported as a manifest without entries.
    return content if isinstance(content, dict) else {}


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest as JSON with sorted keys, 64 hexadecimal digits."""
    # Sorted keys: the order of entries in the file does not matter.
    text = json.dumps(to_jsonable(manifest), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_parent(
    parent: Mapping[str, Any], *, named: str, tokenizer_hash: str, tokenizer_path: str
) -> None:
    """Raises ConfigError if the run with the manifest `parent` has another tokenizer.

    `named` is the config field that names the run, and its value, for the message.
    """
    # By hash: a copy of the same tokenizer under another path is accepted.
    theirs = parent["tokenizer"]
    if theirs["hash"] != tokenizer_hash:
        raise ConfigError(
            f"{named} has the tokenizer {theirs['hash']} of {theirs['path']}, this run has "
            f"{tokenizer_hash} of {tokenizer_path}: token ids would mean other text; set "
            "config.tokenizer to the parent's"
        )


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each value that differs, such as `optimizer.learning_rate: 1e-05
    (stored) != 2e-05 (given)`, sorted by dotted name.

    Compares what JSON keeps, so a tuple equals the list that it is stored as.
    """
    # Values are compared as text, with their types: see `flatten`.
    stored = flatten(to_jsonable(old))
    given = flatten(to_jsonable(new))
    lines = []
    for name in sorted(stored | given):
        before = stored.get(name, "absent")
        after = given.get(name, "absent")
        # No leaf is the text `absent`: a string has quotes here.
        if before != after:
            lines.append(f"{name}: {before} (stored) != {after} (given)")
    return lines


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> repr of the leaf.

    With repr, 1, 1.0 and True differ, as they do in a config. An empty dict is a leaf.
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix: repr(tree)}
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return leaves


# Names of earlier versions. Entries are only ever added, because workdirs outlive the
# version that wrote them. Applying the tables twice changes nothing.

# Fields of a ModelConfig, for policies and reward models.
_MODEL_FIELDS = {
    "layers": "num_layers",
    "width": "embed_dim",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_width": "head_dim",
    "mlp_width": "mlp_dim",
    "qk_norms": "qk_norm",
    "score_width": "query_pre_attn_scalar",
    "attention_cap": "attention_softcap",
    "window": "sliding_window",
    "windowed": "window_layers",
    "scaled_embedding": "scale_embedding",
    "tied_head": "tied_embeddings",
    "logit_cap": "final_logit_softcap",
}
# "mixed" meant float32 activations with bf16 matrix products.
_DTYPES = {"mixed": "bf16_matmul", "bfloat16": "bf16"}

# Group of the config ("" is its top level) -> old field -> new field.
RENAMED_FIELDS: dict[str, dict[str, str]] = {
    "model": _MODEL_FIELDS,
    "reward_model": _MODEL_FIELDS,
    "rotary_scaling": {
        "low_turns": "low_freq_factor",
        "high_turns": "high_freq_factor",
        "original_length": "original_max_length",
    },
    "compute": {
        "decoding": "decoding_dtype",
        "part_rows": "microbatch_rows",
        "part_halvings": "tail_splits",
        "slot_halvings": "compaction_steps",
    },
}
# Metric in logs, summaries and `run.best_metric` -> its new name.
RENAMED_METRICS = {
    "held_out_loss": "validation_loss",
    "held_out_accuracy": "validation_accuracy",
    "held_out_pairs": "validation_pairs",
}
# Group -> field, in its new name -> old value -> new value. `supervised` became two stages.
RENAMED_VALUES: dict[str, dict[str, dict[str, str]]] = {
    "": {
        "stage": {"reward": "reward_model", "tasks": "public_tasks"},
        "old_logprobs": {"scorer": "recomputed", "sampler": "sampled"},
    },
    "compute": {"dtype": _DTYPES, "decoding_dtype": _DTYPES},
    "run": {"best_metric": RENAMED_METRICS},
}
# Stage -> field that earlier versions lacked -> what they did.
ADDED_FIELDS = {"ppo": {"no_eos_rule": "subtract"}}
# Group of a pretraining config -> fields that pretraining no longer has.
PRETRAIN_DROPPED = {"": ("lora",), "data": ("demonstrations", "text_fraction", "chat")}
# Head of the network that a run saves, for manifests that do not say it.
EARLIER_HEADS = {
    "pretrain": "tokens",
    "sft": "tokens",
    "ppo": "tokens",
    "pretrained": "tokens",
    "reward_model": "scalar",
}


def upgrade_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` in the names of this version, which may already be its names."""
    upgraded = dict(manifest)
    config = upgrade_config(_group(upgraded.get("config")))
    if "config" in upgraded:
        upgraded["config"] = config
    if "model" in upgraded:
        upgraded["model"] = _renamed(_group(upgraded["model"]), "model")
    if "stage" in upgraded:
        # The stage of an old run is named by its config; imported models have another one.
        upgraded["stage"] = config.get("stage", upgraded["stage"])
        upgraded.setdefault("head", EARLIER_HEADS.get(str(upgraded["stage"])))
    return upgraded


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested config of a run, as in `config.json`, in the names of this version."""
    upgraded = _renamed(config, "")
    for name, value in ADDED_FIELDS.get(str(upgraded.get("stage")), {}).items():
        upgraded.setdefault(name, value)
    if upgraded.get("stage") != "supervised":
        return upgraded

    # The stage `supervised` trained on demonstrations, on text, or on both. Pretraining has
    # no LoRA, so runs with adapters are SFT even on text alone.
    data = _group(upgraded.get("data"))
    lora = _group(upgraded.get("lora"))
    if data.get("demonstrations") or lora.get("rank"):
        upgraded["stage"] = "sft"
        return upgraded
    upgraded["stage"] = "pretrain"
    for name in PRETRAIN_DROPPED[""]:
        upgraded.pop(name, None)
    if "data" in upgraded:
        kept = {k: v for k, v in data.items() if k not in PRETRAIN_DROPPED["data"]}
        upgraded["data"] = kept
    return upgraded


def upgrade_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `metrics.jsonl` or a `summary.json`, in the names of this version."""
    return {RENAMED_METRICS.get(name, name): value for name, value in metrics.items()}


def _renamed(group: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The group `name` of a config and all groups inside it, in the new names."""
    fields = RENAMED_FIELDS.get(name, {})
    values = RENAMED_VALUES.get(name, {})
    upgraded: dict[str, Any] = {}
    for key, value in group.items():
        # Values are renamed by the new name of their field; groups by their own name.
        field = fields.get(key, key)
        if isinstance(value, Mapping):
            upgraded[field] = _renamed(value, key)
        elif isinstance(value, str):
            upgraded[field] = values.get(field, {}).get(value, value)
        else:
            upgraded[field] = value
    return upgraded


def _group(value: Any) -> Mapping[str, Any]:
    """`value` if it is a group of values, else an empty one: files may hold anything."""
    return value if isinstance(value, Mapping) else {}
