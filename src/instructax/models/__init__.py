"""One decoder-only transformer for all model families; only this package imports flax."""

from instructax.models.attention import (
    SEGMENTS_PER_PREFIX,
    attention_mask,
    positions_from_mask,
)
from instructax.models.config import (
    ComputeConfig,
    ModelConfig,
    RotaryScaling,
    decoding_config,
)
from instructax.models.kv_cache import Cache, init_cache
from instructax.models.layers import Block, Dropout
from instructax.models.lora import LoraConfig, add_lora, merge_lora, merge_trees, trainable
from instructax.models.transformer import (
    Transformer,
    cast_matrices,
    head_kernel,
    parameter_count,
    unstack_layers,
)

__all__ = [
    "SEGMENTS_PER_PREFIX",
    "Block",
    "Cache",
    "ComputeConfig",
    "Dropout",
    "LoraConfig",
    "ModelConfig",
    "RotaryScaling",
    "Transformer",
    "add_lora",
    "attention_mask",
    "cast_matrices",
    "decoding_config",
    "head_kernel",
    "init_cache",
    "merge_lora",
    "merge_trees",
    "parameter_count",
    "positions_from_mask",
    "trainable",
    "unstack_layers",
]
