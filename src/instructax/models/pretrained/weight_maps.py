"""One table per family: which tensors of its files are which of our parameters.

A tensor's layout names its axes in the order of the file; axes joined by `*` are flattened
into one. The names are `V` vocabulary, `T` positions, `D` embed dim, `F` MLP dim, `H`
heads, `G` key-value heads, `d` head dim, and `3` for query, key and value fused in one
tensor (then H = G). `LEAF_AXES` gives the same for our parameters. Reshaping and
transposing between the two follows from the names, for reading and for writing.

Example: GPT-NeoX fuses query, key and value per head, "H*3*d D". `split_tensor` reshapes
the tensor to [H, 3, d, D], takes the three parts [H, d, D], and transposes each to our
"D H d". `join_tensor` goes the other way.
"""

import dataclasses
import math

import numpy as np

from instructax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file, or one per layer (`{}` in its name is the layer)."""

    name: str
    layout: str
    # Our parameters in it; for a layer, those under `blocks`
    leaves: tuple[str, ...]
    # Ours = theirs + offset
    offset: float = 0.0


QKV = ("query", "key", "value")
# The axes of our parameters, for one layer. Others, norms and biases, are "D".
LEAF_AXES = {
    "embedding": "V D",
    "positions": "T D",
    "head/kernel": "V D",
    "attention/query/kernel": "D H d",
    "attention/key/kernel": "D G d",
    "attention/value/kernel": "D G d",
    "attention/query/bias": "H d",
    "attention/key/bias": "G d",
    "attention/value/bias": "G d",
    "attention/out/kernel": "H d D",
    "attention/query_norm/scale": "d",
    "attention/key_norm/scale": "d",
    "mlp/up/kernel": "D F",
    "mlp/gate/kernel": "D F",
    "mlp/up/bias": "F",
    "mlp/gate/bias": "F",
    "mlp/down/kernel": "F D",
}


def axes_of(leaf: str) -> list[str]:
    """The axes of one of our parameters, for one layer."""
    return LEAF_AXES.get(leaf, "D").split()


def _fused_qkv(name: str, layout: str, part: str) -> TensorSpec:
    # Query, key and value, in the order of the fused axis "3".
    leaves = tuple(f"attention/{projection}/{part}" for projection in QKV)
    return TensorSpec(name, layout, leaves)


def _norm(name: str, leaf: str) -> tuple[TensorSpec, TensorSpec]:
    scale = TensorSpec(f"{name}.weight", "D", (f"{leaf}/scale",))
    bias = TensorSpec(f"{name}.bias", "D", (f"{leaf}/bias",))
    return scale, bias


def _linear(name: str, layout: str, leaf: str) -> tuple[TensorSpec, TensorSpec]:
    """torch's Linear, whose weight maps the last axis of `layout` to the others, and its
    bias."""
    # torch stores [outputs, inputs]; the bias has the outputs' axes.
    outputs = layout.rpartition(" ")[0]
    weight = TensorSpec(f"{name}.weight", layout, (f"{leaf}/kernel",))
    bias = TensorSpec(f"{name}.bias", outputs, (f"{leaf}/bias",))
    return weight, bias


# The scalar head of sequence classification, in all families.
SCORE = TensorSpec("score.weight", "1 D", ("scalar_head/kernel",))
GPT2 = (
    TensorSpec("transformer.wte.weight", "V D", ("embedding",)),
    TensorSpec("transformer.wpe.weight", "T D", ("positions",)),
    *_norm("transformer.h.{}.ln_1", "attention_norm"),
    # GPT-2 stores Conv1D weights, with the inputs first.
    _fused_qkv("transformer.h.{}.attn.c_attn.weight", "D 3*H*d", "kernel"),
    _fused_qkv("transformer.h.{}.attn.c_attn.bias", "3*H*d", "bias"),
    TensorSpec("transformer.h.{}.attn.c_proj.weight", "H*d D", ("attention/out/kernel",)),
    TensorSpec("transformer.h.{}.attn.c_proj.bias", "D", ("attention/out/bias",)),
    *_norm("transformer.h.{}.ln_2", "mlp_norm"),
    TensorSpec("transformer.h.{}.mlp.c_fc.weight", "D F", ("mlp/up/kernel",)),
    TensorSpec("transformer.h.{}.mlp.c_fc.bias", "F", ("mlp/up/bias",)),
    TensorSpec("transformer.h.{}.mlp.c_proj.weight", "F D", ("mlp/down/kernel",)),
    TensorSpec("transformer.h.{}.mlp.c_proj.bias", "D", ("mlp/down/bias",)),
    *_norm("transformer.ln_f", "final_norm"),
    TensorSpec("lm_head.weight", "V D", ("head/kernel",)),
    SCORE,
)
NEOX = (
    TensorSpec("gpt_neox.embed_in.weight", "V D", ("embedding",)),
    *_norm("gpt_neox.layers.{}.input_layernorm", "attention_norm"),
    _fused_qkv("gpt_neox.layers.{}.attention.query_key_value.weight", "H*3*d D", "kernel"),
    _fused_qkv("gpt_neox.layers.{}.attention.query_key_value.bias", "H*3*d", "bias"),
    *_linear("gpt_neox.layers.{}.attention.dense", "D H*d", "attention/out"),
    *_norm("gpt_neox.layers.{}.post_attention_layernorm", "mlp_norm"),
    *_linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "F D", "mlp/up"),
    *_linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "D F", "mlp/down"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    TensorSpec("embed_out.weight", "V D", ("head/kernel",)),
    SCORE,
)


def _llama(norms: dict[str, str], norm_offset: float) -> tuple[TensorSpec, ...]:
    """Llama and the families that follow its names.

    Args:
      norms: their name of each norm of a layer → ours.
      norm_offset: our scale of a norm is theirs plus this.
    """
    layer = "model.layers.{}"
    attention = f"{layer}.self_attn"

    def norm(name: str, layout: str, leaf: str) -> TensorSpec:
        return TensorSpec(f"{name}.weight", layout, (f"{leaf}/scale",), norm_offset)

    # Tensors that a family does not have, such as q_norm outside Qwen3, match no parameter
    # and are skipped.
    layer_norms = [norm(f"{layer}.{name}", "D", leaf) for name, leaf in norms.items()]
    return (
        TensorSpec("model.embed_tokens.weight", "V D", ("embedding",)),
        *layer_norms,
        *_linear(f"{attention}.q_proj", "H*d D", "attention/query"),
        *_linear(f"{attention}.k_proj", "G*d D", "attention/key"),
        *_linear(f"{attention}.v_proj", "G*d D", "attention/value"),
        *_linear(f"{attention}.o_proj", "D H*d", "attention/out"),
        norm(f"{attention}.q_norm", "d", "attention/query_norm"),
        norm(f"{attention}.k_norm", "d", "attention/key_norm"),
        *_linear(f"{layer}.mlp.gate_proj", "F D", "mlp/gate"),
        *_linear(f"{layer}.mlp.up_proj", "F D", "mlp/up"),
        *_linear(f"{layer}.mlp.down_proj", "D F", "mlp/down"),
        norm("model.norm", "D", "final_norm"),
        TensorSpec("lm_head.weight", "V D", ("head/kernel",)),
        SCORE,
    )


_TWO_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
LLAMA = _llama(_TWO_NORMS, 0.0)
TENSORS = {
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    # Gemma's norms multiply by 1 + weight.
    "gemma": _llama(_TWO_NORMS, 1.0),
    "gemma2": _llama(_FOUR_NORMS, 1.0),
}
# Prefix of the trunk's tensors, which files of a bare trunk leave out.
PREFIXES = {
    "gpt2": "transformer.",
    "gpt_neox": "gpt_neox.",
    "llama": "model.",
    "mistral": "model.",
    "qwen2": "model.",
    "qwen3": "model.",
    "gemma": "model.",
    "gemma2": "model.",
}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each axis."""
    return {
        "1": 1,
        "3": 3,
        "V": config.vocab_size,
        "T": config.max_length,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "d": config.head_dim,
    }


