"""What the families' `config.json` have in common, read and written."""

from collections.abc import Mapping
from typing import Any

from instructax.config import require
from instructax.models import ModelConfig, RotaryScaling

Raw = Mapping[str, Any]  # a config.json


def only(raw: Raw, **allowed: tuple[Any, ...]) -> None:
    """Raises ConfigError at the first value that is not among those allowed, of which the
    first is the one of a config that does not name it."""
    for name, values in allowed.items():
        found = raw.get(name, values[0])
        require(
            found in values,
            f"config.json: {name} = {found!r} of a {raw['model_type']} model is not supported, "
            f"only {' or '.join(map(repr, values))}",
        )


def needed(raw: Raw, name: str) -> Any:
    """A value that every config names. Raises ConfigError if it does not."""
    require(name in raw, f"config.json of a {raw['model_type']} model lacks {name!r}")
    return raw[name]


def rotary_of(raw: Raw, fraction: float) -> dict[str, Any]:
    """base, fraction and scaling, from the places where one version or another of
    transformers writes them."""
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    require(
        kind in ("default", "linear", "llama3"),
        f"config.json: rope_type = {kind!r} of a {raw['model_type']} model is not supported, only default, linear or "
        "llama3",
    )
    base = given.get(
        "rope_theta", raw.get("rope_theta", raw.get("rotary_emb_base", 10000.0))
    )
    share = given.get(
        "partial_rotary_factor",
        raw.get("partial_rotary_factor", raw.get("rotary_pct", fraction)),
    )
    length = raw.get("max_position_embeddings", 2048)
    scaling = RotaryScaling(
        kind="linear" if kind == "linear" else "llama3",
        factor=float(given.get("factor", 1.0)),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        original_max_length=int(given.get("original_max_position_embeddings", length)),
    )
    scaled = None if kind == "default" else scaling
    return {
        "rotary_base": float(base),
        "rotary_fraction": float(share),
        "rotary_scaling": scaled,
    }


def rotary_raw(c: ModelConfig) -> dict[str, Any]:
    """The group `rope_parameters`."""
    given: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rotary_base}
    if c.rotary_fraction != 1.0:
        given["partial_rotary_factor"] = c.rotary_fraction
    if c.rotary_scaling is not None:
        given |= {"rope_type": c.rotary_scaling.kind, "factor": c.rotary_scaling.factor}
        if c.rotary_scaling.kind == "llama3":
            given |= {
                "low_freq_factor": c.rotary_scaling.low_freq_factor,
                "high_freq_factor": c.rotary_scaling.high_freq_factor,
                "original_max_position_embeddings": c.rotary_scaling.original_max_length,
            }
    return given


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


def model_of(**values: Any) -> ModelConfig:
    """The architecture with `values`, neutral otherwise."""
    return ModelConfig(**{**NEUTRAL, **values})


def head_width_of(width: int, heads: int) -> int:
    """What transformers takes where no head_dim is given."""
    require(
        width % heads == 0,
        f"config.json: a width of {width} does not divide by {heads} heads",
    )
    return width // heads


def sizes_raw(c: ModelConfig) -> dict[str, Any]:
    """The values that all but GPT-2 name alike."""
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
