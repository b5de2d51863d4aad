"""The files of an exported model besides its tensors: its class and token ids in
config.json, its tokenizer and its README."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import instructax
from instructax.checkpoints.parents import Head
from instructax.data.tokenizer import Tokenizer, save_tokenizer
from instructax.models.config import ModelConfig
from instructax.models.pretrained import save

# Key of config.json for the bias of the scalar head, if no norm can absorb it.
SCORE_BIAS = "instructax_score_bias"
# Family → the prefix of its classes in transformers, and the suffix of the language model.
CLASSES = {
    "gpt2": ("GPT2", "LMHeadModel"),
    "gpt_neox": ("GPTNeoX", "ForCausalLM"),
    "llama": ("Llama", "ForCausalLM"),
    "mistral": ("Mistral", "ForCausalLM"),
    "qwen2": ("Qwen2", "ForCausalLM"),
    "qwen3": ("Qwen3", "ForCausalLM"),
    "gemma": ("Gemma", "ForCausalLM"),
    "gemma2": ("Gemma2", "ForCausalLM"),
}


def class_config(family: str, head: Head, tokenizer: Tokenizer) -> dict[str, Any]:
    """The values of config.json that depend on the class that loads the export.

    Args:
      family: a key of CLASSES.
      head: head of the exported network.
      tokenizer: its tokenizer.

    Returns:
      Names and values to add to config.json.
    """
    name, suffix = CLASSES[family]
    # Texts have no start token, but transformers expects one: it gets the end token.
    raw: dict[str, Any] = {
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        "use_cache": True,
    }
    if head == "tokens":
        raw["architectures"] = [name + suffix]
        raw["pad_token_id"] = None
        return raw
    # One label makes transformers treat the output as a score, not as a class.
    raw["architectures"] = [f"{name}ForSequenceClassification"]
    raw["id2label"] = {"0": "score"}
    raw["label2id"] = {"score": 0}
    raw["pad_token_id"] = _padding_id(tokenizer)
    return raw


def _padding_id(tokenizer: Tokenizer) -> int | None:
    """An id that never occurs in text and is not the end token; None if there is none.

    Transformers reads the score at the last token before the padding, so padding with the
    end token would move it.
    """
    # Tokens such as <|pad|>: the tokenizer never produces them from plain text.
    special = set()
    for token in json.loads(tokenizer.content)["added_tokens"]:
        if token.get("special"):
            special.add(token["id"])
    # Special tokens first, then ids that the tokenizer does not use. The lowest one, so
    # that exports of the same run are equal.
    candidates = sorted(special - {tokenizer.eos_id}) or tokenizer.unused_ids()
    return candidates[0] if candidates else None


def write_tokenizer(
    to: Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    raw: Mapping[str, Any],
    kept_files: Path,
) -> None:
    """Writes the tokenizer, and the chat template of an import if there is one."""
    save_tokenizer(tokenizer, str(to / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
    }
    # A padding id without a text cannot be named here; config.json has its number.
    padding = raw["pad_token_id"]
    if padding is not None and tokenizer.token(padding):
        values["pad_token"] = tokenizer.token(padding)
    save.write_hf_json(to / "tokenizer_config.json", values)
    # Copied, not generated: a template is code of the imported model.
    if (kept_files / "chat_template.jinja").is_file():
        shutil.copyfile(kept_files / "chat_template.jinja", to / "chat_template.jinja")


def write_readme(
    to: Path, manifest: Mapping[str, Any], head: Head, raw: Mapping[str, Any]
) -> None:
    """Writes README.md: how to load the exported model, and what to know about it."""
    auto_class = "AutoModelForCausalLM"
    if head == "scalar":
        auto_class = "AutoModelForSequenceClassification"
    paragraphs = [
        f"A run of the stage `{manifest['stage']}`, exported by instructax "
        f"{instructax.__version__}.",
        f"Load it with `transformers.{auto_class}.from_pretrained`. It was trained on text "
        "without added special tokens: encode with `add_special_tokens=False`; a text ends "
        "with the end token.",
    ]
    # Each paragraph below is a case where a plain `from_pretrained` gives other results.
    if raw["model_type"] == "qwen2":
        paragraphs.append(
            "AutoTokenizer of transformers 5 replaces the word splitting of every qwen2 "
            "tokenizer by Qwen's own: unless this is Qwen's tokenizer, load it with "
            "`transformers.PreTrainedTokenizerFast.from_pretrained`."
        )
    if head == "scalar":
        paragraphs.append(
            "The score is the output at the last token of prompt and response, the end "
            "token included."
        )
        if raw["pad_token_id"] is None:
            paragraphs.append(
                "The tokenizer has no padding token: score one text at a time."
            )
        if SCORE_BIAS in raw:
            paragraphs.append(
                f"The classes of transformers have no bias here: add `{SCORE_BIAS}` of "
                f"`config.json`, {raw[SCORE_BIAS]}, to each score. Comparisons do not "
                "depend on it."
            )
    text = "\n\n".join(paragraphs) + "\n"
    (to / "README.md").write_text(text, encoding="utf-8")
