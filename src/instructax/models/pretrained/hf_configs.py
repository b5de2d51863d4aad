"""`config.json` of each family and `ModelConfig`: what it must say, what it may not say,
and back again.

Reading is strict: a value that changes the network in a way that ours cannot follow is
refused by its name. Writing is checked by reading: a family can express a model exactly if
what is written for it reads as that very model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from instructax.config import ConfigError, require
from instructax.models import ModelConfig
from instructax.models.pretrained.config_values import (
    Raw,
    head_width_of,
    model_of,
    needed,
    only,
    rotary_of,
    rotary_raw,
    sizes_raw,
)
from instructax.models.pretrained.llama_configs import read_llama, write_llama

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
}


def _read_gpt2(raw: Raw) -> ModelConfig:
    only(
        raw,
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    only(raw, activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"))
    width, heads = needed(raw, "n_embd"), needed(raw, "n_head")
    return model_of(
        vocab_size=needed(raw, "vocab_size"),
        max_length=raw.get("n_positions", 1024),
        num_layers=needed(raw, "n_layer"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_width_of(width, heads),
        mlp_dim=raw.get("n_inner") or 4 * width,
        norm="layernorm",
        norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=ACTIVATIONS[raw.get("activation_function", "gelu_new")],
        biases=True,
        tied_embeddings=raw.get("tie_word_embeddings", True),
        init_std=raw.get("initializer_range", 0.02),
    )


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_positions": c.max_length,
        "n_ctx": c.max_length,
        "n_layer": c.num_layers,
        "n_embd": c.embed_dim,
        "n_head": c.num_heads,
        "n_inner": c.mlp_dim,
        "layer_norm_epsilon": c.norm_epsilon,
        "activation_function": "gelu" if c.activation == "gelu_exact" else "gelu_new",
        "tie_word_embeddings": c.tied_embeddings,
        "initializer_range": c.init_std,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _read_neox(raw: Raw) -> ModelConfig:
    only(
        raw,
        attention_bias=(True,),
        hidden_act=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    )
    width, heads = needed(raw, "hidden_size"), needed(raw, "num_attention_heads")
    return model_of(
        vocab_size=needed(raw, "vocab_size"),
        max_length=raw.get("max_position_embeddings", 2048),
        num_layers=needed(raw, "num_hidden_layers"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_width_of(width, heads),
        mlp_dim=needed(raw, "intermediate_size"),
        norm="layernorm",
        norm_epsilon=raw.get("layer_norm_eps", 1e-5),
        positions="rotary",
        **rotary_of(raw, 0.25),
        activation=ACTIVATIONS[raw.get("hidden_act", "gelu")],
        biases=True,
        parallel_residual=raw.get("use_parallel_residual", True),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        init_std=raw.get("initializer_range", 0.02),
    )


def _write_neox(c: ModelConfig) -> dict[str, Any]:
    rotary = {"partial_rotary_factor": c.rotary_fraction, **rotary_raw(c)}
    return {
        **sizes_raw(c),
        "layer_norm_eps": c.norm_epsilon,
        "hidden_act": "gelu" if c.activation == "gelu_exact" else "gelu_new",
        "rope_parameters": rotary,
        # What versions of transformers before 5 read instead.
        "rotary_emb_base": c.rotary_base,
        "rotary_pct": c.rotary_fraction,
        "use_parallel_residual": c.parallel_residual,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


READ: dict[str, Callable[[Raw], ModelConfig]] = {
    "gpt2": _read_gpt2,
    "gpt_neox": _read_neox,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), read_llama),
}
WRITE: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt2": _write_gpt2,
    "gpt_neox": _write_neox,
}
WRITE |= {
    family: write_llama(family)
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
}


def read_config(raw: Raw) -> tuple[str, ModelConfig]:
    """(family, architecture) of a `config.json`. Raises ValueError, with the name and the
    value, for what ours cannot express."""
    family = raw.get("model_type")
    require(
        family in READ,
        f"config.json: model_type = {family!r} is not supported, only {', '.join(READ)}",
    )
    only(raw, quantization_config=(None,), is_encoder_decoder=(False,))
    return str(family), READ[str(family)](raw)


def write_config(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """(family, `config.json`) of the first family that expresses `config` exactly. Raises
    ValueError, with what stands in the way of the family that comes nearest, if there is
    none."""
    reasons: dict[str, list[str]] = {}
    for family, write in WRITE.items():
        raw = {"model_type": family, **write(config)}
        try:
            found = READ[family](raw)
        except ValueError as error:
            reasons[family] = [str(error).removeprefix("config.json: ")] * 9  # the farthest
            continue
        ours, theirs = (dataclasses.asdict(x) for x in (config, found))
        differences = [
            f"model.{name} = {ours[name]!r} (it has {theirs[name]!r})"
            for name in ours
            if ours[name] != theirs[name]
        ]
        if (
            config.positions == theirs["positions"] == "learned"
        ):  # which read nothing of rotary ones
            differences = [
                text for text in differences if not text.startswith("model.rotary_")
            ]
        if not differences:
            return family, raw
        reasons[family] = differences
    nearest = min(reasons, key=lambda family: len(reasons[family]))
    raise ConfigError(
        f"no family of transformers expresses this model; nearest is {nearest}, but {'; '.join(reasons[nearest])}"
    )
