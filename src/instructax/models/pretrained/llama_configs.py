"""`config.json` of Llama and of the families that took its names: Mistral, Qwen2, Qwen3,
Gemma and Gemma 2."""

from collections.abc import Callable
from typing import Any, Literal

from instructax.config import require
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

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]
HEAD_WIDTHS = {"gemma": 256, "gemma2": 256, "qwen3": 128}  # where config.json names none
TIED = {"gemma", "gemma2"}  # where config.json does not say


def _windows(raw: Raw, family: str, layers: int) -> dict[str, Any]:
    """Which layers have a window, and its width."""
    width = raw.get("sliding_window", 4096 if family in ("mistral", "gemma2") else None)
    if family not in ("mistral", "gemma2", "qwen2", "qwen3") or width is None:
        return {}
    if family in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        return {}
    if family == "mistral":
        only(raw, layer_types=(None,))
        near = list(range(layers))
    elif raw.get("layer_types") is not None:
        near = [
            i for i, kind in enumerate(raw["layer_types"]) if kind == "sliding_attention"
        ]
    elif family == "gemma2":
        near = list(range(0, layers, 2))
    else:
        near = list(range(raw.get("max_window_layers", 28), layers))
    return {"sliding_window": width, "window_layers": tuple(near)} if near else {}


def read_llama(raw: Raw) -> ModelConfig:
    """The architecture of any of these families."""
    family: Family = raw["model_type"]
    gemma = family in ("gemma", "gemma2")
    width, heads = needed(raw, "hidden_size"), needed(raw, "num_attention_heads")
    layers, vocab_size = needed(raw, "num_hidden_layers"), needed(raw, "vocab_size")
    head_dim = raw.get("head_dim") or HEAD_WIDTHS.get(family) or head_width_of(width, heads)
    if family in ("llama", "gemma2"):  # transformers' own rule, whatever head_dim says
        head_width_of(width, heads)
    if family == "qwen2":  # has no head_dim of its own
        require(
            head_dim * heads == width,
            f"config.json: head_dim = {head_dim} of a qwen2 model is not supported",
        )
    act = (
        raw.get("hidden_activation")
        or raw.get("hidden_act")
        or ("gelu_pytorch_tanh" if gemma else "silu")
    )
    # Gemma's first files say "gelu" and mean its tanh form.
    only(
        {**raw, "hidden_act": act},
        hidden_act=("gelu_pytorch_tanh", "gelu") if gemma else ("silu",),
    )
    if family == "llama":
        biases = raw.get("attention_bias", False)
        only(raw, mlp_bias=(biases, biases) if "mlp_bias" in raw else (False,))
        only(raw, attention_bias=(raw.get("mlp_bias", False),))
    else:
        only(raw, attention_bias=(False,))
        biases = False
    if gemma:
        only(raw, use_bidirectional_attention=(None, False))
    values: dict[str, Any] = {}
    if family == "gemma2":
        score = raw.get("query_pre_attn_scalar", 256)
        values = {
            "query_pre_attn_scalar": 0.0 if score == head_dim else float(score),
            "attention_softcap": float(raw.get("attn_logit_softcapping", 50.0) or 0.0),
            "final_logit_softcap": float(raw.get("final_logit_softcapping", 30.0) or 0.0),
            "post_norms": True,
        }
    return model_of(
        vocab_size=vocab_size,
        max_length=raw.get("max_position_embeddings", 2048),
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp_dim=needed(raw, "intermediate_size"),
        norm="rmsnorm",
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        positions="rotary",
        **rotary_of(raw, 1.0),
        activation="geglu" if gemma else "swiglu",
        biases=biases,
        qkv_biases=family == "qwen2",
        qk_norm=family == "qwen3",
        scale_embedding=gemma,
        tied_embeddings=raw.get("tie_word_embeddings", family in TIED),
        init_std=raw.get("initializer_range", 0.02),
        **_windows(raw, family, layers),
        **values,
    )


def write_llama(family: Family) -> Callable[[ModelConfig], dict[str, Any]]:
    """A function that writes the config of an architecture for one of these families, as
    near as it can."""

    def write(c: ModelConfig) -> dict[str, Any]:
        rotary = rotary_raw(c)
        act = "gelu_pytorch_tanh" if family in ("gemma", "gemma2") else "silu"
        raw = {
            **sizes_raw(c),
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "rms_norm_eps": c.norm_epsilon,
            "hidden_act": act,
            "rope_parameters": rotary,
            # What versions of transformers before 5 read instead.
            "rope_theta": c.rotary_base,
            "rope_scaling": rotary if c.rotary_scaling is not None else None,
            "attention_dropout": 0.0,
        }
        if family == "llama":
            raw |= {"attention_bias": c.biases, "mlp_bias": c.biases}
        if family == "mistral":
            raw |= {"sliding_window": c.sliding_window or None}
        kinds = [
            "sliding_attention" if i in c.window_layers else "full_attention"
            for i in range(c.num_layers)
        ]
        if family in ("qwen2", "qwen3"):
            first = min(c.window_layers, default=c.num_layers)
            raw |= {
                "use_sliding_window": c.sliding_window > 0,
                "sliding_window": c.sliding_window or None,
            }
            raw |= {"max_window_layers": first, "layer_types": kinds}
        if family == "gemma2":
            raw |= {
                "hidden_activation": act,
                "sliding_window": c.sliding_window
                or 4096,  # which no layer reads if none is windowed
                "layer_types": kinds,
                "query_pre_attn_scalar": int(c.query_pre_attn_scalar or c.head_dim),
                "attn_logit_softcapping": c.attention_softcap or None,
                "final_logit_softcapping": c.final_logit_softcap or None,
            }
        return raw

    return write
