"""Imports pretrained models as runs and exports runs as pretrained models, for
`scripts/import_hf.py` and `scripts/export_hf.py`.

An import is a finished run of the stage "pretrained", with a checkpoint, a manifest and a
tokenizer, so every stage accepts it as a parent. It takes the place of the paper's GPT-3
(section 3.5). An export is a folder that transformers loads.
"""

import dataclasses
import hashlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax import sharding
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.checkpoints.manifest import write_manifest
from instructax.checkpoints.parents import Head, Parent, is_finished, open_parent
from instructax.config import construct, require
from instructax.data.tokenizer import Tokenizer, load_tokenizer, pad_vocab, save_tokenizer
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.init import abstract_params
from instructax.models.logprobs import compute_logits
from instructax.models.pretrained import hf_configs, hf_folder, load, save
from instructax.models.pretrained.gguf_file import GgufFile
from instructax.models.transformer import Transformer, head_kernel, parameter_count
from instructax.runtime.files import write_json
from instructax.runtime.workdir_lock import lock_workdir
from instructax.sharding import MeshConfig
from instructax.stages.pretrained_files import (
    SCORE_BIAS,
    class_config,
    write_readme,
    write_tokenizer,
)
from instructax.training.workdir import claim_workdir
from instructax.types import Params, TrainState

# Files of the source that an import keeps. Chat prompts need the template, which may be in
# either of two files; the others are kept for people.
KEPT_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# The folder in the workdir of an import that holds them.
KEPT_FOLDER = "source"
# Models are only loaded and compared here, never trained, so speed does not matter.
COMPUTE = ComputeConfig(
    dtype="float32",
    decoding_dtype="float32",
    attention="jax",
    remat="none",
    head_chunk=16,
    microbatch_rows=1,
    tail_splits=0,
    slots=1,
    compaction_steps=0,
)
# Largest difference of float32 logits after a round trip, absolute and relative.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A model that has been located and read, except for its tensors."""

    # A folder, or a GGUF file.
    path: Path
    # Model family, such as "llama".
    family: str
    config: ModelConfig
    # Readers of the tensors, by name; nothing is in memory yet.
    tensors: hf_folder.Tensors
    tokenizer: Tokenizer
    # Name → content.
    kept_files: dict[str, bytes]


def import_model(source: str, workdir: Path, *, fsdp: int, tensor: int) -> str:
    """Imports a pretrained model as a finished run, with float32 parameters.

    Args:
      source: a folder, a GGUF file, or the name of a repository on the Hugging Face hub.
      workdir: the folder of the run.
      fsdp, tensor: mesh axes that the parameters are sharded over while importing.

    Returns:
      One line that describes the run.

    Raises:
      ConfigError: our network cannot express the model, or `workdir` holds another run.
    """
    # What identifies the run: another source needs another workdir.
    run_config = {"stage": "pretrained", "source": source}
    if is_finished(workdir):
        claim_workdir(workdir, run_config)
        return f"{workdir} is finished; nothing to do"
    # Read everything before the workdir is touched: a refused model leaves no trace.
    model = _open_model(source)
    mesh = sharding.make_mesh(
        MeshConfig(data=1, fsdp=fsdp, tensor=tensor), devices=jax.devices()[: fsdp * tensor]
    )
    # Tensors go directly into their shards: one device may be too small for the model.
    abstract = abstract_params(Transformer(model.config, COMPUTE, "tokens"), mesh)
    params = load.read_params(
        model.tensors, model.family, model.config, abstract, source=model.path
    )
    count = parameter_count(params)
    with lock_workdir(workdir):
        claim_workdir(workdir, run_config)
        _write_run(workdir, run_config, model, params)
        # The summary marks the run as finished, so it is written last.
        summary = {**run_config, "family": model.family, "parameters": count}
        write_json(workdir / "summary.json", summary)
    return (
        f"{workdir}: {model.family}, {count:,} parameters, {model.tokenizer.size} token ids"
    )


