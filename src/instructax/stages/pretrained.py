"""Pretrained models as runs, and runs as pretrained models: what `scripts/import_hf.py` and
`scripts/export_hf.py` type.

An import is a finished run of the stage "pretrained", with a checkpoint, a manifest and a
tokenizer: every stage takes it as a parent. An export is a folder that transformers loads.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import instructax
from instructax import sharding
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.checkpoints.manifest import write_manifest
from instructax.checkpoints.parents import Head, is_finished, open_parent
from instructax.config import construct, require
from instructax.data.tokenizer import Tokenizer, load_tokenizer, pad_vocab, save_tokenizer
from instructax.models import (
    ComputeConfig,
    ModelConfig,
    Transformer,
    head_kernel,
    parameter_count,
)
from instructax.models.init import abstract_params
from instructax.models.logprobs import compute_logits
from instructax.models.pretrained import hf_configs, hf_folder
from instructax.models.pretrained import load as reading
from instructax.models.pretrained import save as writing
from instructax.models.pretrained.gguf_file import GgufFile
from instructax.runtime.files import write_json
from instructax.runtime.workdir_lock import lock_workdir
from instructax.sharding import MeshConfig
from instructax.training.workdir import claim
from instructax.types import Params, TrainState

# Files of a model that are kept beside an import, and go into exports of it: what they say
# is not used here.
KEPT = (
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
ASIDE = "source"  # the folder of an import that holds them
SCORE_BIAS = "instructax_score_bias"  # in config.json, the bias of the scalar head where a norm cannot hold it
# By family: the name of its classes in transformers, and what that of its language model
# ends with.
CLASSES = {
    "gpt2": ("GPT2", "LMHeadModel"),
    "gpt_neox": ("GPTNeoX", "ForCausalLM"),
    "llama": ("Llama", "ForCausalLM"),
    "mistral": ("Mistral", "ForCausalLM"),
    "qwen2": ("Qwen2", "ForCausalLM"),
    "qwen3": ("Qwen3", "ForCausalLM"),
    "gemma": ("Gemma", "ForCausalLM"),
    "gemma2": ("Gemma2", "ForCausalLM"),
}
# Reads and compares; nothing is trained.
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
TOLERANCE = 1e-4  # of logits, absolute and relative, between what was written and what is read again


def import_model(source: str, workdir: Path, *, fsdp: int, tensor: int) -> str:
    """Puts the model at `source`, a folder, a GGUF file or a name on the Hugging Face hub,
    into `workdir` as a finished run, its parameters float32 and in fsdp × tensor pieces on
    the way; returns a line about it.

    Raises ValueError for a model that ours cannot express, or a `workdir` that holds
    another run.
    """
    given = {"stage": "pretrained", "source": source}
    if is_finished(workdir):
        claim(workdir, given)
        return f"{workdir} is finished; nothing to do"
    path = hf_folder.located(source)
    with tempfile.TemporaryDirectory() as scratch:
        if path.is_file():
            file = GgufFile(path)
            raw, tensors, texts = file.config(), file.tensors(), Path(scratch)
            file.write_tokenizer(texts)
        else:
            raw, tensors, texts = (
                hf_folder.read_json(path / "config.json"),
                hf_folder.open_tensors(path),
                path,
            )
        family, config = hf_configs.read_config(raw)
        tokenizer = _tokenizer_of(texts, config)
        kept = {
            name: (texts / name).read_bytes() for name in KEPT if (texts / name).is_file()
        }
    mesh = sharding.make_mesh(
        MeshConfig(data=1, fsdp=fsdp, tensor=tensor), devices=jax.devices()[: fsdp * tensor]
    )
    abstract = abstract_params(Transformer(config, COMPUTE, "tokens"), mesh)
    params = reading.read_params(tensors, family, config, abstract)
    with lock_workdir(workdir):
        claim(workdir, given)
        checkpoints = Checkpoints(
            workdir, save_every=1, keep=1, best_metric="", exported="params"
        )
        checkpoints.save(0, TrainState(step=jnp.int32(0), params=params, opt_state=()), {})
        checkpoints.close()
        save_tokenizer(tokenizer, str(workdir / "tokenizer.json"))
        for name, content in kept.items():
            (workdir / ASIDE).mkdir(exist_ok=True)
            (workdir / ASIDE / name).write_bytes(content)
        write_manifest(
            workdir,
            stage="pretrained",
            config=given,
            model=dataclasses.asdict(config),
            head="tokens",
            tokenizer_hash=tokenizer.hash,
            tokenizer_path=str(path),
            data_hashes=_hashes(path),
            parents={},
        )
        count = parameter_count(params)
        write_json(
            workdir / "summary.json", {**given, "family": family, "parameters": count}
        )
    return f"{workdir}: {family}, {count:,} parameters, {tokenizer.size} token ids"


def _tokenizer_of(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in a model's folder, with as many ids as the model has rows."""
    tokenizer = load_tokenizer(str(path))
    require(
        tokenizer.size <= config.vocab_size,
        f"the tokenizer in {path} has {tokenizer.size} ids, config.json says vocab_size = {config.vocab_size}: they do "
        "not belong together",
    )
    return pad_vocab(tokenizer, config.vocab_size)


