"""Text to token ids and back.

Supports bytes, GPT-2's files, any Hugging Face `tokenizer.json`, and byte-level BPE trained
here. All of them become the content of one `tokenizer.json`, so there is one way to encode,
one to decode, and one hash. Text is never parsed for special tokens: the end token and the
special tokens of a file are removed from the vocabulary that encodes, so only the caller
can place their ids. Added tokens that are not special, such as runs of spaces, are ordinary
pieces of text. The paper uses GPT-3's BPE (appendix C), which is GPT-2's (Radford et al.,
2019).
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from instructax.config import ConfigError
from instructax.data import tokenizer_json
from instructax.data.tokenizer_json import END_OF_TEXT
from instructax.runtime.files import open_no_follow

# (merges, vocabulary): OpenAI's names, and Hugging Face's.
GPT2_FILES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# 256 bytes and the end of text.
MIN_VOCAB_SIZE = 257


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fixed map between text and ids; made by `load_tokenizer` or `train_bpe`."""

    # Ids are 0 .. size - 1, including special tokens.
    size: int
    # The token that ends a text.
    eos_id: int
    # SHA-256 of `content`, in hex: equal hashes mean equal ids for every text.
    hash: str
    # Canonical JSON, as `save_tokenizer` writes it.
    content: str = dataclasses.field(repr=False, compare=False)
    _tokens: dict[int, str] = dataclasses.field(repr=False, compare=False)
    # Symbol of `_tokens` → byte; empty unless tokens are spelled in byte symbols.
    _byte_of: dict[str, int] = dataclasses.field(repr=False, compare=False)
    _backend: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, i32[T]. Nothing is added, and no special token is recognized.

        Raises ConfigError if `text` contains a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """`encode` of each text, computed on all cores."""
        # The backend would fail without naming the text.
        checked = [_valid_unicode(text) for text in texts]
        encodings = self._backend.encode_batch_fast(checked, add_special_tokens=False)
        ids = []
        for encoding in encodings:
            ids.append(np.asarray(encoding.ids, np.int32))
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, i32[T]. Special tokens are spelled out, and broken UTF-8
        becomes U+FFFD.

        An unused id reads `<|unused 7|>`. Raises ValueError if an id is outside
        0 .. size - 1.
        """
        # Python integers: they index the dict of tokens.
        values = np.asarray(ids).tolist()
        for value in values:
            if not 0 <= value < self.size:
                raise ValueError(
                    f"token id {value} is not in this tokenizer of size {self.size} "
                    f"(0 .. {self.size - 1})"
                )
        tokens = [self._tokens.get(value, f"<|unused {value}|>") for value in values]
        decoder = self._backend.decoder
        return decoder.decode(tokens) if decoder else " ".join(tokens)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token, of which several may make one character."""
        token = self._tokens.get(index, "")
        if self._byte_of:
            return bytes(self._byte_of[symbol] for symbol in token)
        # SentencePiece's spelling of a byte that no piece has.
        if BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return self.decode([index]).encode()

    def token(self, index: int) -> str:
        """The name of a token in the file, or "" for an unused id."""
        ids = tokenizer_json.token_ids(json.loads(self.content))
        for token, token_id in ids.items():
            if token_id == index:
                return token
        return ""

    def added_text_tokens(self) -> list[str]:
        """The added tokens that are pieces of text, such as runs of spaces."""
        content = json.loads(self.content)
        special = tokenizer_json.special_tokens(content)
        tokens = [token["content"] for token in content["added_tokens"]]
        return [token for token in tokens if token not in special]

    def unused_ids(self) -> list[int]:
        """The ids without a token, in ascending order."""
        # Ids between tokens, and those added by `pad_vocab`.
        return sorted(set(range(self.size)) - self._tokens.keys())

    def tokens_containing(self, text: str) -> np.ndarray:
        """Marks the tokens that contain `text`, such as a line break: b[size]."""
        return np.array([text in self.decode([token]) for token in range(self.size)])


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a tokenizer.

    - `"bytes"`: ids 0 .. 255 are the bytes of UTF-8, and 256 ends a text.
    - A folder with `vocab.bpe` and `encoder.json`, or with `merges.txt` and `vocab.json`
      but no `tokenizer.json`: GPT-2's BPE, ended by `<|endoftext|>`.
    - A `tokenizer.json`, or a folder that contains one: Hugging Face. The end token is the
      one that `save_tokenizer` noted in the file, else `eos_token` of the
      `tokenizer_config.json` beside it, else the first of `EOS_CANDIDATES` in the
      vocabulary. Everything that adds to a text or cuts it (post-processor, truncation,
      padding) and BPE dropout are disabled.

    Raises ConfigError if there is nothing at `path`, or if it cannot be used.
    """
    if path == "bytes":
        # The id of each byte is its value.
        vocab = {symbol: byte for byte, symbol in enumerate(tokenizer_json.byte_symbols())}
        vocab[END_OF_TEXT] = 256
        return _build(tokenizer_json.byte_level_content(vocab, merges=[]))
    if not Path(path).exists():
        raise ConfigError(
            f'no tokenizer at {path}: give "bytes", a tokenizer.json, '
            "or the folder of one or of GPT-2 files"
        )
    try:
        return _build(_file_content(Path(path)))
    except Exception as error:
        # Malformed files fail in many ways, and the backend raises plain `Exception`.
        reason = str(error).partition("\n")[0]
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ConfigError(f"cannot use the tokenizer at {path}: {reason}") from error


def _file_content(path: Path) -> dict[str, Any]:
    for merges, vocab in GPT2_FILES:
        # Hugging Face may write `merges.txt` beside a complete `tokenizer.json`.
        is_complete = merges == "merges.txt" and (path / "tokenizer.json").exists()
        if (path / merges).exists() and (path / vocab).exists() and not is_complete:
            return tokenizer_json.gpt2_content(path / merges, path / vocab)
    file = path / "tokenizer.json" if path.is_dir() else path
    return tokenizer_json.hugging_face_content(file)


def save_tokenizer(tokenizer: Tokenizer, path: str) -> None:
    """Writes a `tokenizer.json`, from which `load_tokenizer` restores the same hash."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open_no_follow(Path(path), "w") as file:
        file.write(tokenizer.content + "\n")


