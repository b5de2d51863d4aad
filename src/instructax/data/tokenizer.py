"""Text to token ids and back: bytes, GPT-2's files, any Hugging Face `tokenizer.json`, and
byte-level BPE trained here.

All kinds become the content of one `tokenizer.json`, so there is one way to encode, one to
decode and one hash. Text is never parsed for special tokens: the token that ends a text,
and every added token of a file, are taken out of the vocabulary that encodes, so only the
caller can place their ids. A file that lists ordinary pieces such as runs of blanks as
added tokens therefore encodes them with smaller pieces. The paper uses GPT-3's BPE
(appendix C), which is GPT-2's (Radford et al., 2019).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from instructax.config import ConfigError
from instructax.runtime.files import open_no_follow

END_OF_TEXT = "<|endoftext|>"
EOS_CANDIDATES = (
    END_OF_TEXT,
    "</s>",
    "<|im_end|>",
)  # tried in this order where a file names none
GPT2_FILES = (
    ("vocab.bpe", "encoder.json"),
    ("merges.txt", "vocab.json"),
)  # OpenAI's names, and Hugging Face's
UNKNOWN = "\U0010ffff"  # a code point that stands for no character: text that holds it is unknown all the same


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fixed map between text and ids; made by `load_tokenizer` or `train_bpe`."""

    size: int  # ids are 0 .. size - 1, special ones included
    eos_id: int  # the token that ends a text
    hash: str  # sha256 of `content`, in hex: equal hashes mean equal ids for every text
    content: str = dataclasses.field(
        repr=False, compare=False
    )  # canonical JSON, which `save_tokenizer` writes
    _tokens: dict[int, str] = dataclasses.field(repr=False, compare=False)
    _backend: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, i32[T]: nothing is added, and no added or special
        token is recognised.

        Raises ValueError if `text` holds a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Returns `encode` of each text, computed on all cores."""
        checked = [_valid_unicode(text) for text in texts]
        encodings = self._backend.encode_batch_fast(checked, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`, i32[T], with special tokens spelled out and broken
        UTF-8 as U+FFFD.

        An id that the file leaves free reads `<|unused 7|>`. Raises ValueError if an id is
        outside 0 .. size - 1.
        """
        values = np.asarray(ids).tolist()
        for value in values:
            if not 0 <= value < self.size:
                raise ValueError(
                    f"token id {value} is not in this tokenizer of size {self.size} (0 .. {self.size - 1})"
                )
        tokens = [self._tokens.get(value, f"<|unused {value}|>") for value in values]
        decoder = self._backend.decoder
        return decoder.decode(tokens) if decoder else " ".join(tokens)

    def token(self, index: int) -> str:
        """The name of a token in the file, "" of an id that the file leaves free."""
        return next(
            (
                token
                for token, other in _token_ids(json.loads(self.content)).items()
                if other == index
            ),
            "",
        )

    def unused_ids(self) -> list[int]:
        """The ids that the file leaves free, in rising order: no text has them."""
        return sorted(set(range(self.size)) - self._tokens.keys())

    def tokens_containing(self, text: str) -> np.ndarray:
        """Marks the tokens that hold `text`, such as those with a line break: b[size]."""
        return np.array([text in self.decode([token]) for token in range(self.size)])