def _write_run(
    workdir: Path, run_config: dict[str, Any], model: PretrainedModel, params: Params
) -> None:
    """Writes everything that later stages read: checkpoint, tokenizer, kept files and
    manifest."""
    checkpoints = Checkpoints(
        workdir,
        save_every=1,
        keep=1,
        best_metric="",
        best_mode="max",
        exported="params",
    )
    # Step 0 without an optimizer: this run is never resumed, only read.
    checkpoints.save(0, TrainState(step=jnp.int32(0), params=params, opt_state=()), {})
    checkpoints.close()

    save_tokenizer(model.tokenizer, str(workdir / "tokenizer.json"))
    for name, content in model.kept_files.items():
        (workdir / KEPT_FOLDER).mkdir(exist_ok=True)
        (workdir / KEPT_FOLDER / name).write_bytes(content)
    write_manifest(
        workdir,
        stage="pretrained",
        config=run_config,
        model=dataclasses.asdict(model.config),
        head="tokens",
        tokenizer_hash=model.tokenizer.hash,
        tokenizer_path=str(model.path),
        data_hashes=_file_hashes(model.path),
        parents={},
    )


def _open_model(source: str) -> PretrainedModel:
    """Locates the model, downloads it if need be, and reads all but its tensors."""
    path = hf_folder.locate_model(source)
    # A GGUF file's tokenizer is converted into a temporary folder.
    with tempfile.TemporaryDirectory() as scratch:
        if path.is_file():
            file = GgufFile(path)
            raw = file.config()
            tensors = file.tensors()
            folder = Path(scratch)
            file.write_tokenizer(folder)
        else:
            raw = hf_folder.read_hf_json(path / "config.json")
            tensors = hf_folder.open_tensors(path)
            folder = path
        # Refuses architectures that the network cannot express.
        family, config = hf_configs.read_config(raw)
        tokenizer = _load_tokenizer(folder, config)
        kept_files = {}
        for name in KEPT_FILES:
            if (folder / name).is_file():
                kept_files[name] = (folder / name).read_bytes()
    return PretrainedModel(
        path=path,
        family=family,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        kept_files=kept_files,
    )


def _load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in a model's folder, padded to the size of the embedding table."""
    tokenizer = load_tokenizer(str(folder))
    require(
        tokenizer.size <= config.vocab_size,
        f"the tokenizer in {folder} has {tokenizer.size} ids, config.json says "
        f"vocab_size = {config.vocab_size}: they do not belong together",
    )
    return pad_vocab(tokenizer, config.vocab_size)


def _file_hashes(path: Path) -> dict[str, str]:
    """sha256 of the files that parameters and architecture come from."""
    # Sorted, so that the manifest has the same bytes on every file system.
    files = [path]
    if not path.is_file():
        files = sorted((*path.glob("*.safetensors"), path / "config.json"))
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def export_run(checkpoint: str, to: Path, *, dtype: str, verify: bool) -> str:
    """Exports a finished run to a folder that transformers loads.

    A policy is exported for AutoModelForCausalLM, a reward model for
    AutoModelForSequenceClassification with one label.

    Args:
      checkpoint: WORKDIR, WORKDIR@STEP or WORKDIR@best.
      to: the folder to write; must be empty or absent.
      dtype: of the tensors, "float32" or "bfloat16".
      verify: read the folder again and compare its logits or scores with the run's.

    Returns:
      Lines that describe the export.

    Raises:
      ConfigError: no family of transformers expresses the model, `to` is not empty, or the
        comparison fails.
    """
    require(
        not to.exists() or (to.is_dir() and not any(to.iterdir())),
        f"--to={to} is not empty: take another folder",
    )
    run = open_parent(checkpoint, "--checkpoint")
    head: Head = run.manifest["head"]
    config = construct(ModelConfig, run.manifest["model"], "model")
    # The family whose classes compute the same function, and its config.json.
    family, raw = hf_configs.write_config(config)
    tokenizer = load_tokenizer(str(run.workdir / "tokenizer.json"))
    model = Transformer(config, COMPUTE, head)
    params = run.load(abstract_params(model, sharding.one_device_mesh()))

    raw |= class_config(family, head, tokenizer)
    # Old versions of transformers read the second name.
    raw |= {"dtype": dtype, "torch_dtype": dtype}
    exported = params
    if head == "scalar":
        exported = fold_score_bias(params, config)
        bias = float(exported["scalar_head"]["bias"])
        if bias:  # no norm could absorb it: readers of the scores must add it
            raw[SCORE_BIAS] = bias
    to.mkdir(parents=True, exist_ok=True)
    save.save_tensors(to, exported, family, config, dtype)
    _write_texts(to, run, tokenizer, config, raw)

    lines = [f"{to}: {raw['architectures'][0]}, {dtype}"]
    if verify:
        # Against the parameters before the bias was folded: the fold is checked as well.
        lines.append(verify_export(to, model, params, dtype))
    return "\n".join(lines)