def tensor_shape(spec: TensorSpec, config: ModelConfig) -> tuple[int, ...]:
    """The shape of the file's tensor."""
    # Axes that are joined by `*` are one dimension of the file's tensor.
    sizes = axis_sizes(config)
    shape = []
    for group in spec.layout.split():
        axes = group.split("*")
        shape.append(math.prod(sizes[axis] for axis in axes))
    return tuple(shape)


def _axes(spec: TensorSpec) -> tuple[list[str], list[list[str]]]:
    """The axes of the file's tensor, and of each of our parameters in it. In fused tensors
    key-value heads are called `H` too."""
    # "H*3*d D" → ["H", "3", "d", "D"]
    theirs = spec.layout.replace("*", " ").split()
    ours = [axes_of(leaf) for leaf in spec.leaves]
    if "3" not in theirs:
        return theirs, ours
    renamed = []
    for axes in ours:
        renamed.append(" ".join(axes).replace("G", "H").split())
    return theirs, renamed


def split_tensor(
    tensor: np.ndarray, spec: TensorSpec, config: ModelConfig
) -> list[np.ndarray]:
    """Views of the file's tensor as our parameters, one per leaf; `offset` is not added."""
    # [H · 3 · d, D] → [H, 3, d, D], for example.
    sizes = axis_sizes(config)
    theirs, ours = _axes(spec)
    unflattened = tensor.reshape([sizes[axis] for axis in theirs])

    # One part per leaf, on a leading axis: [parts, *rest].
    if "3" in theirs:
        parts = np.moveaxis(unflattened, theirs.index("3"), 0)
    else:
        parts = unflattened[None]
    rest = [axis for axis in theirs if axis != "3"]
    # The scalar head's output axis, which our kernel does not have.
    if "1" in rest:
        parts = parts.squeeze(1 + rest.index("1"))
        rest.remove("1")

    views = []
    # Transposing makes views; `load.write_parameter` copies them chunk by chunk.
    for part, axes in zip(parts, ours, strict=True):
        views.append(part.transpose([rest.index(axis) for axis in axes]))
    return views


def join_tensor(
    parts: list[np.ndarray], spec: TensorSpec, config: ModelConfig
) -> np.ndarray:
    """The file's tensor from our parameters: the inverse of `split_tensor`."""
    theirs, ours = _axes(spec)
    # Axes of one part; "1" comes back by the reshape, "3" by the stack.
    rest = [axis for axis in theirs if axis not in ("1", "3")]
    transposed = []
    for part, axes in zip(parts, ours, strict=True):
        transposed.append(part.transpose([axes.index(axis) for axis in rest]))
    # Only fused tensors have several parts.
    joined = transposed[0]
    if "3" in theirs:
        joined = np.stack(transposed, axis=theirs.index("3"))
    return np.ascontiguousarray(joined.reshape(tensor_shape(spec, config)))
