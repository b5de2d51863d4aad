"""One decoder-only transformer for all families of models; the only folder that imports flax."""

from instructax.models.attention import BRANCHES, attention_mask, positions_of
from instructax.models.config import ComputeConfig, ModelConfig, RotaryScaling, while_sampling
from instructax.models.kv_cache import Cache, init_cache
from instructax.models.layers import Block, Dropout
from instructax.models.lora import LoraConfig, adapted, joined, merged, trained
from instructax.models.transformer import Transformer, cast_matrices, head_kernel, layers_of, parameter_count

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
