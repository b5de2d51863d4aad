"""What the families' `config.json` files have in common, read and written."""

from collections.abc import Mapping
from typing import Any

from instructax.config import require
from instructax.models.config import ModelConfig, RotaryScaling

# The content of a config.json.
RawConfig = Mapping[str, Any]


def require_values(raw: RawConfig, **allowed: tuple[Any, ...]) -> None:
    """Raises ConfigError at the first value that is not allowed.

    The first allowed value of each name is the default of configs that do not name it.
    """
    for name, values in allowed.items():
        # A missing name means the default of transformers, so it must be checked too.
        value = raw.get(name, values[0])
        require(
            value in values,
            f"config.json: {name} = {value!r} of a {raw['model_type']} model is not "
            f"supported, only {' or '.join(map(repr, values))}",
        )


def required_value(raw: RawConfig, name: str) -> Any:
    """A value that has no default. Raises ConfigError if it is absent."""
    require(name in raw, f"config.json of a {raw['model_type']} model lacks {name!r}")
    return raw[name]


def read_rotary(raw: RawConfig, default_fraction: float) -> dict[str, Any]:
    """The fields `rotary_*` of ModelConfig. Versions of transformers differ in where they
    write them."""
    # `rope_scaling` is the older of the two names; `null` counts as absent.
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        kind in ("default", "linear", "llama3"),
        f"config.json: rope_type = {kind!r} of a {raw['model_type']} model is not "
        "supported, only default, linear or llama3",
    )

    # rope_parameters, then the top level, then GPT-NeoX's old name.
    base = raw.get("rope_theta", raw.get("rotary_emb_base", 10000.0))
    base = rope.get("rope_theta", base)
    fraction = raw.get("partial_rotary_factor", raw.get("rotary_pct", default_fraction))
    fraction = rope.get("partial_rotary_factor", fraction)

    # Llama 3.1 scales relative to the context of pretraining, not to its own.
    max_length = raw.get("max_position_embeddings", 2048)
    # Built for all kinds, so that the values are checked; used unless the kind is
    # "default".
    scaling = RotaryScaling(
        kind="linear" if kind == "linear" else "llama3",
        factor=float(rope.get("factor", 1.0)),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_length=int(rope.get("original_max_position_embeddings", max_length)),
    )
    return {
        "rotary_base": float(base),
        "rotary_fraction": float(fraction),
        "rotary_scaling": None if kind == "default" else scaling,
    }


def write_rotary(c: ModelConfig) -> dict[str, Any]:
    """The group `rope_parameters`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rotary_base}
    # Written only where they differ, since not all families know these names.
    if c.rotary_fraction != 1.0:
        rope["partial_rotary_factor"] = c.rotary_fraction
    scaling = c.rotary_scaling
    if scaling is not None:
        rope["rope_type"] = scaling.kind
        rope["factor"] = scaling.factor
        if scaling.kind == "llama3":
            rope["low_freq_factor"] = scaling.low_freq_factor
            rope["high_freq_factor"] = scaling.high_freq_factor
            rope["original_max_position_embeddings"] = scaling.original_max_length
    return rope


# Fields that a family does not set.
NEUTRAL = {
    "rotary_base": 10000.0,
    "rotary_fraction": 1.0,
    "rotary_scaling": None,
    "qkv_biases": False,
    "qk_norm": False,
    "query_pre_attn_scalar": 0.0,
    "attention_softcap": 0.0,
    "sliding_window": 0,
    "window_layers": (),
    "parallel_residual": False,
    "post_norms": False,
    "scale_embedding": False,
    "final_logit_softcap": 0.0,
}


def build_model_config(**values: Any) -> ModelConfig:
    """The architecture with `values`, and neutral values elsewhere."""
    return ModelConfig(**{**NEUTRAL, **values})


def default_head_dim(embed_dim: int, num_heads: int) -> int:
    """The head dim of transformers where a config names none."""
    require(
        embed_dim % num_heads == 0,
        f"config.json: a width of {embed_dim} does not divide by {num_heads} heads",
    )
    return embed_dim // num_heads


def write_sizes(c: ModelConfig) -> dict[str, Any]:
    """The values that have one name in all families but GPT-2."""
    return {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_length,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_dim,
        "tie_word_embeddings": c.tied_embeddings,
        "initializer_range": c.init_std,
    }
