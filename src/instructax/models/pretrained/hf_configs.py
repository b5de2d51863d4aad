"""Converts the `config.json` of each family to `ModelConfig` and back.

Reading is strict: a value that changes the network in a way that ours cannot express is
refused by name. Writing is checked by reading: a family can express a model exactly if what
is written for it reads as the same model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from instructax.config import ConfigError, require
from instructax.models.config import ModelConfig
from instructax.models.pretrained.config_values import (
    RawConfig,
    build_model_config,
    default_head_dim,
    read_rotary,
    require_values,
    required_value,
    write_rotary,
    write_sizes,
)
from instructax.models.pretrained.llama_configs import read_llama, write_llama

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
}
# Rotated fraction of each head in GPT-NeoX configs that do not say.
NEOX_ROTARY_FRACTION = 0.25


def _read_gpt2(raw: RawConfig) -> ModelConfig:
    # Variants of attention that change the network.
    require_values(
        raw,
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    require_values(
        raw, activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu")
    )
    embed_dim = required_value(raw, "n_embd")
    num_heads = required_value(raw, "n_head")
    return build_model_config(
        vocab_size=required_value(raw, "vocab_size"),
        max_length=raw.get("n_positions", 1024),
        num_layers=required_value(raw, "n_layer"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=default_head_dim(embed_dim, num_heads),
        # `null` means 4 · D, in transformers too.
        mlp_dim=raw.get("n_inner") or 4 * embed_dim,
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
        # No dropout: transformers would otherwise apply its default of 0.1 in training.
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _read_neox(raw: RawConfig) -> ModelConfig:
    require_values(
        raw,
        attention_bias=(True,),
        hidden_act=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    )
    embed_dim = required_value(raw, "hidden_size")
    num_heads = required_value(raw, "num_attention_heads")
    return build_model_config(
        vocab_size=required_value(raw, "vocab_size"),
        max_length=raw.get("max_position_embeddings", 2048),
        num_layers=required_value(raw, "num_hidden_layers"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=default_head_dim(embed_dim, num_heads),
        mlp_dim=required_value(raw, "intermediate_size"),
        norm="layernorm",
        norm_epsilon=raw.get("layer_norm_eps", 1e-5),
        positions="rotary",
        **read_rotary(raw, NEOX_ROTARY_FRACTION),
        # GPT-NeoX uses the exact GELU unless its config says otherwise.
        activation=ACTIVATIONS[raw.get("hidden_act", "gelu")],
        biases=True,
        parallel_residual=raw.get("use_parallel_residual", True),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        init_std=raw.get("initializer_range", 0.02),
    )


def _write_neox(c: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(c),
        "layer_norm_eps": c.norm_epsilon,
        "hidden_act": "gelu" if c.activation == "gelu_exact" else "gelu_new",
        "rope_parameters": {"partial_rotary_factor": c.rotary_fraction, **write_rotary(c)},
        # Read by versions of transformers before 5.
        "rotary_emb_base": c.rotary_base,
        "rotary_pct": c.rotary_fraction,
        "use_parallel_residual": c.parallel_residual,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


READ: dict[str, Callable[[RawConfig], ModelConfig]] = {
    "gpt2": _read_gpt2,
    "gpt_neox": _read_neox,
    "llama": read_llama,
    "mistral": read_llama,
    "qwen2": read_llama,
    "qwen3": read_llama,
    "gemma": read_llama,
    "gemma2": read_llama,
}
# Families are tried in this order when a model is written.
WRITE: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt2": _write_gpt2,
    "gpt_neox": _write_neox,
    "llama": write_llama("llama"),
    "mistral": write_llama("mistral"),
    "qwen2": write_llama("qwen2"),
    "qwen3": write_llama("qwen3"),
    "gemma": write_llama("gemma"),
    "gemma2": write_llama("gemma2"),
}


def read_config(raw: RawConfig) -> tuple[str, ModelConfig]:
    """The family and architecture of a `config.json`.

    Raises ConfigError, with the name and the value, for what ours cannot express.
    """
    family = raw.get("model_type")
    require(
        family in READ,
        f"config.json: model_type = {family!r} is not supported, only {', '.join(READ)}",
    )
    require_values(raw, quantization_config=(None,), is_encoder_decoder=(False,))
    return str(family), READ[str(family)](raw)


def write_config(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The first family that expresses `config` exactly, and the `config.json`.

    Raises ConfigError if there is none, with what the closest family cannot express.
    """
    # The family with the fewest differences, for the error message.
    closest = ""
    fewest: list[str] | None = None
    refusals: dict[str, str] = {}
    for family, write in WRITE.items():
        raw = {"model_type": family, **write(config)}
        # Reading applies the family's defaults and refusals to what was written.
        try:
            read_back = READ[family](raw)
        except ValueError as error:
            refusals[family] = str(error).removeprefix("config.json: ")
            continue
        differences = _differences(config, read_back)
        if not differences:
            return family, raw
        if fewest is None or len(differences) < len(fewest):
            closest = family
            fewest = differences
    if fewest is None:  # every family refuses it
        closest, reason = next(iter(refusals.items()))
        fewest = [reason]
    raise ConfigError(
        f"no family of transformers expresses this model; nearest is {closest}, but "
        f"{'; '.join(fewest)}"
    )


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """One entry for each field whose value a family changes."""
    wanted = dataclasses.asdict(ours)
    found = dataclasses.asdict(theirs)
    # Learned positions read no rotary field.
    learned = ours.positions == theirs.positions == "learned"
    differences = []
    for name, value in wanted.items():
        unused = learned and name.startswith("rotary_")
        if value != found[name] and not unused:
            differences.append(f"model.{name} = {value!r} (it has {found[name]!r})")
    return differences
