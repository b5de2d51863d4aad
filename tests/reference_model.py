"""A slow, plain forward pass in NumPy and float64, written from the definitions: one text, no batch, no padding.

Layers, heads and positions are loops; a query is given only the keys that it may see, so there is no mask; rotary
positions are products of complex numbers. A parameter tree of the library is read by its names.
"""

import math
from typing import Any

import numpy as np

from instructax.model import ModelConfig


def norm(x: np.ndarray, parameters: dict[str, Any], config: ModelConfig) -> np.ndarray:
    """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang and Sennrich, 2019) of one vector."""
    if config.norm == "layernorm":
        return (x - x.mean()) / math.sqrt(x.var() + config.norm_epsilon) * parameters["scale"] + parameters["bias"]
    return x / math.sqrt(np.mean(x**2) + config.norm_epsilon) * parameters["scale"]


def linear(x: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    return np.tensordot(x, parameters["kernel"], axes=x.ndim) + parameters.get("bias", 0.0)


def rotate(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """Turns the complex number (x_i, x_{i + d/2}) by position · base^(−2i/d) (Su et al., 2021)."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * np.exp(1j * position * base ** (-2 * i / len(x))) for i in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def attention(x: list[np.ndarray], parameters: dict[str, Any], config: ModelConfig) -> list[np.ndarray]:
    """Each position attends to itself and those before it; `heads / kv_heads` neighbouring heads share a key."""
    queries, keys, values = ([linear(row, parameters[name]) for row in x] for name in ("query", "key", "value"))
    outputs = []
    for t in range(len(x)):
        mixed = np.zeros((config.heads, config.head_width))
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            query = queries[t][head]
            seen = [keys[s][shared] for s in range(t + 1)]
            if config.positions == "rotary":
                query = rotate(query, t, config.rotary_base)
                seen = [rotate(key, s, config.rotary_base) for s, key in enumerate(seen)]
            weights = np.exp([query @ key / math.sqrt(config.head_width) for key in seen])
            for s, weight in enumerate(weights / weights.sum()):
                mixed[head] += weight * values[s][shared]
        outputs.append(linear(mixed, parameters["out"]))
    return outputs


def mlp(x: np.ndarray, parameters: dict[str, Any], config: ModelConfig) -> np.ndarray:
    up = linear(x, parameters["up"])
    if config.activation == "gelu":  # the tanh form (Hendrycks and Gimpel, 2016)
        up = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:  # SwiGLU (Shazeer, 2020)
        gate = linear(x, parameters["gate"])
        up = up * gate / (1 + np.exp(-gate))
    return linear(up, parameters["down"])


def float64(tree: Any, layer: int | None = None) -> Any:
    """The tree in float64; of stacked parameters, those of one layer."""
    if isinstance(tree, dict):
        return {name: float64(child, layer) for name, child in tree.items()}
    return np.asarray(tree, np.float64) if layer is None else np.asarray(tree[layer], np.float64)


def hidden_states(config: ModelConfig, params: Any, tokens: list[int]) -> np.ndarray:
    """f64[T, D], after the final norm."""
    top = float64({name: child for name, child in params.items() if name != "blocks"})
    x = [top["embedding"][token] for token in tokens]
    if config.positions == "learned":
        x = [row + top["positions"][t] for t, row in enumerate(x)]
    for layer in range(config.layers):
        block = float64(params["blocks"], layer)
        attended = attention([norm(row, block["attention_norm"], config) for row in x], block["attention"], config)
        x = [row + a for row, a in zip(x, attended, strict=True)]
        x = [row + mlp(norm(row, block["mlp_norm"], config), block["mlp"], config) for row in x]
    return np.array([norm(row, top["final_norm"], config) for row in x])


def logits(config: ModelConfig, params: Any, tokens: list[int]) -> np.ndarray:
    """f64[T, V]: row t scores the token after tokens[t]."""
    kernel = params["embedding"] if config.tied_head else params["head"]["kernel"]
    return hidden_states(config, params, tokens) @ np.asarray(kernel, np.float64).T


def scalars(config: ModelConfig, params: Any, tokens: list[int]) -> np.ndarray:
    """f64[T]: the scalar head."""
    return np.array([linear(row, float64(params["scalar_head"])) for row in hidden_states(config, params, tokens)])


def logprobs(config: ModelConfig, params: Any, tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    """f64[T, V]: row t is the log of the distribution of the token after tokens[t]."""
    scaled = logits(config, params, tokens) / temperature
    return scaled - np.log(np.sum(np.exp(scaled), axis=-1, keepdims=True))
