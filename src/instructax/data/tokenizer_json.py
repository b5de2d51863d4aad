"""The content of `tokenizer.json` files: building it from other formats, and checking it.

A `tokenizer.json` is Hugging Face's description of a tokenizer. We add one entry to it,
`model.eos_token`, the name of the token that ends a text.
"""

import json
from pathlib import Path
from typing import Any

from instructax.config import ConfigError

END_OF_TEXT = "<|endoftext|>"
# Tried in this order where no file names the end token.
EOS_CANDIDATES = (END_OF_TEXT, "</s>", "<|im_end|>")
# A noncharacter code point. It takes the place of a hidden unknown token; text that
# contains it is unknown anyway.
UNKNOWN = "\U0010ffff"
# Score of a Unigram piece that the model never prefers to others.
NEVER = -1e9


def byte_symbols() -> list[str]:
    """The printable character by which GPT-2's files write each byte.

    Printable Latin-1 characters stand for themselves; the other bytes count up from 256.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols = []
    next_code = 256
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(next_code))
            next_code += 1
    return symbols


def byte_level_content(vocab: dict[str, int], merges: list) -> dict[str, Any]:
    """A `tokenizer.json` of byte-level BPE with the end token `END_OF_TEXT`."""
    # Any text must be encodable, and must be able to end.
    for name in [*byte_symbols(), END_OF_TEXT]:
        if name not in vocab:
            raise ConfigError(
                f"the vocabulary lacks {name!r}; "
                f"it must contain all 256 byte symbols and {END_OF_TEXT}"
            )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    end_token = {
        "id": vocab[END_OF_TEXT],
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "added_tokens": [end_token],
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


def gpt2_content(merges_file: Path, vocab_file: Path) -> dict[str, Any]:
    """GPT-2's two files as a `tokenizer.json`."""
    vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    # One merge per line, after a line with the version.
    merges = [line for line in lines if line and not line.startswith("#version")]
    return byte_level_content(vocab, merges)


def hugging_face_content(file: Path) -> dict[str, Any]:
    """A `tokenizer.json` with its end token noted in `model.eos_token`."""
    content = json.loads(file.read_text(encoding="utf-8"))
    config_file = file.with_name("tokenizer_config.json")
    config: dict[str, Any] = {}
    if config_file.exists():
        config = json.loads(config_file.read_text(encoding="utf-8"))

    # Our own entry first, else the model's config.
    named = content["model"].get("eos_token") or config.get("eos_token")
    if isinstance(named, dict):
        named = named["content"]
    candidates = (named,) if named else EOS_CANDIDATES
    # All tokens, not only the added ones.
    ids = token_ids(content)
    present = [token for token in candidates if token in ids]
    if not present:
        raise ConfigError(
            f"no end of text: looked for {', '.join(candidates)}; "
            f"name it in {config_file} as eos_token"
        )
    content["model"]["eos_token"] = present[0]
    return content


def token_ids(content: dict[str, Any]) -> dict[str, int]:
    """Token → id, including added tokens. Raises ConfigError for ids that are not unique
    integers from 0."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):
        # Unigram: a list of (piece, score), in which the index is the id.
        ids = {piece: index for index, (piece, _) in enumerate(vocab)}
    else:
        ids = dict(vocab)
    for token in content.get("added_tokens") or []:
        known = ids.setdefault(token["content"], token["id"])
        if known != token["id"]:
            raise ConfigError(
                f"token {token['content']!r} has two ids, {known} and {token['id']}: "
                "give it one id in the file"
            )
    # Id → its token, to name both tokens that share an id: decoding would be ambiguous.
    tokens: dict[int, str] = {}
    for token, index in ids.items():
        if not isinstance(index, int) or index < 0:
            raise ConfigError(
                f"token {token!r} has the id {index!r}: ids must be integers from 0; "
                "correct it in the file"
            )
        first = tokens.setdefault(index, token)
        if first != token:
            raise ConfigError(
                f"tokens {first!r} and {token!r} share the id {index}: give each its own "
                "id in the file"
            )
    return ids


def canonical_content(content: dict[str, Any]) -> dict[str, Any]:
    """One spelling of `content`, without the parts that add to a text, cut it, or make its
    ids random."""
    # Copied, because the caller keeps the original.
    model = dict(content["model"])
    if "merges" in model:
        model["dropout"] = None
        merges = []
        for merge in model["merges"]:
            # Older files write a merge as "left right".
            merges.append(merge.split(" ") if isinstance(merge, str) else merge)
        model["merges"] = merges
        _check_merges(model)
    return content | {
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "model": model,
        "added_tokens": sorted(
            content.get("added_tokens") or [], key=lambda token: token["id"]
        ),
    }


def _check_merges(model: dict[str, Any]) -> None:
    skip = _inner_prefix_length(model)
    for left, right in model["merges"]:
        for piece in (left, right, left + right[skip:]):
            if piece not in model["vocab"]:
                raise ConfigError(
                    f"the merge {left!r} {right!r} needs {piece!r}, "
                    "which the vocabulary lacks"
                )


def _inner_prefix_length(model: dict[str, Any]) -> int:
    """Length of the prefix that marks pieces inside a word, such as "##"; a merge drops
    it."""
    return len(model.get("continuing_subword_prefix") or "")


def special_tokens(content: dict[str, Any]) -> list[str]:
    """The tokens that no text may produce: the special tokens in the order of the file, and
    the end token.

    Other added tokens, such as runs of spaces, are ordinary pieces of text.
    """
    tokens = []
    for token in content["added_tokens"]:
        if token.get("special"):
            tokens.append(token["content"])
    if content["model"]["eos_token"] not in tokens:
        tokens.append(content["model"]["eos_token"])
    return tokens


def without_special_tokens(content: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """`content` without any way from text to a special token.

    Dropping them from `added_tokens` is not enough: a model also finds a token in its
    vocabulary by merges, as a whole word (`ignore_merges`) or as a piece (Unigram).

    Args:
      content: a canonical `tokenizer.json`.
      ids: its `token_ids`.
    """
    model = dict(content["model"])
    hidden = set(special_tokens(content))
    added = [token for token in content["added_tokens"] if token["content"] not in hidden]

    if isinstance(model["vocab"], list):
        # Unigram: removing an entry would shift the ids, but no text contains an empty
        # piece.
        pieces = []
        for piece, score in model["vocab"]:
            pieces.append(["" if piece in hidden else piece, score])
        # Added tokens get an entry at their id: the library would number them anew.
        for token in added:
            if token["id"] >= len(pieces):
                pieces += [["", NEVER]] * (token["id"] + 1 - len(pieces))
                pieces[token["id"]] = [token["content"], NEVER]
        model["vocab"] = pieces
    else:
        vocab = model["vocab"]
        model["vocab"] = {piece: vocab[piece] for piece in vocab if piece not in hidden}
        # With their ids: the library would number them after the vocabulary's last token.
        for token in added:
            model["vocab"][token["content"]] = token["id"]
        if model.get("unk_token") in hidden:
            # Unknown characters keep their id, but nobody can write it by name.
            model["vocab"][UNKNOWN] = ids[model["unk_token"]]
            model["unk_token"] = UNKNOWN

    if "merges" in model:
        skip = _inner_prefix_length(model)
        merges = []
        for left, right in model["merges"]:
            if hidden.isdisjoint({left, right, left + right[skip:]}):
                merges.append((left, right))
        model["merges"] = merges
    return content | {"model": model, "added_tokens": added}
