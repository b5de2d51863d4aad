"""The two configs of a network: its architecture, and how a run computes it."""

import dataclasses
from typing import Literal

from instructax.config import ConfigError, check_range

# Exclusive bound: a list of the layers is built even to estimate a network's memory.
MAX_LAYERS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Scaling of rotary positions to longer sequences than those of pretraining.

    "linear" divides all frequencies by `factor` (Chen et al., 2023) and reads no other
    field. "llama3" (Llama 3.1) compares how often a frequency turns over
    `original_max_length` tokens: below `low_freq_factor` turns it is divided by `factor`,
    above `high_freq_factor` turns it is unchanged, and between the two it is interpolated.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    # Turns
    low_freq_factor: float
    # Turns
    high_freq_factor: float
    # Tokens
    original_max_length: int

    def __post_init__(self):
        least = {
            "factor": 1,
            "low_freq_factor": 0,
            "high_freq_factor": 0,
            "original_max_length": 1,
        }
        check_range(self, least)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rotary_scaling.high_freq_factor = {self.high_freq_factor} must be above "
                f"rotary_scaling.low_freq_factor = {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. It is stored with the parameters and passed from stage to stage."""

    vocab_size: int
    # Tokens; also the size of a learned position table
    max_length: int
    num_layers: int
    embed_dim: int
    num_heads: int
    # < num_heads: grouped-query attention
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm: Literal["layernorm", "rmsnorm"]
    norm_epsilon: float
    positions: Literal["learned", "rotary"]
    # Wavelengths run from 2π to 2π · base
    rotary_base: float
    # Of head_dim, the leading components that are rotated
    rotary_fraction: float
    rotary_scaling: RotaryScaling | None
    # "gelu" and "geglu" use the tanh approximation.
    activation: Literal["gelu", "gelu_exact", "swiglu", "geglu"]
    # On all linear maps of the layers
    biases: bool
    # On query, key and value only
    qkv_biases: bool
    # A norm on the query and key of each head
    qk_norm: bool
    # Scores are divided by its root; 0 = head_dim
    query_pre_attn_scalar: float
    # c: score → c · tanh(score / c); 0 = off
    attention_softcap: float
    # Tokens seen by `window_layers`, itself included; 0 = off
    sliding_window: int
    # Indices of the layers with a sliding window
    window_layers: tuple[int, ...]
    # Attention and MLP both read the layer's input
    parallel_residual: bool
    # Norms after attention and MLP, besides those before them
    post_norms: bool
    # Multiply embeddings by √embed_dim
    scale_embedding: bool
    # The output head is the embedding table
    tied_embeddings: bool
    # As attention_softcap, on the logits
    final_logit_softcap: float
    # Of all matrices; output projections divide it by √(2 · num_layers)
    init_std: float

    def __post_init__(self):
        least = {
            "vocab_size": 1,
            "max_length": 1,
            "num_layers": 1,
            "embed_dim": 1,
            "num_heads": 1,
            "num_kv_heads": 1,
            "head_dim": 1,
            "mlp_dim": 1,
            "norm_epsilon": 0,
            "init_std": 0,
            "query_pre_attn_scalar": 0,
            "attention_softcap": 0,
            "final_logit_softcap": 0,
            "sliding_window": 0,
            "rotary_base": 1,
        }
        check_range(self, least, {"num_layers": MAX_LAYERS})
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads = {self.num_heads} must be a multiple of "
                f"model.num_kv_heads = {self.num_kv_heads}"
            )
        if self.biases and self.qkv_biases:
            raise ConfigError(
                "model.qkv_biases = True requires model.biases = False: all linear maps "
                "have biases already"
            )
        self._check_rotary()
        self._check_windows()

    def _check_rotary(self) -> None:
        if not 0 < self.rotary_fraction <= 1:
            raise ConfigError(
                f"model.rotary_fraction = {self.rotary_fraction} must be above 0 and at "
                "most 1"
            )
        # Components are rotated in pairs.
        paired = self.rotary_dim > 0 and self.rotary_dim % 2 == 0
        if self.positions == "rotary" and not paired:
            fraction = ""
            if self.rotary_fraction < 1:
                fraction = f" × model.rotary_fraction = {self.rotary_fraction}"
            raise ConfigError(
                f"model.head_dim = {self.head_dim}{fraction} must be even for rotary "
                "positions"
            )

    def _check_windows(self) -> None:
        valid = {layer for layer in self.window_layers if 0 <= layer < self.num_layers}
        if list(self.window_layers) != sorted(valid):
            raise ConfigError(
                f"model.window_layers = {self.window_layers} must be increasing indices "
                f"from 0 to {self.num_layers - 1}"
            )
        if bool(self.sliding_window) != bool(self.window_layers):
            raise ConfigError(
                f"model.sliding_window = {self.sliding_window} and model.window_layers = "
                f"{self.window_layers}: set both, or 0 and () for no window"
            )

    @property
    def rotary_dim(self) -> int:
        """Components of each head that rotary positions rotate."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a gate, a third matrix."""
        return self.activation in ("swiglu", "geglu")


ComputeDtype = Literal["float32", "bf16_matmul", "bf16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a run computes. Stages that share parameters may differ in it.

    Parameters are float32 in all cases. "float32" computes in float32. "bf16_matmul" keeps
    activations in float32 and rounds the operands of matrix products to bfloat16. "bf16"
    also keeps activations in bfloat16, which the field calls mixed precision.
    """

    dtype: ComputeDtype
    # Of the sampler, which has other bottlenecks
    decoding_dtype: ComputeDtype
    # "auto" picks the platform's fused kernel where it is known to run. The fused kernels
    # are experimental: they have never run on an accelerator.
    attention: Literal["auto", "jax", "cudnn", "splash"]
    # Saved for the backward pass: everything, matrix products only, or layer inputs only.
    remat: Literal["none", "dots", "full"]
    # Positions per row whose logits exist at one time
    head_chunk: int
    # Packed rows per device in memory at one time
    microbatch_rows: int
    # Halvings of the microbatch for the last rows; each compiles one more program
    tail_splits: int
    # Responses that a device samples at one time
    slots: int
    # Halvings of the slots for the last responses; each compiles one more program
    compaction_steps: int

    def __post_init__(self):
        least = {
            "head_chunk": 1,
            "microbatch_rows": 1,
            "tail_splits": 0,
            "slots": 1,
            "compaction_steps": 0,
        }
        check_range(self, least)

    @property
    def activation_dtype(self) -> str:
        """Dtype of activations. Norms, softmax and heads always compute in float32."""
        return "bfloat16" if self.dtype == "bf16" else "float32"

    @property
    def matmul_dtype(self) -> str:
        """Dtype of the operands of matrix products, which accumulate in float32."""
        return "float32" if self.dtype == "float32" else "bfloat16"


def decoding_config(compute: ComputeConfig) -> ComputeConfig:
    """The config of the sampler: `decoding_dtype` becomes its dtype."""
    return dataclasses.replace(compute, dtype=compute.decoding_dtype)
