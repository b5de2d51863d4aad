"""Tiny networks and inputs for the tests: both model families, two layers, all dimensions different.

Every number of a config can be changed by name, as in `gpt_config(layers=3)`. The sizes differ from one another, so
that an exchange of two axes is an error of shape; the parameters of `random_params` are large and nowhere zero or one,
so that a forgotten bias or scale shows in the outputs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.model import ComputeConfig, ModelConfig, Transformer
from instructax.optimizer import OptimizerConfig
from instructax.types import Params, Prompts

VOCAB_SIZE = 23


def gpt_config(**changes: Any) -> ModelConfig:
    """The GPT-2/GPT-3 family: layer norms, learned positions, GELU, biases, tied head."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_length": 40,
        "layers": 2,
        "width": 16,
        "heads": 4,
        "kv_heads": 4,
        "head_width": 6,
        "mlp_width": 28,
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
        "positions": "learned",
        "rotary_base": 10000.0,
        "activation": "gelu",
        "biases": True,
        "tied_head": True,
        "init_std": 0.2,
    }
    return ModelConfig(**{**values, **changes})


def llama_config(**changes: Any) -> ModelConfig:
    """The Llama family: RMS norms, rotary positions, grouped queries, SwiGLU, no biases, untied head."""
    family: dict[str, Any] = {
        "kv_heads": 2,
        "norm": "rmsnorm",
        "positions": "rotary",
        "rotary_base": 100.0,
        "activation": "swiglu",
        "biases": False,
        "tied_head": False,
    }
    return gpt_config(**{**family, **changes})


def compute(**changes: Any) -> ComputeConfig:
    """float32, nothing recomputed, and a chunk that divides few lengths."""
    values: dict[str, Any] = {
        "dtype": "float32",
        "decoding": "float32",
        "remat": "none",
        "head_chunk": 4,
        "part_rows": 8,
        "part_halvings": 0,
        "slots": 3,
    }
    return ComputeConfig(**{**values, **changes})


def optimizer_config(**changes: Any) -> OptimizerConfig:
    """Adam with the paper's betas, a constant learning rate, no clipping, no decay."""
    values: dict[str, Any] = {
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_steps": 0,
        "warmup_from": 1.0,
        "final_fraction": 1.0,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
    }
    return OptimizerConfig(**{**values, **changes})


def ragged_prompts(lengths: Sequence[int], *, columns: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Prompts:
    """Left-padded prompts of the given lengths, [len(lengths), columns]; the padded cells hold random ids, not one id.

    The tokens of a prompt depend on `seed` and its row alone: more columns only add padding on the left.
    """
    tokens = np.random.default_rng([seed, 1]).integers(vocab_size, size=(len(lengths), columns))
    for row, length in enumerate(lengths):
        tokens[row, columns - length :] = np.random.default_rng([seed, 0, row]).integers(vocab_size, size=length)
    mask = np.arange(columns)[None, :] >= columns - np.asarray(lengths)[:, None]
    return Prompts(tokens=jnp.asarray(tokens, jnp.int32), mask=jnp.asarray(mask))


def random_params(model: Transformer, seed: int = 0) -> Params:
    """Parameters with noise of standard deviation 0.3 on every number; the scales of norms lie around 1."""
    blank = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), blank, blank, blank)["params"]
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