def _hashes(path: Path) -> dict[str, str]:
    """sha256 of the files that parameters and architecture come from."""
    found = {}
    for file in (
        [path]
        if path.is_file()
        else sorted((*path.glob("*.safetensors"), path / "config.json"))
    ):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def export_run(checkpoint: str, to: Path, *, dtype: str, verify: bool) -> str:
    """Writes the finished run at `checkpoint` (WORKDIR, WORKDIR@STEP or WORKDIR@best) to
    the folder `to` for transformers; returns lines about it.

    A policy is for AutoModelForCausalLM, a reward model for
    AutoModelForSequenceClassification with one label. `verify` reads the folder again and
    compares logits, or scores, with the run's own.

    Raises ValueError if no family of transformers expresses the model, if `to` is not
    empty, or if `verify` fails.
    """
    require(
        not to.exists() or (to.is_dir() and not any(to.iterdir())),
        f"--to={to} is not empty: take another folder",
    )
    run = open_parent(checkpoint, "--checkpoint")
    head: Head = run.manifest["head"]
    config = construct(ModelConfig, run.manifest["model"], "model")
    family, raw = hf_configs.write_config(config)
    tokenizer = load_tokenizer(str(run.workdir / "tokenizer.json"))
    mesh = sharding.make_mesh(
        MeshConfig(data=1, fsdp=1, tensor=1), devices=jax.devices()[:1]
    )
    model = Transformer(config, COMPUTE, head)
    params = run.load(abstract_params(model, mesh))
    raw |= _of_classes(family, head, tokenizer) | {"dtype": dtype, "torch_dtype": dtype}
    written = params
    if head == "scalar":
        written = folded(params, config)
        if left := float(written["scalar_head"]["bias"]):
            raw[SCORE_BIAS] = left
    to.mkdir(parents=True, exist_ok=True)
    writing.save_tensors(to, written, family, config, dtype)
    _write_tokenizer(to, tokenizer, config, raw, run.workdir / ASIDE)
    writing.write_json(
        to / "generation_config.json", {k: raw[k] for k in ("bos_token_id", "eos_token_id")}
    )
    (to / "README.md").write_text(_readme(run.manifest, head, raw), encoding="utf-8")
    writing.write_json(to / "config.json", raw)
    lines = [f"{to}: {raw['architectures'][0]}, {dtype}"]
    if verify:
        lines.append(verified(to, model, params, dtype))
    return "\n".join(lines)


def _of_classes(family: str, head: Head, tokenizer: Tokenizer) -> dict[str, Any]:
    name, ending = CLASSES[family]
    ends: dict[str, Any] = {
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        "use_cache": True,
    }
    if head == "tokens":
        return {**ends, "architectures": [name + ending], "pad_token_id": None}
    return {
        **ends,
        "architectures": [f"{name}ForSequenceClassification"],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "pad_token_id": _padding_of(tokenizer),
    }


def _padding_of(tokenizer: Tokenizer) -> int | None:
    """An id that no text has and that ends none, if there is one: transformers finds a
    response's last token by it."""
    added = {
        token["id"]
        for token in json.loads(tokenizer.content)["added_tokens"]
        if token.get("special")
    }
    free = sorted(added - {tokenizer.eos_id}) or tokenizer.unused_ids()
    return free[0] if free else None