def load_tokenizer(path: str) -> Tokenizer:
    """Returns the tokenizer at `path`.

    - `"bytes"`: ids 0 .. 255 are the bytes of UTF-8, 256 ends a text.
    - A folder with `vocab.bpe` and `encoder.json`, or `merges.txt` and `vocab.json` but no `tokenizer.json`: GPT-2's
      BPE, ended by `<|endoftext|>`.
    - A `tokenizer.json`, or a folder that holds one: Hugging Face. The end of text is the token that `save_tokenizer`
      noted in the file, else `eos_token` of a `tokenizer_config.json` beside it, else the first of `EOS_CANDIDATES`
      that the vocabulary has. What adds to a text or cuts it (post-processor, truncation, padding) and BPE dropout are
      switched off.

    Raises ValueError if nothing is at `path`, or if it cannot be used.
    """
    if path == "bytes":
        vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        return _build(_byte_level_content(vocab | {END_OF_TEXT: 256}, merges=[]))
    file = Path(path)
    if not file.exists():
        raise ConfigError(
            f'no tokenizer at {path}: give "bytes", a tokenizer.json, or the folder of one or of GPT-2 files'
        )
    try:
        for merges, vocab in GPT2_FILES:
            whole = merges == "merges.txt" and (file / "tokenizer.json").exists()
            if (file / merges).exists() and (file / vocab).exists() and not whole:
                return _build(_gpt2_content(file / merges, file / vocab))
        return _build(
            _hugging_face_content(file / "tokenizer.json" if file.is_dir() else file)
        )
    except Exception as error:  # malformed files fail in many ways, and the backend raises plain `Exception`
        reason = str(error).partition("\n")[0]
        reason = (
            reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
        )
        raise ConfigError(f"cannot use the tokenizer at {path}: {reason}") from error


def save_tokenizer(tokenizer: Tokenizer, path: str) -> None:
    """Writes `tokenizer` as a `tokenizer.json`; `load_tokenizer(path)` has the same hash."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open_no_follow(Path(path), "w") as file:
        file.write(tokenizer.content + "\n")


def pad_vocab(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """`tokenizer` with ids up to `size` - 1, of which the new ones are of no text: those of
    a model that has more rows.

    Its hash is another, unless `size` is its own.
    """
    if size == tokenizer.size:
        return tokenizer
    content = json.loads(tokenizer.content)
    content["model"]["padded_size"] = size
    return _build(content)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE with GPT-2's word splitting and the one special token
    `<|endoftext|>`.

    The same texts give the same tokenizer. Its size is below `vocab_size` where the texts
    have no more pairs to merge. Raises ValueError if `vocab_size` is below 257, the 256
    bytes and the end of text, or if a text holds a lone surrogate.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), not {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_byte_symbols(),
        show_progress=False,
    )
    backend.train_from_iterator(map(_valid_unicode, texts), trainer)
    model = json.loads(backend.to_str())["model"]
    return _build(_byte_level_content(model["vocab"], model["merges"]))


def _valid_unicode(text: str) -> str:
    """Returns `text`, or raises ValueError if UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ConfigError(
            f"text holds a lone surrogate, {code} at character {error.start}; clean it first"
        ) from None
    return text


def _byte_symbols() -> list[str]:
    """Returns the printable character by which GPT-2's files write each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)
    ]


def _byte_level_content(vocab: dict[str, int], merges: list) -> dict[str, Any]:
    """Returns the content of a `tokenizer.json` for byte-level BPE that ends a text with
    `END_OF_TEXT`."""
    missing = [name for name in [*_byte_symbols(), END_OF_TEXT] if name not in vocab]
    if missing:
        raise ConfigError(
            f"the vocabulary lacks {missing[0]!r}; it must hold all 256 byte symbols and {END_OF_TEXT}"
        )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "eos_token": END_OF_TEXT,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _gpt2_content(merges_file: Path, vocab_file: Path) -> dict[str, Any]:
    """Returns GPT-2's two files as the content of a `tokenizer.json`."""
    vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    return _byte_level_content(vocab, merges)


def _hugging_face_content(file: Path) -> dict[str, Any]:
    """Returns the content of a `tokenizer.json`, with the end of text noted in
    `model.eos_token`."""
    content = json.loads(file.read_text(encoding="utf-8"))
    config_file = file.with_name("tokenizer_config.json")
    config = (
        json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    )
    named = content["model"].get("eos_token") or config.get("eos_token")
    named = named["content"] if isinstance(named, dict) else named
    candidates = (named,) if named else EOS_CANDIDATES
    ids = _token_ids(content)
    found = [token for token in candidates if token in ids]
    if not found:
        raise ConfigError(
            f"no end of text: looked for {', '.join(candidates)}; name it in {config_file} as eos_token"
        )
    content["model"]["eos_token"] = found[0]
    return content


