"""`config.json` of Llama and of the families that follow its names: Mistral, Qwen2, Qwen3,
Gemma and Gemma 2."""

from collections.abc import Callable
from typing import Any, Literal

from instructax.config import require
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

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]
GEMMA = ("gemma", "gemma2")
# Defaults of transformers where config.json does not say.
HEAD_DIMS = {"gemma": 256, "gemma2": 256, "qwen3": 128}
DEFAULT_WINDOW = 4096  # tokens; Mistral and Gemma 2


def _window_layers(raw: RawConfig, family: str, num_layers: int) -> list[int]:
    """The layers with a sliding window, for configs that have one."""
    if family == "mistral":
        require_values(raw, layer_types=(None,))
        return list(range(num_layers))
    if raw.get("layer_types") is not None:
        kinds = enumerate(raw["layer_types"])
        return [index for index, kind in kinds if kind == "sliding_attention"]
    if family == "gemma2":
        return list(range(0, num_layers, 2))
    return list(range(raw.get("max_window_layers", 28), num_layers))


def _read_windows(raw: RawConfig, family: str, num_layers: int) -> dict[str, Any]:
    """The fields `sliding_window` and `window_layers`, or {} without windows."""
    if family not in ("mistral", "gemma2", "qwen2", "qwen3"):
        return {}
    if family in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        return {}
    # `null` in a config turns the window off; a missing name means the default.
    default = DEFAULT_WINDOW if family in ("mistral", "gemma2") else None
    window = raw.get("sliding_window", default)
    if window is None:
        return {}
    layers = _window_layers(raw, family, num_layers)
    if not layers:
        return {}
    return {"sliding_window": window, "window_layers": tuple(layers)}


def _read_head_dim(raw: RawConfig, family: str, embed_dim: int, num_heads: int) -> int:
    # num_heads · head_dim need not equal the embed dim, as in Gemma.
    head_dim = raw.get("head_dim") or HEAD_DIMS.get(family)
    if not head_dim:
        head_dim = default_head_dim(embed_dim, num_heads)
    if family in ("llama", "gemma2"):
        # transformers checks divisibility whatever head_dim says.
        default_head_dim(embed_dim, num_heads)
    if family == "qwen2":  # its class ignores head_dim
        require(
            head_dim * num_heads == embed_dim,
            f"config.json: head_dim = {head_dim} of a qwen2 model is not supported",
        )
    return head_dim


def _check_activation(raw: RawConfig, gemma: bool) -> None:
    # `hidden_activation` is Gemma's later name for `hidden_act`.
    default = "gelu_pytorch_tanh" if gemma else "silu"
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or default
    # Gemma's first files say "gelu" and mean the tanh approximation.
    allowed = ("gelu_pytorch_tanh", "gelu") if gemma else ("silu",)
    require_values({**raw, "hidden_act": activation}, hidden_act=allowed)


def _read_biases(raw: RawConfig, family: str) -> bool:
    if family != "llama":
        require_values(raw, attention_bias=(False,))
        return False
    # Ours has biases on all linear maps or on none.
    biases = raw.get("attention_bias", False)
    require_values(raw, mlp_bias=(biases, biases) if "mlp_bias" in raw else (False,))
    require_values(raw, attention_bias=(raw.get("mlp_bias", False),))
    return biases


def _read_gemma2(raw: RawConfig, head_dim: int) -> dict[str, Any]:
    """The fields that only Gemma 2 sets."""
    # 0 is our name for the usual scaling by head_dim, so both read as the same model.
    scalar = raw.get("query_pre_attn_scalar", 256)
    return {
        "query_pre_attn_scalar": 0.0 if scalar == head_dim else float(scalar),
        "attention_softcap": float(raw.get("attn_logit_softcapping", 50.0) or 0.0),
        "final_logit_softcap": float(raw.get("final_logit_softcapping", 30.0) or 0.0),
        "post_norms": True,
    }


def read_llama(raw: RawConfig) -> ModelConfig:
    """The architecture of a model of any of these families."""
    family: Family = raw["model_type"]
    gemma = family in GEMMA
    embed_dim = required_value(raw, "hidden_size")
    num_heads = required_value(raw, "num_attention_heads")
    num_layers = required_value(raw, "num_hidden_layers")
    vocab_size = required_value(raw, "vocab_size")
    head_dim = _read_head_dim(raw, family, embed_dim, num_heads)
    _check_activation(raw, gemma)
    biases = _read_biases(raw, family)
    if gemma:
        require_values(raw, use_bidirectional_attention=(None, False))
    return build_model_config(
        vocab_size=vocab_size,
        max_length=raw.get("max_position_embeddings", 2048),
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        mlp_dim=required_value(raw, "intermediate_size"),
        norm="rmsnorm",
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        positions="rotary",
        **read_rotary(raw, 1.0),
        activation="geglu" if gemma else "swiglu",
        biases=biases,
        qkv_biases=family == "qwen2",
        qk_norm=family == "qwen3",
        scale_embedding=gemma,
        tied_embeddings=raw.get("tie_word_embeddings", gemma),
        init_std=raw.get("initializer_range", 0.02),
        **_read_windows(raw, family, num_layers),
        **(_read_gemma2(raw, head_dim) if family == "gemma2" else {}),
    )


def write_llama(family: Family) -> Callable[[ModelConfig], dict[str, Any]]:
    """A function that writes an architecture as a config of `family`, as closely as it
    can; `hf_configs.write_config` checks the result."""

    def write(c: ModelConfig) -> dict[str, Any]:
        rotary = write_rotary(c)
        activation = "gelu_pytorch_tanh" if family in GEMMA else "silu"
        raw = {
            **write_sizes(c),
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "rms_norm_eps": c.norm_epsilon,
            "hidden_act": activation,
            "rope_parameters": rotary,
            # Read by versions of transformers before 5.
            "rope_theta": c.rotary_base,
            "rope_scaling": rotary if c.rotary_scaling is not None else None,
            "attention_dropout": 0.0,
        }

        # What a family does not name stays out; reading back finds what is lost.
        # The newer way to say which layers have a window; some families know only the older
        # one.
        layer_types = ["full_attention"] * c.num_layers
        for layer in c.window_layers:
            layer_types[layer] = "sliding_attention"
        if family == "llama":
            raw["attention_bias"] = c.biases
            raw["mlp_bias"] = c.biases
        if family == "mistral":
            raw["sliding_window"] = c.sliding_window or None
        if family in ("qwen2", "qwen3"):
            raw["use_sliding_window"] = c.sliding_window > 0
            raw["sliding_window"] = c.sliding_window or None
            raw["max_window_layers"] = min(c.window_layers, default=c.num_layers)
            raw["layer_types"] = layer_types
        if family == "gemma2":
            raw["hidden_activation"] = activation
            # Without windowed layers nothing reads the default.
            raw["sliding_window"] = c.sliding_window or DEFAULT_WINDOW
            raw["layer_types"] = layer_types
            raw["query_pre_attn_scalar"] = int(c.query_pre_attn_scalar or c.head_dim)
            raw["attn_logit_softcapping"] = c.attention_softcap or None
            raw["final_logit_softcapping"] = c.final_logit_softcap or None
        return raw

    return write
