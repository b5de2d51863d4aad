"""A slow reference forward pass in NumPy and float64, written from the definitions.

It takes one sequence: no batch, no padding. Layers, heads and positions are loops. A query
gets only the keys that it may attend to, so there is no mask. Rotary positions are products
of complex numbers. It reads the library's parameters by name.
"""

import math
from typing import Any

import numpy as np

from instructax.models.config import ModelConfig


def norm(x: np.ndarray, parameters: dict[str, Any], config: ModelConfig) -> np.ndarray:
    """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang and Sennrich, 2019) of one vector."""
    if config.norm == "layernorm":
        return (x - x.mean()) / math.sqrt(x.var() + config.norm_epsilon) * parameters[
            "scale"
        ] + parameters["bias"]
    return x / math.sqrt(np.mean(x**2) + config.norm_epsilon) * parameters["scale"]


def linear(x: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    return np.tensordot(x, parameters["kernel"], axes=x.ndim) + parameters.get("bias", 0.0)


def angle(index: int, width: int, config: ModelConfig) -> float:
    """base^(−2i/d) (Su et al., 2021), scaled as in Chen et al. (2023) or Llama 3.1."""
    frequency = config.rotary_base ** (-2 * index / width)
    scaling = config.rotary_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    if (
        scaling.kind == "linear"
        or wavelength > scaling.original_max_length / scaling.low_freq_factor
    ):
        return frequency / scaling.factor
    if wavelength < scaling.original_max_length / scaling.high_freq_factor:
        return frequency
    smooth = scaling.original_max_length / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rotate(x: np.ndarray, position: int, config: ModelConfig) -> np.ndarray:
    """Rotates the complex numbers (x_i, x_{i + d/2}) of the first d components by
    position · angle."""
    width = int(len(x) * config.rotary_fraction)
    half = width // 2
    turned = [
        complex(x[i], x[i + half]) * np.exp(1j * position * angle(i, width, config))
        for i in range(half)
    ]
    return np.array(
        [z.real for z in turned] + [z.imag for z in turned] + x[width:].tolist()
    )


def attention(
    x: list[np.ndarray], parameters: dict[str, Any], config: ModelConfig, layer: int
) -> list[np.ndarray]:
    """Each position attends to itself and earlier ones; `num_heads / num_kv_heads` adjacent
    heads share a key."""
    queries = [linear(row, parameters["query"]) for row in x]
    keys = [linear(row, parameters["key"]) for row in x]
    values = [linear(row, parameters["value"]) for row in x]
    if config.qk_norm:
        queries = [
            np.array([norm(head, parameters["query_norm"], config) for head in row])
            for row in queries
        ]
        keys = [
            np.array([norm(head, parameters["key_norm"], config) for head in row])
            for row in keys
        ]
    outputs = []
    for t in range(len(x)):
        output = np.zeros((config.num_heads, config.head_dim))
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            query = queries[t][head]
            first = 0
            if layer in config.window_layers:
                first = max(0, t + 1 - config.sliding_window)
            seen = [keys[s][shared] for s in range(first, t + 1)]
            if config.positions == "rotary":
                query = rotate(query, t, config)
                seen = [rotate(key, s, config) for s, key in enumerate(seen, start=first)]
            scores = np.array([query @ key for key in seen]) / math.sqrt(
                config.query_pre_attn_scalar or config.head_dim
            )
            weights = np.exp(capped(scores, config.attention_softcap))
            for s, weight in enumerate(weights / weights.sum(), start=first):
                output[head] += weight * values[s][shared]
        outputs.append(linear(output, parameters["out"]))
    return outputs


def capped(scores: np.ndarray, cap: float) -> np.ndarray:
    """Gemma 2's soft cap; 0 = off."""
    return scores if cap == 0 else cap * np.tanh(scores / cap)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(x: np.ndarray, parameters: dict[str, Any], config: ModelConfig) -> np.ndarray:
    up = linear(x, parameters["up"])
    if config.activation == "gelu":
        up = gelu(up)
    elif config.activation == "gelu_exact":
        up = up * np.array([0.5 * (1 + math.erf(number / math.sqrt(2))) for number in up])
    else:  # SwiGLU and GEGLU (Shazeer, 2020)
        gate = linear(x, parameters["gate"])
        up = up * (
            gate / (1 + np.exp(-gate)) if config.activation == "swiglu" else gelu(gate)
        )
    return linear(up, parameters["down"])


def float64(tree: Any, layer: int | None = None) -> Any:
    """The tree in float64; with `layer`, the parameters of that layer of the stack."""
    if isinstance(tree, dict):
        return {name: float64(child, layer) for name, child in tree.items()}
    return np.asarray(tree if layer is None else tree[layer], np.float64)


def hidden_states(config: ModelConfig, params: Any, tokens: list[int]) -> np.ndarray:
    """f64[T, D], after the final norm."""
    top = float64({name: child for name, child in params.items() if name != "blocks"})
    x = [top["embedding"][token] for token in tokens]
    if config.scale_embedding:
        x = [math.sqrt(config.embed_dim) * row for row in x]
    if config.positions == "learned":
        x = [row + top["positions"][t] for t, row in enumerate(x)]
    for layer in range(config.num_layers):
        block = float64(params["blocks"], layer)
        normed = [norm(row, block["attention_norm"], config) for row in x]
        attended = attention(normed, block["attention"], config, layer)
        if config.post_norms:
            attended = [norm(row, block["attention_post_norm"], config) for row in attended]
        summed = [row + a for row, a in zip(x, attended, strict=True)]
        read = x if config.parallel_residual else summed
        changes = [
            mlp(norm(row, block["mlp_norm"], config), block["mlp"], config) for row in read
        ]
        if config.post_norms:
            changes = [norm(row, block["mlp_post_norm"], config) for row in changes]
        x = [row + change for row, change in zip(summed, changes, strict=True)]
    return np.array([norm(row, top["final_norm"], config) for row in x])


def logits(config: ModelConfig, params: Any, tokens: list[int]) -> np.ndarray:
    """f64[T, V]: row t holds the logits of the token after tokens[t]."""
    kernel = params["embedding"] if config.tied_embeddings else params["head"]["kernel"]
    return capped(
        hidden_states(config, params, tokens) @ np.asarray(kernel, np.float64).T,
        config.final_logit_softcap,
    )


def scalars(config: ModelConfig, params: Any, tokens: list[int]) -> np.ndarray:
    """f64[T]: the output of the scalar head."""
    return np.array(
        [
            linear(row, float64(params["scalar_head"]))
            for row in hidden_states(config, params, tokens)
        ]
    )


def logprobs(
    config: ModelConfig, params: Any, tokens: list[int], temperature: float = 1.0
) -> np.ndarray:
    """f64[T, V]: row t holds the log-probabilities of the token after tokens[t]."""
    scaled = logits(config, params, tokens) / temperature
    return scaled - np.log(np.sum(np.exp(scaled), axis=-1, keepdims=True))
