"""Tiny networks and inputs for tests: one config per model family, with two layers.

Any field can be overridden, as in `gpt_config(num_layers=3)`. All dimensions differ, so
swapping two axes is a shape error. `random_params` draws large parameters that are never
zero or one, so a forgotten bias or scale changes the outputs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.models.config import ComputeConfig, ModelConfig, RotaryScaling
from instructax.models.transformer import Transformer
from instructax.training.optimizer import OptimizerConfig
from instructax.types import Params, Prompts

VOCAB_SIZE = 23


def gpt_config(**changes: Any) -> ModelConfig:
    """The GPT-2/GPT-3 family: layer norms, learned positions, GELU, biases, tied head."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_length": 40,
        "num_layers": 2,
        "embed_dim": 16,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 6,
        "mlp_dim": 28,
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
        "positions": "learned",
        "rotary_base": 10000.0,
        "rotary_fraction": 1.0,
        "rotary_scaling": None,
        "activation": "gelu",
        "biases": True,
        "qkv_biases": False,
        "qk_norm": False,
        "query_pre_attn_scalar": 0.0,
        "attention_softcap": 0.0,
        "sliding_window": 0,
        "window_layers": (),
        "parallel_residual": False,
        "post_norms": False,
        "scale_embedding": False,
        "tied_embeddings": True,
        "final_logit_softcap": 0.0,
        "init_std": 0.2,
    }
    return ModelConfig(**{**values, **changes})


def llama_config(**changes: Any) -> ModelConfig:
    """The Llama family: RMS norms, rotary positions, grouped queries, SwiGLU, no biases,
    untied head."""
    family: dict[str, Any] = {
        "num_kv_heads": 2,
        "norm": "rmsnorm",
        "positions": "rotary",
        "rotary_base": 100.0,
        "activation": "swiglu",
        "biases": False,
        "tied_embeddings": False,
    }
    return gpt_config(**{**family, **changes})


def neox_config(**changes: Any) -> ModelConfig:
    """GPT-NeoX: parallel residual, partial rotary positions, exact GELU, untied head."""
    family: dict[str, Any] = {
        "head_dim": 8,
        "positions": "rotary",
        "rotary_fraction": 0.5,
        "activation": "gelu_exact",
        "parallel_residual": True,
        "tied_embeddings": False,
    }
    return gpt_config(**{**family, **changes})


def qwen_config(**changes: Any) -> ModelConfig:
    """Qwen2's biases, Qwen3's query and key norms, and rotary scaling in one config."""
    scaling = RotaryScaling(
        kind="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=3.0,
        original_max_length=16,
    )
    family = {"qkv_biases": True, "qk_norm": True, "rotary_scaling": scaling}
    return llama_config(**{**family, **changes})


def gemma_config(**changes: Any) -> ModelConfig:
    """Gemma 2: post-norms, soft caps, scaled embedding, GEGLU, and a sliding window in the
    first of two layers."""
    family: dict[str, Any] = {
        "activation": "geglu",
        "query_pre_attn_scalar": 9.0,
        "attention_softcap": 2.0,
        "sliding_window": 3,
        "window_layers": (0,),
        "post_norms": True,
        "scale_embedding": True,
        "tied_embeddings": True,
        "final_logit_softcap": 1.5,
    }
    return llama_config(**{**family, **changes})


def compute(**changes: Any) -> ComputeConfig:
    """float32, no remat, and a head chunk that does not divide most lengths."""
    values: dict[str, Any] = {
        "dtype": "float32",
        "decoding_dtype": "float32",
        "attention": "jax",
        "remat": "none",
        "head_chunk": 4,
        "microbatch_rows": 8,
        "tail_splits": 0,
        "slots": 3,
        "compaction_steps": 0,
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


def ragged_prompts(
    lengths: Sequence[int], *, columns: int, vocab_size: int = VOCAB_SIZE, seed: int = 0
) -> Prompts:
    """Left-padded prompts of the given lengths: [len(lengths), columns]. Padding holds
    random ids.

    The tokens of a prompt depend only on `seed` and its row: more columns add padding.
    """
    tokens = np.random.default_rng([seed, 1]).integers(
        vocab_size, size=(len(lengths), columns)
    )
    for row, length in enumerate(lengths):
        tokens[row, columns - length :] = np.random.default_rng([seed, 0, row]).integers(
            vocab_size, size=length
        )
    mask = np.arange(columns)[None, :] >= columns - np.asarray(lengths)[:, None]
    return Prompts(tokens=jnp.asarray(tokens, jnp.int32), mask=jnp.asarray(mask))


def random_params(model: Transformer, seed: int = 0) -> Params:
    """Parameters from N(0, 0.3²); scales of norms from N(1, 0.3²)."""
    blank = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), blank, blank, blank)["params"]
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
