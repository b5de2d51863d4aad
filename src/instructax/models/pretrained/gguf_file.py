"""Import of llama.cpp's GGUF files: architecture, dequantized tensors and tokenizer of the
families llama, qwen2 and qwen3.

Everything is converted to what a Hugging Face folder holds, and then read in the same way.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import ConfigError, require
from instructax.models.pretrained.hf_folder import Tensors

# Names of tensors in GGUF → in Hugging Face files.
LAYER_TENSORS = {
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
OTHER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# How text is split before BPE, by tokenizer.ggml.pre: the patterns of llama.cpp's
# llama-vocab.cpp. "" is GPT-2's pattern, "digits" splits digits first.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": "",
    "default": "",
    "smollm": "digits",
    "llama-bpe": _SPLIT_PATTERN.format(digits=r"\p{N}{1,3}"),
    "qwen2": _SPLIT_PATTERN.format(digits=r"\p{N}"),
}
# Values of tokenizer.ggml.token_type for tokens that never come from text.
CONTROL = 3
USER_DEFINED = 4


class GgufFile:
    """An open GGUF file. Raises ConfigError if it is not one, or of an unsupported kind."""

    def __init__(self, path: Path):
        try:
            # An optional dependency.
            import gguf
        except ImportError:
            raise ConfigError(
                f"{path}: the package gguf is not installed: pip install 'instructax[gguf]'"
            ) from None
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # damaged files fail in many ways
            raise ConfigError(f"{path} is damaged or no GGUF file ({error})") from None
        self._path = path
        self._dequantize = gguf.dequantize
        self._fields = reader.fields
        # Memory-mapped: opening reads no tensor.
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self._value("general.architecture")
        require(
            self.architecture in ARCHITECTURES,
            f"{path}: general.architecture = {self.architecture!r} is not supported, only "
            f"{', '.join(ARCHITECTURES)}",
        )

    def _value(self, name: str, *default: Any) -> Any:
        """A metadata value. Raises ConfigError if it is absent and has no default."""
        field = self._fields.get(name)
        if field is None:
            require(bool(default), f"{self._path} lacks {name}")
            return default[0]
        return field.contents()

    def _model_value(self, name: str, *default: Any) -> Any:
        return self._value(f"{self.architecture}.{name}", *default)

    def config(self) -> dict[str, Any]:
        """The content of the equivalent `config.json`."""
        scaling_type = self._model_value("rope.scaling.type", "none")
        require(
            scaling_type in ("none", "linear") and "rope_freqs.weight" not in self._tensors,
            f"{self._path}: rope.scaling.type = {scaling_type!r} or rope_freqs.weight is "
            "not supported: give the Hugging Face folder of the model",
        )
        # Llama 3.1's scaling is stored as a tensor of factors, which `config.json` cannot
        # hold.
        scaling = None
        if scaling_type == "linear":
            factor = self._model_value("rope.scaling.factor", 1.0)
            scaling = {"rope_type": "linear", "factor": float(factor)}

        num_heads = self._model_value("attention.head_count")
        embed_dim = self._model_value("embedding_length")
        # The file holds a float32.
        epsilon = np.float32(self._model_value("attention.layer_norm_rms_epsilon"))
        return {
            "model_type": self.architecture,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": embed_dim,
            "num_hidden_layers": self._model_value("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._model_value("attention.head_count_kv", num_heads),
            "head_dim": self._model_value("attention.key_length", embed_dim // num_heads),
            "intermediate_size": self._model_value("feed_forward_length"),
            "max_position_embeddings": self._model_value("context_length"),
            "rms_norm_eps": float(epsilon),
            "rope_theta": float(self._model_value("rope.freq_base", 10000.0)),
            "rope_scaling": scaling,
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def tensors(self) -> Tensors:
        """Tensors by their Hugging Face names; reading gives float32."""
        return {_hf_name(name): self._reader(name) for name in self._tensors}

    def _reader(self, name: str) -> Callable[[], np.ndarray]:
        tensor = self._tensors[name]
        query_or_key = re.search(r"attn_([qk])\.weight$", name)

        def read() -> np.ndarray:
            # One tensor at a time, from its quantized blocks to float32.
            x = self._dequantize(tensor.data, tensor.tensor_type)
            x = np.asarray(x, np.float32)
            if self.architecture != "llama" or not query_or_key:
                return x
            # llama.cpp rotates adjacent components, ours halves, so its llama files have
            # the rows of each head interleaved.
            heads = self._model_value("attention.head_count")
            if query_or_key[1] == "k":
                heads = self._model_value("attention.head_count_kv", heads)
            pairs = x.reshape(heads, -1, 2, x.shape[-1])  # [heads, head_dim / 2, 2, D]
            return pairs.swapaxes(1, 2).reshape(x.shape)

        return read

    def write_tokenizer(self, to: Path) -> None:
        """Writes `tokenizer.json`, and the chat template if there is one, into `to`."""
        model = self._value("tokenizer.ggml.model")
        pre = self._value("tokenizer.ggml.pre", "default")
        require(
            model == "gpt2" and pre in SPLITS,
            f"{self._path}: tokenizer.ggml.model = {model!r} with tokenizer.ggml.pre = "
            f"{pre!r} is not read, only gpt2 with {', '.join(SPLITS)}: give the Hugging "
            "Face folder of the model",
        )
        # The position of a token in this list is its id.
        tokens = self._value("tokenizer.ggml.tokens")
        content = {
            "version": "1.0",
            "added_tokens": self._added_tokens(tokens),
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _pre_tokenizers(pre)},
            "decoder": _byte_level(use_regex=True),
            "model": {
                "type": "BPE",
                "eos_token": tokens[self._value("tokenizer.ggml.eos_token_id")],
                # Llama 3 takes words that are in the vocabulary as they are.
                "ignore_merges": pre == "llama-bpe",
                "vocab": {token: index for index, token in enumerate(tokens)},
                "merges": self._value("tokenizer.ggml.merges"),
            },
        }
        to.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, ensure_ascii=False)
        (to / "tokenizer.json").write_text(text, encoding="utf-8")
        if template := self._value("tokenizer.chat_template", ""):
            (to / "chat_template.jinja").write_text(template, encoding="utf-8")

    def _added_tokens(self, tokens: list[str]) -> list[dict[str, Any]]:
        added = []
        for index, kind in enumerate(self._value("tokenizer.ggml.token_type")):
            # Matched as a whole, before the text is split and merged.
            if kind in (CONTROL, USER_DEFINED):
                token = {
                    "id": index,
                    "content": tokens[index],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                added.append(token)
        return added


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    # "blk.7.attn_q.weight" → "model.layers.7.self_attn.q_proj.weight"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in LAYER_TENSORS:
        return f"model.layers.{layer[1]}.{LAYER_TENSORS[layer[2]]}.{kind}"
    return f"{OTHER_TENSORS[stem]}.{kind}" if stem in OTHER_TENSORS else name


def _pre_tokenizers(pre: str) -> list[dict[str, Any]]:
    """The splitting steps of `tokenizer.json` for a value of tokenizer.ggml.pre."""
    split = SPLITS[pre]
    # A regular expression of its own, or GPT-2's, which ByteLevel has built in.
    if split == "":
        return [_byte_level(use_regex=True)]
    if split == "digits":
        digits = {"type": "Digits", "individual_digits": True}
        return [digits, _byte_level(use_regex=True)]
    pattern = {
        "type": "Split",
        "pattern": {"Regex": split},
        "behavior": "Isolated",
        "invert": False,
    }
    return [pattern, _byte_level(use_regex=False)]


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
