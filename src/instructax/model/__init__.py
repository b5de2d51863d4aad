"""One decoder-only transformer for the GPT-2/GPT-3 and the Llama families; the only folder that imports flax."""

from instructax.model.attention import BRANCHES, attention_mask, positions_of
from instructax.model.config import ComputeConfig, ModelConfig, while_sampling
from instructax.model.network import (
    Block,
    Cache,
    Dropout,
    Transformer,
    cast_matrices,
    head_kernel,
    init_cache,
    layers_of,
    parameter_count,
)

__all__ = [
    "BRANCHES",
    "Block",
    "Cache",
    "ComputeConfig",
    "Dropout",
    "ModelConfig",
    "Transformer",
    "attention_mask",
    "cast_matrices",
    "head_kernel",
    "init_cache",
    "layers_of",
    "parameter_count",
    "positions_of",
    "while_sampling",
]
