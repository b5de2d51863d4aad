"""The two groups of values that make a network: its architecture, and how a run computes it."""

import dataclasses
from typing import Literal

from instructax.configuration import check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture; it travels with the parameters from stage to stage."""

    vocab_size: int
    max_length: int  # longest sequence, and the rows of a learned position table
    layers: int
    width: int
    heads: int
    kv_heads: int  # < heads: grouped queries
    head_width: int
    mlp_width: int
    norm: Literal["layernorm", "rmsnorm"]
    norm_epsilon: float
    positions: Literal["learned", "rotary"]
    rotary_base: float  # wavelengths of rotary positions run from 2π to 2π · base; unused by learned ones
    activation: Literal["gelu", "swiglu"]
    biases: bool
    tied_head: bool
    init_std: float  # of every matrix; those that write into the residual stream get it divided by √(2 · layers)

    def __post_init__(self):
        sizes = ("vocab_size", "max_length", "layers", "width", "heads", "kv_heads", "head_width", "mlp_width")
        check_range(self, dict.fromkeys(sizes, 1) | {"norm_epsilon": 0, "rotary_base": 1, "init_std": 0})
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads = {self.heads} must be a multiple of model.kv_heads = {self.kv_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"model.head_width = {self.head_width} must be even for rotary positions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a run computes; free to differ between stages that share parameters."""

    dtype: Literal["float32", "mixed", "bfloat16"]  # mixed: float32, and the operands of products rounded to bfloat16
    decoding: Literal["float32", "mixed", "bfloat16"]  # the same of the sampler, which is bound by other things
    remat: Literal["none", "dots", "full"]  # kept for the backward pass: all, matrix products only, layer inputs only
    head_chunk: int  # sequence positions whose vocabulary-wide scores exist at one time
    part_rows: int  # packed rows that a device has in memory at a time, where what is packed is of many lengths
    part_halvings: int  # of a part, for what is left at the end: each halves the padding, and is one more to compile
    slots: int  # responses that a device samples at a time

    def __post_init__(self):
        check_range(self, {"head_chunk": 1, "part_rows": 1, "part_halvings": 0, "slots": 1})

    @property
    def activations(self) -> str:
        """The dtype of all that is computed but for norms, softmax and heads, which work in float32."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @property
    def operands(self) -> str:
        """The dtype that matrix products multiply in; they sum in float32."""
        return "float32" if self.dtype == "float32" else "bfloat16"


def while_sampling(compute: ComputeConfig) -> ComputeConfig:
    """How the sampler of a run computes."""
    return dataclasses.replace(compute, dtype=compute.decoding)