def folded(params: Params, config: ModelConfig) -> Params:
    """The scalar head without its bias b, which a layer norm's own bias takes up: w · (h +
    w b / w · w) = w · h + b. An RMS norm has none, and the head stays as it is."""
    head, norm = params["scalar_head"], params["final_norm"]
    if config.norm != "layernorm":
        return params
    shift = head["kernel"] * head["bias"] / jnp.maximum(jnp.sum(head["kernel"] ** 2), 1e-30)
    moved = {**norm, "bias": norm["bias"] + shift}
    return {
        **params,
        "final_norm": moved,
        "scalar_head": {**head, "bias": jnp.zeros_like(head["bias"])},
    }


def _write_tokenizer(
    to: Path, tokenizer: Tokenizer, config: ModelConfig, raw: Mapping[str, Any], aside: Path
) -> None:
    save_tokenizer(tokenizer, str(to / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
    }
    if raw["pad_token_id"] is not None and tokenizer.token(raw["pad_token_id"]):
        values["pad_token"] = tokenizer.token(raw["pad_token_id"])
    writing.write_json(to / "tokenizer_config.json", values)
    if (aside / "chat_template.jinja").is_file():
        shutil.copyfile(aside / "chat_template.jinja", to / "chat_template.jinja")


def _readme(manifest: Mapping[str, Any], head: Head, raw: Mapping[str, Any]) -> str:
    auto = (
        "AutoModelForCausalLM" if head == "tokens" else "AutoModelForSequenceClassification"
    )
    lines = [
        f"A run of the stage `{manifest['stage']}`, exported by instructax {instructax.__version__}.",
        f"`transformers.{auto}.from_pretrained` loads it. It was trained on texts to which nothing was added: encode "
        "with `add_special_tokens=False`; a text ends with the end token.",
    ]
    if raw["model_type"] == "qwen2":
        lines.append(
            "AutoTokenizer of transformers 5 puts Qwen's own splitting of words into every tokenizer of a qwen2 model: "
            "load this one with `transformers.PreTrainedTokenizerFast.from_pretrained`, unless it is Qwen's."
        )
    if head == "scalar":
        lines.append(
            "The score is that of the last token of prompt and response, the end token included."
        )
        if raw["pad_token_id"] is None:
            lines.append(
                "The tokenizer has no token for padding: score one text at a time."
            )
        if SCORE_BIAS in raw:
            lines.append(
                f"Classes of transformers have no bias there: add `{SCORE_BIAS}` of `config.json`, {raw[SCORE_BIAS]}, "
                "to each score. Comparisons do not depend on it."
            )
    return "\n\n".join(lines) + "\n"


def verified(path: Path, model: Transformer, params: Params, dtype: str) -> str:
    """A line with the largest difference between logits, or scores, of the run and of the
    folder at `path`. Raises ValueError if it is above `TOLERANCE`, which holds for float32
    alone."""
    raw = hf_folder.read_json(path / "config.json")
    family, config = hf_configs.read_config(raw)
    abstract = abstract_params(
        model,
        sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), devices=jax.devices()[:1]),
    )
    read = reading.read_params(hf_folder.open_tensors(path), family, config, abstract)
    if model.head == "scalar":
        bias = jnp.float32(raw.get(SCORE_BIAS, 0.0))
        read = {**read, "scalar_head": {**read["scalar_head"], "bias": bias}}
    rng, columns = np.random.default_rng(0), min(16, config.max_length)
    tokens = jnp.asarray(rng.integers(config.vocab_size, size=(2, columns)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), tokens.shape)

    @jax.jit
    def outputs(params: Params) -> jax.Array:
        found: Any = model.apply(
            {"params": params}, tokens, jnp.ones_like(tokens), positions
        )[0]
        if model.head == "scalar":
            return found
        return compute_logits(
            found, head_kernel(config, params), config.final_logit_softcap
        )

    ours, theirs = np.asarray(outputs(params)), np.asarray(outputs(read))
    what, worst = (
        "scores" if model.head == "scalar" else "logits",
        float(np.abs(ours - theirs).max()),
    )
    require(
        dtype != "float32"
        or bool(np.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)),
        f"{path} gives other {what} than the run: they differ by up to {worst:.2g}; delete it",
    )
    return f"read again: {what} differ by at most {worst:.2g}"
