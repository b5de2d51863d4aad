"""The two groups of values that make a network: its architecture, and how a run computes
it."""

import dataclasses
from typing import Literal

from instructax.config import check_range

LAYERS = 10_000  # a network has fewer: a list of them is made even to estimate it


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How rotary positions are stretched over longer texts than the first ones.

    "linear" divides all frequencies by `factor` (Chen et al., 2023). "llama3" divides those
    that turn fewer than `low_freq_factor` times over `original_max_length`, leaves those that turn
    more than `high_freq_factor` times, and passes smoothly from the one to the other (Llama 3.1);
    "linear" reads neither of the three.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int  # tokens

    def __post_init__(self):
        check_range(
            self,
            {
                "factor": 1,
                "low_freq_factor": 0,
                "high_freq_factor": 0,
                "original_max_length": 1,
            },
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rotary_scaling.high_freq_factor = {self.high_freq_factor} must be above "
                f"rotary_scaling.low_freq_factor = {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture; it travels with the parameters from stage to stage."""

    vocab_size: int
    max_length: int  # longest sequence, and the rows of a learned position table
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int  # < heads: grouped queries
    head_dim: int
    mlp_dim: int
    norm: Literal["layernorm", "rmsnorm"]
    norm_epsilon: float
    positions: Literal["learned", "rotary"]
    rotary_base: float  # wavelengths of rotary positions run from 2π to 2π · base; unused by learned ones
    rotary_fraction: float  # of each head's width, the first part, that has rotary positions; the rest has none
    rotary_scaling: RotaryScaling | None
    activation: Literal[
        "gelu", "gelu_exact", "swiglu", "geglu"
    ]  # gelu and geglu in the tanh form
    biases: bool  # of all matrices of the layers
    qkv_biases: bool  # of those to query, key and value alone
    qk_norm: bool  # a norm on each head's query and key
    query_pre_attn_scalar: (
        float  # attention divides scores by its square root; 0 = head_dim
    )
    attention_softcap: float  # c: scores become c · tanh(score / c); 0 = they stay
    sliding_window: int  # tokens that layers in `window_layers` see, the token itself included; 0 = all before it
    window_layers: tuple[int, ...]  # layers, from 0
    parallel_residual: bool  # attention and MLP both read the layer's input
    post_norms: bool  # norms behind attention and MLP, besides those before them
    scale_embedding: bool  # by √width
    tied_embeddings: bool
    final_logit_softcap: float  # as attention_softcap, of the scores of the vocabulary
    init_std: float  # of every matrix; those that write into the residual stream get it divided by √(2 · layers)

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "max_length",
            "num_layers",
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
        )
        least = dict.fromkeys(
            (
                "norm_epsilon",
                "init_std",
                "query_pre_attn_scalar",
                "attention_softcap",
                "final_logit_softcap",
                "sliding_window",
            ),
            0,
        )
        check_range(
            self,
            dict.fromkeys(sizes, 1) | least | {"rotary_base": 1},
            {"num_layers": LAYERS},
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} must be a multiple of model.num_kv_heads = {self.num_kv_heads}"
            )
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(
                f"model.rotary_fraction = {self.rotary_fraction} must be above 0 and at most 1"
            )
        if self.positions == "rotary" and (self.rotary_width % 2 or not self.rotary_width):
            share = (
                f" × model.rotary_fraction = {self.rotary_fraction}"
                if self.rotary_fraction < 1
                else ""
            )
            raise ValueError(
                f"model.head_dim = {self.head_dim}{share} must be even for rotary positions"
            )
        if self.biases and self.qkv_biases:
            raise ValueError(
                "model.qkv_biases = True is for model.biases = False: all matrices have biases already"
            )
        if list(self.window_layers) != sorted(
            {layer for layer in self.window_layers if 0 <= layer < self.num_layers}
        ):
            raise ValueError(
                f"model.window_layers = {self.window_layers} must be rising numbers from 0 to {self.num_layers - 1}"
            )
        if bool(self.sliding_window) != bool(self.window_layers):
            raise ValueError(
                f"model.sliding_window = {self.sliding_window} and model.window_layers = {self.window_layers}: set both, or 0 and () for none"
            )

    @property
    def rotary_width(self) -> int:
        """Components of each head that rotary positions turn."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a third matrix, for its gate."""
        return self.activation in ("swiglu", "geglu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a run computes; free to differ between stages that share parameters."""

    dtype: Literal[
        "float32", "bf16_matmul", "bf16"
    ]  # bf16_matmul: float32, and the matmul_dtype of products rounded to bfloat16
    decoding_dtype: Literal[
        "float32", "bf16_matmul", "bf16"
    ]  # the same of the sampler, which is bound by other things
    attention: Literal[
        "auto", "jax", "cudnn", "splash"
    ]  # kernel of whole rows; "auto": the fastest that surely runs
    remat: Literal[
        "none", "dots", "full"
    ]  # kept for the backward pass: all, matrix products only, layer inputs only
    head_chunk: int  # sequence positions whose vocabulary-wide scores exist at one time
    microbatch_rows: int  # packed rows that a device has in memory at a time, where what is packed is of many lengths
    tail_splits: int  # of a part, for what is left at the end: each halves the padding, and is one more to compile
    slots: int  # responses that a device samples at a time
    compaction_steps: int  # of the slots, for the last responses: steps of half the cost, and one more to compile

    def __post_init__(self):
        check_range(
            self,
            {
                "head_chunk": 1,
                "microbatch_rows": 1,
                "tail_splits": 0,
                "slots": 1,
                "compaction_steps": 0,
            },
        )

    @property
    def activations(self) -> str:
        """The dtype of all that is computed but for norms, softmax and heads, which work in
        float32."""
        return "bfloat16" if self.dtype == "bf16" else "float32"

    @property
    def matmul_dtype(self) -> str:
        """The dtype that matrix products multiply in; they sum in float32."""
        return "float32" if self.dtype == "float32" else "bfloat16"


def decoding_config(compute: ComputeConfig) -> ComputeConfig:
    """How the sampler of a run computes."""
    return dataclasses.replace(compute, dtype=compute.decoding_dtype)
