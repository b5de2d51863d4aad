"""One decoder-only transformer for all families of models; the only folder that imports flax."""

from instructax.model.adapters import LoraConfig, adapted, joined, merged, trained
from instructax.model.attention import BRANCHES, attention_mask, positions_of
from instructax.model.cache import Cache, init_cache
from instructax.model.config import ComputeConfig, ModelConfig, RotaryScaling, while_sampling
from instructax.model.layers import Block, Dropout
from instructax.model.network import (
    Transformer,
    cast_matrices,
    head_kernel,
    layers_of,
    parameter_count,
)

__all__ = [
    "BRANCHES",
    "Block",
    "Cache",
    "ComputeConfig",
    "Dropout",
    "LoraConfig",
    "ModelConfig",
    "RotaryScaling",
    "Transformer",
    "adapted",
    "attention_mask",
    "cast_matrices",
    "head_kernel",
    "init_cache",
    "joined",
    "layers_of",
    "merged",
    "parameter_count",
    "positions_of",
    "trained",
    "while_sampling",
]
