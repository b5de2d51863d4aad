"""GGUF files of llama.cpp in: architecture, tensors and tokenizer of the families llama,
qwen2 and qwen3, dequantised.

Everything is turned into what a Hugging Face folder holds, so that it is read the same way.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import ConfigError, require
from instructax.models.pretrained.hf_folder import Tensors

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# How words are split, by tokenizer.ggml.pre: patterns of llama.cpp's llama-vocab.cpp; "" is
# GPT-2's own.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": "",
    "default": "",
    "smollm": "digits",
    "llama-bpe": _WORDS.format(digits=r"\p{N}{1,3}"),
    "qwen2": _WORDS.format(digits=r"\p{N}"),
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type: tokens that no text has


class GgufFile:
    """One file. Raises ValueError where it is not one, or of a kind that is not read."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise ConfigError(
                f"{path}: the package gguf is not installed: pip install 'instructax[gguf]'"
            ) from None
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # damaged files fail in many ways
            raise ConfigError(f"{path} is damaged or no GGUF file ({error})") from None
        self._path, self._dequantize = path, gguf.dequantize
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self._value("general.architecture")
        require(
            self.architecture in ARCHITECTURES,
            f"{path}: general.architecture = {self.architecture!r} is not supported, only {', '.join(ARCHITECTURES)}",
        )

    def _value(self, name: str, *default: Any) -> Any:
        field = self._fields.get(name)
        if field is None:
            require(bool(default), f"{self._path} lacks {name}")
            return default[0]
        return field.contents()

    def _own(self, name: str, *default: Any) -> Any:
        return self._value(f"{self.architecture}.{name}", *default)

    def config(self) -> dict[str, Any]:
        """What `config.json` would say."""
        scaling = self._own("rope.scaling.type", "none")
        require(
            scaling in ("none", "linear") and "rope_freqs.weight" not in self._tensors,
            f"{self._path}: rope.scaling.type = {scaling!r} or rope_freqs.weight is not supported: give the Hugging "
            "Face folder of the model",
        )
        heads, width = self._own("attention.head_count"), self._own("embedding_length")
        factor = self._own("rope.scaling.factor", 1.0)
        return {
            "model_type": self.architecture,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": width,
            "num_hidden_layers": self._own("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._own("attention.head_count_kv", heads),
            "head_dim": self._own("attention.key_length", width // heads),
            "intermediate_size": self._own("feed_forward_length"),
            "max_position_embeddings": self._own("context_length"),
            "rms_norm_eps": float(
                np.float32(self._own("attention.layer_norm_rms_epsilon"))
            ),
            "rope_theta": float(self._own("rope.freq_base", 10000.0)),
            "rope_scaling": {"rope_type": "linear", "factor": float(factor)}
            if scaling == "linear"
            else None,
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def tensors(self) -> Tensors:
        """Name in a Hugging Face file → a function that reads the tensor, float32."""
        return {self._renamed(name): self._reader(name) for name in self._tensors}

    def _renamed(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer and layer[2] in LAYER:
            return f"model.layers.{layer[1]}.{LAYER[layer[2]]}.{kind}"
        return f"{OTHERS[stem]}.{kind}" if stem in OTHERS else name

    def _reader(self, name: str) -> Callable[[], np.ndarray]:
        tensor, turned = self._tensors[name], re.search(r"attn_([qk])\.weight$", name)

        def read() -> np.ndarray:
            found = np.asarray(
                self._dequantize(tensor.data, tensor.tensor_type), np.float32
            )
            if self.architecture != "llama" or not turned:
                return found
            # llama.cpp turns neighbouring components, so its files have the rows of each
            # head in that order.
            heads = self._own("attention.head_count")
            heads = (
                heads if turned[1] == "q" else self._own("attention.head_count_kv", heads)
            )
            return (
                found.reshape(heads, -1, 2, found.shape[-1])
                .swapaxes(1, 2)
                .reshape(found.shape)
            )

        return read

    def write_tokenizer(self, to: Path) -> None:
        """Writes `tokenizer.json`, and the chat template if there is one, into the folder
        `to`."""
        kind, pre = (
            self._value("tokenizer.ggml.model"),
            self._value("tokenizer.ggml.pre", "default"),
        )
        require(
            kind == "gpt2" and pre in SPLITS,
            f"{self._path}: tokenizer.ggml.model = {kind!r} with tokenizer.ggml.pre = {pre!r} is not read, only gpt2 "
            f"with {', '.join(SPLITS)}: give the Hugging Face folder of the model",
        )
        tokens, kinds = (
            self._value("tokenizer.ggml.tokens"),
            self._value("tokenizer.ggml.token_type"),
        )
        flags = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        added = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        if SPLITS[pre] == "digits":
            first: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}]
        else:
            pattern = {"Regex": SPLITS[pre]}
            first = (
                [
                    {
                        "type": "Split",
                        "pattern": pattern,
                        "behavior": "Isolated",
                        "invert": False,
                    }
                ]
                if SPLITS[pre]
                else []
            )
        last = byte_level | {"use_regex": SPLITS[pre] in ("", "digits")}
        content = {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in added],
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, last]},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "eos_token": tokens[self._value("tokenizer.ggml.eos_token_id")],
                "ignore_merges": pre == "llama-bpe",
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": self._value("tokenizer.ggml.merges"),
            },
        }
        to.mkdir(parents=True, exist_ok=True)
        (to / "tokenizer.json").write_text(
            json.dumps(content, ensure_ascii=False), encoding="utf-8"
        )
        if template := self._value("tokenizer.chat_template", ""):
            (to / "chat_template.jinja").write_text(template, encoding="utf-8")
