"""The one table of names and shapes: which tensors of a family's files are which of our
parameters.

A tensor's layout names its axes as the file has them; axes joined by `*` are one axis
there. `V` vocabulary, `T` positions, `D` width, `F` MLP width, `H` heads, `G` heads of keys
and values, `d` head width, `3` query, key and value in one tensor, whose `G` and `H` are
equal. `{}` in a name is the layer.
"""

import dataclasses
import math

import numpy as np

from instructax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a file, or one of each layer."""

    name: str
    layout: str
    leaves: tuple[str, ...]  # our parameters in it; of a layer, those under `blocks`
    plus: float = 0.0  # ours are theirs plus this


QKV = ("query", "key", "value")
# Our own layouts, of one layer; a leaf that is not here has the axis of its norm or bias.
AXES = {
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
    """The axes of a parameter, of one layer."""
    return AXES.get(leaf, "D").split()


def _fused(name: str, layout: str, part: str) -> Row:
    return Row(name, layout, tuple(f"attention/{which}/{part}" for which in QKV))


def _norm(name: str, leaf: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", "D", (f"{leaf}/scale",)), Row(
        f"{name}.bias", "D", (f"{leaf}/bias",)
    )


def _linear(name: str, layout: str, leaf: str) -> tuple[Row, Row]:
    """A matrix that maps the last axis of `layout` to the others (torch's Linear), and its
    bias."""
    out = layout.rpartition(" ")[0]
    return Row(f"{name}.weight", layout, (f"{leaf}/kernel",)), Row(
        f"{name}.bias", out, (f"{leaf}/bias",)
    )


SCORE = Row("score.weight", "1 D", ("scalar_head/kernel",))
GPT2 = (
    Row("transformer.wte.weight", "V D", ("embedding",)),
    Row("transformer.wpe.weight", "T D", ("positions",)),
    *_norm("transformer.h.{}.ln_1", "attention_norm"),
    _fused(
        "transformer.h.{}.attn.c_attn.weight", "D 3*H*d", "kernel"
    ),  # Conv1D: inputs first
    _fused("transformer.h.{}.attn.c_attn.bias", "3*H*d", "bias"),
    Row("transformer.h.{}.attn.c_proj.weight", "H*d D", ("attention/out/kernel",)),
    Row("transformer.h.{}.attn.c_proj.bias", "D", ("attention/out/bias",)),
    *_norm("transformer.h.{}.ln_2", "mlp_norm"),
    Row("transformer.h.{}.mlp.c_fc.weight", "D F", ("mlp/up/kernel",)),
    Row("transformer.h.{}.mlp.c_fc.bias", "F", ("mlp/up/bias",)),
    Row("transformer.h.{}.mlp.c_proj.weight", "F D", ("mlp/down/kernel",)),
    Row("transformer.h.{}.mlp.c_proj.bias", "D", ("mlp/down/bias",)),
    *_norm("transformer.ln_f", "final_norm"),
    Row("lm_head.weight", "V D", ("head/kernel",)),
    SCORE,
)
NEOX = (
    Row("gpt_neox.embed_in.weight", "V D", ("embedding",)),
    *_norm("gpt_neox.layers.{}.input_layernorm", "attention_norm"),
    _fused("gpt_neox.layers.{}.attention.query_key_value.weight", "H*3*d D", "kernel"),
    _fused("gpt_neox.layers.{}.attention.query_key_value.bias", "H*3*d", "bias"),
    *_linear("gpt_neox.layers.{}.attention.dense", "D H*d", "attention/out"),
    *_norm("gpt_neox.layers.{}.post_attention_layernorm", "mlp_norm"),
    *_linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "F D", "mlp/up"),
    *_linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "D F", "mlp/down"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    Row("embed_out.weight", "V D", ("head/kernel",)),
    SCORE,
)


def _llama(norms: dict[str, str], plus: float) -> tuple[Row, ...]:
    """Llama and those that took its names; `norms` of a layer, each of which holds its
    scale less `plus`."""
    layer = "model.layers.{}"
    return (
        Row("model.embed_tokens.weight", "V D", ("embedding",)),
        *(
            Row(f"{layer}.{name}.weight", "D", (f"{leaf}/scale",), plus)
            for name, leaf in norms.items()
        ),
        *_linear(f"{layer}.self_attn.q_proj", "H*d D", "attention/query"),
        *_linear(f"{layer}.self_attn.k_proj", "G*d D", "attention/key"),
        *_linear(f"{layer}.self_attn.v_proj", "G*d D", "attention/value"),
        *_linear(f"{layer}.self_attn.o_proj", "D H*d", "attention/out"),
        Row(f"{layer}.self_attn.q_norm.weight", "d", ("attention/query_norm/scale",), plus),
        Row(f"{layer}.self_attn.k_norm.weight", "d", ("attention/key_norm/scale",), plus),
        *_linear(f"{layer}.mlp.gate_proj", "F D", "mlp/gate"),
        *_linear(f"{layer}.mlp.up_proj", "F D", "mlp/up"),
        *_linear(f"{layer}.mlp.down_proj", "D F", "mlp/down"),
        Row("model.norm.weight", "D", ("final_norm/scale",), plus),
        Row("lm_head.weight", "V D", ("head/kernel",)),
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
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "gemma": _llama(_TWO_NORMS, 1.0),  # norms multiply by 1 + weight
    "gemma2": _llama(_FOUR_NORMS, 1.0),
}
# The trunk's part of all names, which files of a bare trunk leave out.
PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."} | dict.fromkeys(
    set(TENSORS) - {"gpt2", "gpt_neox"}, "model."
)


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The length of each axis."""
    c = config
    fixed = {
        "1": 1,
        "3": 3,
        "V": c.vocab_size,
        "T": c.max_length,
        "D": c.embed_dim,
        "F": c.mlp_dim,
    }
    return {**fixed, "H": c.num_heads, "G": c.num_kv_heads, "d": c.head_dim}


def shape_of(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """The shape that the file's tensor must have."""
    sizes = sizes_of(config)
    return tuple(
        math.prod(sizes[axis] for axis in group.split("*")) for group in row.layout.split()
    )


def _axes(row: Row) -> tuple[list[str], list[list[str]]]:
    """(all axes of the file's tensor, the axes of each of our parameters in it), heads
    named alike in fused ones."""
    theirs, ours = (
        row.layout.replace("*", " ").split(),
        [axes_of(leaf) for leaf in row.leaves],
    )
    if "3" in theirs:
        ours = [["H" if axis == "G" else axis for axis in axes] for axes in ours]
    return theirs, ours


def parts_of(tensor: np.ndarray, row: Row, config: ModelConfig) -> list[np.ndarray]:
    """Views of the file's tensor as our parameters, one for each leaf of the row; `plus` is
    not added."""
    sizes, (theirs, ours) = sizes_of(config), _axes(row)
    split = tensor.reshape([sizes[axis] for axis in theirs])
    parts = np.moveaxis(split, theirs.index("3"), 0) if "3" in theirs else split[None]
    rest = [axis for axis in theirs if axis != "3"]
    if "1" in rest:
        parts, rest = (
            parts.squeeze(1 + rest.index("1")),
            [axis for axis in rest if axis != "1"],
        )
    return [
        part.transpose([rest.index(a) for a in axes])
        for part, axes in zip(parts, ours, strict=True)
    ]


def tensor_of(parts: list[np.ndarray], row: Row, config: ModelConfig) -> np.ndarray:
    """The file's tensor from our parameters: the inverse of `parts_of`."""
    theirs, ours = _axes(row)
    rest = [axis for axis in theirs if axis not in ("1", "3")]
    turned = [
        part.transpose([axes.index(a) for a in rest])
        for part, axes in zip(parts, ours, strict=True)
    ]
    joined = np.stack(turned, axis=theirs.index("3")) if "3" in theirs else turned[0]
    return np.ascontiguousarray(joined.reshape(shape_of(row, config)))