def pad_vocab(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """Extends `tokenizer` with unused ids up to `size` - 1, for a model whose embedding has
    more rows.

    The hash changes unless `size` is already the tokenizer's.
    """
    if size == tokenizer.size:
        return tokenizer
    content = json.loads(tokenizer.content)
    # Part of the content, so that the hash and the saved file include it.
    content["model"]["padded_size"] = size
    return _build(content)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE with GPT-2's word splitting and `<|endoftext|>` as the only
    special token.

    The same texts give the same tokenizer. It is smaller than `vocab_size` if the texts
    have no more pairs to merge. Raises ConfigError if `vocab_size` is below MIN_VOCAB_SIZE,
    or if a text contains a lone surrogate.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}), "
            f"not {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    # No merge crosses the border of a word.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizer_json.byte_symbols(),
        show_progress=False,
    )
    backend.train_from_iterator(map(_valid_unicode, texts), trainer)
    model = json.loads(backend.to_str())["model"]
    return _build(tokenizer_json.byte_level_content(model["vocab"], model["merges"]))


def _valid_unicode(text: str) -> str:
    """Returns `text`, or raises ConfigError if UTF-8 cannot encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ConfigError(
            f"text contains a lone surrogate, {code} at character {error.start}; "
            "clean it first"
        ) from None
    return text


def _build(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` whose `model.eos_token` names the end token."""
    content = tokenizer_json.canonical_content(content)
    ids = tokenizer_json.token_ids(content)
    # What each id decodes to.
    tokens = {index: token for token, index in ids.items()}
    byte_of: dict[str, int] = {}
    if (content.get("decoder") or {}).get("type") == "ByteLevel":
        # This decoder reads every character as a byte, so it needs added tokens spelled in
        # byte symbols.
        symbols = tokenizer_json.byte_symbols()
        byte_of = {symbol: byte for byte, symbol in enumerate(symbols)}
        for added in content["added_tokens"]:
            token = added["content"]
            tokens[ids[token]] = "".join(symbols[byte] for byte in token.encode())

    # This text is hashed and saved: its spelling must never change.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    # Encoding and decoding differ: only the decoder knows special tokens.
    encoder = tokenizer_json.without_special_tokens(content, ids)
    return Tokenizer(
        size=max(max(ids.values()) + 1, content["model"].get("padded_size", 0)),
        eos_id=ids[content["model"]["eos_token"]],
        hash=hashlib.sha256(text.encode()).hexdigest(),
        content=text,
        _tokens=tokens,
        _byte_of=byte_of,
        _backend=tokenizers.Tokenizer.from_str(json.dumps(encoder)),
    )