def _token_ids(content: dict[str, Any]) -> dict[str, int]:
    """Returns the id of every token, the added ones included."""
    vocab = content["model"]["vocab"]
    ids = (
        {piece: index for index, (piece, _) in enumerate(vocab)}
        if isinstance(vocab, list)
        else dict(vocab)
    )
    for token in content.get("added_tokens") or []:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise ConfigError(
                f"token {token['content']!r} has two ids, {ids[token['content']]} and {token['id']}"
            )
    if not all(isinstance(index, int) and index >= 0 for index in ids.values()):
        raise ConfigError("token ids must be integers from 0")
    if len(set(ids.values())) < len(ids):
        raise ConfigError("two tokens share an id")
    return ids


def _build(content: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a `tokenizer.json` whose `model.eos_token` names the end of
    text."""
    content = _canonical(content)
    ids = _token_ids(content)
    added = {token["content"] for token in content["added_tokens"]}
    tokens = {index: token for token, index in ids.items()}
    if (content.get("decoder") or {}).get("type") == "ByteLevel":
        symbols = _byte_symbols()  # this decoder reads every character as a byte, so added tokens are spelled in bytes
        tokens |= {
            ids[token]: "".join(symbols[byte] for byte in token.encode()) for token in added
        }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return Tokenizer(
        size=max(max(ids.values()) + 1, content["model"].get("padded_size", 0)),
        eos_id=ids[content["model"]["eos_token"]],
        hash=hashlib.sha256(text.encode()).hexdigest(),
        content=text,
        _tokens=tokens,
        _backend=tokenizers.Tokenizer.from_str(
            json.dumps(_without_special_tokens(content, ids))
        ),
    )


def _canonical(content: dict[str, Any]) -> dict[str, Any]:
    """Returns `content` in one spelling, without the parts that add to a text, cut it or
    make its ids random."""
    model = dict(content["model"])
    if "merges" in model:
        model["dropout"] = None
        model["merges"] = [
            merge.split(" ") if isinstance(merge, str) else merge
            for merge in model["merges"]
        ]
        skip = len(model.get("continuing_subword_prefix") or "")
        for left, right in model["merges"]:
            missing = [
                piece
                for piece in (left, right, left + right[skip:])
                if piece not in model["vocab"]
            ]
            if missing:
                raise ConfigError(
                    f"the merge {left!r} {right!r} needs {missing[0]!r}, which the vocabulary lacks"
                )
    added = sorted(content.get("added_tokens") or [], key=lambda token: token["id"])
    off = {"truncation": None, "padding": None, "post_processor": None}
    return content | off | {"model": model, "added_tokens": added}


def _without_special_tokens(content: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Returns `content` with no way from text to the end of text or an added token.

    It is not enough to drop `added_tokens`: a model finds a token that is also in its
    vocabulary by merges, by whole words (`ignore_merges`) or as a piece (Unigram). An added
    token of one ordinary character stays, as text needs it.
    """
    model = dict(content["model"])
    hidden = {
        t["content"]
        for t in content["added_tokens"]
        if t.get("special") or len(t["content"]) > 1
    }
    hidden.add(model["eos_token"])
    if isinstance(
        model["vocab"], list
    ):  # Unigram: an id is a place in the list; no text holds an empty piece
        model["vocab"] = [
            ["" if piece in hidden else piece, score] for piece, score in model["vocab"]
        ]
    else:
        model["vocab"] = {
            piece: index for piece, index in model["vocab"].items() if piece not in hidden
        }
        if (
            model.get("unk_token") in hidden
        ):  # unknown characters still get this id, its name does not
            model["vocab"][UNKNOWN] = ids[model["unk_token"]]
            model["unk_token"] = UNKNOWN
    if "merges" in model:
        skip = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            (a, b) for a, b in model["merges"] if hidden.isdisjoint({a, b, a + b[skip:]})
        ]
    return content | {"model": model, "added_tokens": []}