def _write_texts(
    to: Path, run: Parent, tokenizer: Tokenizer, config: ModelConfig, raw: dict[str, Any]
) -> None:
    """Writes everything but the tensors of an export; `raw` is its config.json."""
    write_tokenizer(to, tokenizer, config, raw, run.workdir / KEPT_FOLDER)
    generation = {name: raw[name] for name in ("bos_token_id", "eos_token_id")}
    save.write_hf_json(to / "generation_config.json", generation)
    write_readme(to, run.manifest, run.manifest["head"], raw)
    # Last, so that a folder with a config is complete.
    save.write_hf_json(to / "config.json", raw)


def fold_score_bias(params: Params, config: ModelConfig) -> Params:
    """Moves the bias b of the scalar head into the bias of the final layer norm, because
    the classes of transformers have none: w · (h + w b / (w · w)) = w · h + b.

    An RMS norm has no bias either; in that case the parameters are unchanged.
    """
    if config.norm != "layernorm":
        return params
    head = params["scalar_head"]
    norm = params["final_norm"]
    # f32[D]; the small constant avoids 0 / 0 for a kernel of zeros.
    shift = head["kernel"] * head["bias"] / jnp.maximum(jnp.sum(head["kernel"] ** 2), 1e-30)
    return {
        **params,
        "final_norm": {**norm, "bias": norm["bias"] + shift},
        "scalar_head": {**head, "bias": jnp.zeros_like(head["bias"])},
    }


@partial(jax.jit, static_argnums=0)
def _outputs(model: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
    """Logits f32[B, T, V], or a reward model's outputs f32[B, T]; a row is one segment."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden: Any
    hidden, _ = model.apply({"params": params}, tokens, jnp.ones_like(tokens), positions)
    if model.head == "scalar":
        return hidden
    kernel = head_kernel(model.config, params)
    return compute_logits(hidden, kernel, model.config.final_logit_softcap)


def verify_export(path: Path, model: Transformer, params: Params, dtype: str) -> str:
    """Compares the logits, or scores, of an exported folder with those of its run.

    Args:
      path: the exported folder.
      model, params: the run's network.
      dtype: of the exported tensors. Only float32 is required to be within TOLERANCE.

    Returns:
      A line with the largest difference.
    """
    raw = hf_folder.read_hf_json(path / "config.json")
    family, config = hf_configs.read_config(raw)
    abstract = abstract_params(model, sharding.one_device_mesh())
    read = load.read_params(
        hf_folder.open_tensors(path), family, config, abstract, source=path
    )
    if model.head == "scalar":
        bias = jnp.float32(raw.get(SCORE_BIAS, 0.0))
        read = {**read, "scalar_head": {**read["scalar_head"], "bias": bias}}

    # i32[2, T], two short random sequences.
    rng = np.random.default_rng(0)
    length = min(16, config.max_length)
    tokens = jnp.asarray(rng.integers(config.vocab_size, size=(2, length)), jnp.int32)

    ours = np.asarray(_outputs(model, params, tokens))
    theirs = np.asarray(_outputs(model, read, tokens))
    kind = "scores" if model.head == "scalar" else "logits"
    # bf16 tensors are rounded, so only the difference is reported for them.
    worst = float(np.abs(ours - theirs).max())
    close = bool(np.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE))
    require(
        dtype != "float32" or close,
        f"{path} gives other {kind} than the run: they differ by up to {worst:.2g}; delete "
        "it",
    )
    return f"read again: {kind} differ by at most {worst:.2g}"
