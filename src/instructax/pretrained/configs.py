"""`config.json` of each family and `ModelConfig`: what it must say, what it may not say, and back again.

Reading is strict: a value that changes the network in a way that ours cannot follow is refused by its name. Writing is
checked by reading: a family can express a model exactly if what is written for it reads as that very model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from instructax.configuration import require
from instructax.model import ModelConfig, RotaryScaling

Raw = Mapping[str, Any]  # a config.json
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
}


def _only(raw: Raw, **allowed: tuple[Any, ...]) -> None:
    """Raises ConfigError at the first value that is not among those allowed, of which the first is the one of a config
    that does not name it."""
    for name, values in allowed.items():
        found = raw.get(name, values[0])
        require(
            found in values,
            f"config.json: {name} = {found!r} of a {raw['model_type']} model is not supported, "
            f"only {' or '.join(map(repr, values))}",
        )


def _needed(raw: Raw, name: str) -> Any:
    require(name in raw, f"config.json of a {raw['model_type']} model lacks {name!r}")
    return raw[name]


def _rotary(raw: Raw, fraction: float) -> dict[str, Any]:
    """base, fraction and scaling, from the places where one version or another of transformers writes them."""
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    require(
        kind in ("default", "linear", "llama3"),
        f"config.json: rope_type = {kind!r} of a {raw['model_type']} model is not supported, only default, linear or "
        "llama3",
    )
    base = given.get("rope_theta", raw.get("rope_theta", raw.get("rotary_emb_base", 10000.0)))
    share = given.get("partial_rotary_factor", raw.get("partial_rotary_factor", raw.get("rotary_pct", fraction)))
    length = raw.get("max_position_embeddings", 2048)
    scaling = RotaryScaling(
        kind="linear" if kind == "linear" else "llama3",
        factor=float(given.get("factor", 1.0)),
        low_turns=float(given.get("low_freq_factor", 1.0)),
        high_turns=float(given.get("high_freq_factor", 4.0)),
        original_length=int(given.get("original_max_position_embeddings", length)),
    )
    scaled = None if kind == "default" else scaling
    return {"rotary_base": float(base), "rotary_fraction": float(share), "rotary_scaling": scaled}


def _rotary_raw(c: ModelConfig) -> dict[str, Any]:
    given: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rotary_base}
    if c.rotary_fraction != 1.0:
        given["partial_rotary_factor"] = c.rotary_fraction
    if c.rotary_scaling is not None:
        given |= {"rope_type": c.rotary_scaling.kind, "factor": c.rotary_scaling.factor}
        if c.rotary_scaling.kind == "llama3":
            given |= {
                "low_freq_factor": c.rotary_scaling.low_turns,
                "high_freq_factor": c.rotary_scaling.high_turns,
                "original_max_position_embeddings": c.rotary_scaling.original_length,
            }
    return given


NEUTRAL = {
    "rotary_base": 10000.0,
    "rotary_fraction": 1.0,
    "rotary_scaling": None,
    "qkv_biases": False,
    "qk_norms": False,
    "score_width": 0.0,
    "attention_cap": 0.0,
    "window": 0,
    "windowed": (),
    "parallel_residual": False,
    "post_norms": False,
    "scaled_embedding": False,
    "logit_cap": 0.0,
}


def _model(**values: Any) -> ModelConfig:
    return ModelConfig(**{**NEUTRAL, **values})


def _head_width(width: int, heads: int) -> int:
    require(width % heads == 0, f"config.json: a width of {width} does not divide by {heads} heads")
    return width // heads


def _read_gpt2(raw: Raw) -> ModelConfig:
    _only(raw, scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,))
    _only(raw, activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"))
    width, heads = _needed(raw, "n_embd"), _needed(raw, "n_head")
    return _model(
        vocab_size=_needed(raw, "vocab_size"),
        max_length=raw.get("n_positions", 1024),
        layers=_needed(raw, "n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=_head_width(width, heads),
        mlp_width=raw.get("n_inner") or 4 * width,
        norm="layernorm",
        norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=ACTIVATIONS[raw.get("activation_function", "gelu_new")],
        biases=True,
        tied_head=raw.get("tie_word_embeddings", True),
        init_std=raw.get("initializer_range", 0.02),
    )


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_positions": c.max_length,
        "n_ctx": c.max_length,
        "n_layer": c.layers,
        "n_embd": c.width,
        "n_head": c.heads,
        "n_inner": c.mlp_width,
        "layer_norm_epsilon": c.norm_epsilon,
        "activation_function": "gelu" if c.activation == "gelu_exact" else "gelu_new",
        "tie_word_embeddings": c.tied_head,
        "initializer_range": c.init_std,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _read_neox(raw: Raw) -> ModelConfig:
    _only(raw, attention_bias=(True,), hidden_act=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"))
    width, heads = _needed(raw, "hidden_size"), _needed(raw, "num_attention_heads")
    return _model(
        vocab_size=_needed(raw, "vocab_size"),
        max_length=raw.get("max_position_embeddings", 2048),
        layers=_needed(raw, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=_head_width(width, heads),
        mlp_width=_needed(raw, "intermediate_size"),
        norm="layernorm",
        norm_epsilon=raw.get("layer_norm_eps", 1e-5),
        positions="rotary",
        **_rotary(raw, 0.25),
        activation=ACTIVATIONS[raw.get("hidden_act", "gelu")],
        biases=True,
        parallel_residual=raw.get("use_parallel_residual", True),
        tied_head=raw.get("tie_word_embeddings", False),
        init_std=raw.get("initializer_range", 0.02),
    )


def _write_neox(c: ModelConfig) -> dict[str, Any]:
    rotary = {"partial_rotary_factor": c.rotary_fraction, **_rotary_raw(c)}
    return {
        **_sizes(c),
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


def _sizes(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_length,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "tie_word_embeddings": c.tied_head,
        "initializer_range": c.init_std,
    }


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
        _only(raw, layer_types=(None,))
        near = list(range(layers))
    elif raw.get("layer_types") is not None:
        near = [i for i, kind in enumerate(raw["layer_types"]) if kind == "sliding_attention"]
    elif family == "gemma2":
        near = list(range(0, layers, 2))
    else:
        near = list(range(raw.get("max_window_layers", 28), layers))
    return {"window": width, "windowed": tuple(near)} if near else {}


def _read_llama(raw: Raw) -> ModelConfig:
    family: Family = raw["model_type"]
    gemma = family in ("gemma", "gemma2")
    width, heads = _needed(raw, "hidden_size"), _needed(raw, "num_attention_heads")
    layers, vocab_size = _needed(raw, "num_hidden_layers"), _needed(raw, "vocab_size")
    head_width = raw.get("head_dim") or HEAD_WIDTHS.get(family) or _head_width(width, heads)
    if family in ("llama", "gemma2"):  # transformers' own rule, whatever head_dim says
        _head_width(width, heads)
    if family == "qwen2":  # has no head_dim of its own
        require(head_width * heads == width, f"config.json: head_dim = {head_width} of a qwen2 model is not supported")
    act = raw.get("hidden_activation") or raw.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    # Gemma's first files say "gelu" and mean its tanh form.
    _only({**raw, "hidden_act": act}, hidden_act=("gelu_pytorch_tanh", "gelu") if gemma else ("silu",))
    if family == "llama":
        biases = raw.get("attention_bias", False)
        _only(raw, mlp_bias=(biases, biases) if "mlp_bias" in raw else (False,))
        _only(raw, attention_bias=(raw.get("mlp_bias", False),))
    else:
        _only(raw, attention_bias=(False,))
        biases = False
    if gemma:
        _only(raw, use_bidirectional_attention=(None, False))
    values: dict[str, Any] = {}
    if family == "gemma2":
        score = raw.get("query_pre_attn_scalar", 256)
        values = {
            "score_width": 0.0 if score == head_width else float(score),
            "attention_cap": float(raw.get("attn_logit_softcapping", 50.0) or 0.0),
            "logit_cap": float(raw.get("final_logit_softcapping", 30.0) or 0.0),
            "post_norms": True,
        }
    return _model(
        vocab_size=vocab_size,
        max_length=raw.get("max_position_embeddings", 2048),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_width=head_width,
        mlp_width=_needed(raw, "intermediate_size"),
        norm="rmsnorm",
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        positions="rotary",
        **_rotary(raw, 1.0),
        activation="geglu" if gemma else "swiglu",
        biases=biases,
        qkv_biases=family == "qwen2",
        qk_norms=family == "qwen3",
        scaled_embedding=gemma,
        tied_head=raw.get("tie_word_embeddings", family in TIED),
        init_std=raw.get("initializer_range", 0.02),
        **_windows(raw, family, layers),
        **values,
    )


def _write_llama(family: Family) -> Callable[[ModelConfig], dict[str, Any]]:
    def write(c: ModelConfig) -> dict[str, Any]:
        rotary = _rotary_raw(c)
        act = "gelu_pytorch_tanh" if family in ("gemma", "gemma2") else "silu"
        raw = {
            **_sizes(c),
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_width,
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
            raw |= {"sliding_window": c.window or None}
        kinds = ["sliding_attention" if i in c.windowed else "full_attention" for i in range(c.layers)]
        if family in ("qwen2", "qwen3"):
            first = min(c.windowed, default=c.layers)
            raw |= {"use_sliding_window": c.window > 0, "sliding_window": c.window or None}
            raw |= {"max_window_layers": first, "layer_types": kinds}
        if family == "gemma2":
            raw |= {
                "hidden_activation": act,
                "sliding_window": c.window or 4096,  # which no layer reads if none is windowed
                "layer_types": kinds,
                "query_pre_attn_scalar": int(c.score_width or c.head_width),
                "attn_logit_softcapping": c.attention_cap or None,
                "final_logit_softcapping": c.logit_cap or None,
            }
        return raw

    return write


READ: dict[str, Callable[[Raw], ModelConfig]] = {
    "gpt2": _read_gpt2,
    "gpt_neox": _read_neox,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _read_llama),
}
WRITE: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {"gpt2": _write_gpt2, "gpt_neox": _write_neox}
WRITE |= {family: _write_llama(family) for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")}


def read_config(raw: Raw) -> tuple[str, ModelConfig]:
    """(family, architecture) of a `config.json`. Raises ValueError, with the name and the value, for what ours cannot
    express."""
    family = raw.get("model_type")
    require(family in READ, f"config.json: model_type = {family!r} is not supported, only {', '.join(READ)}")
    _only(raw, quantization_config=(None,), is_encoder_decoder=(False,))
    return str(family), READ[str(family)](raw)


def write_config(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """(family, `config.json`) of the first family that expresses `config` exactly. Raises ValueError, with what stands
    in the way of the family that comes nearest, if there is none."""
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
            f"model.{name} = {ours[name]!r} (it has {theirs[name]!r})" for name in ours if ours[name] != theirs[name]
        ]
        if config.positions == theirs["positions"] == "learned":  # which read nothing of rotary ones
            differences = [text for text in differences if not text.startswith("model.rotary_")]
        if not differences:
            return family, raw
        reasons[family] = differences
    nearest = min(reasons, key=lambda family: len(reasons[family]))
    raise ValueError(
        f"no family of transformers expresses this model; nearest is {nearest}, but {'; '.join(reasons[nearest])}"
    )
