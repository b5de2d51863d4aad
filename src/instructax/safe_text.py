"""What must not reach a terminal or a file: control characters, and secrets."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
SECRETS = {"secret", "secrets", "password", "passwd", "passphrase", "authorization", "credential", "credentials"}
SECRET_KEYS = {"api", "private", "access", "secret"}  # before "key"
TEXT_TOKENS = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "end", "start", "first", "last", "per"}

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic)\s+)?)[^\s'\",]+", re.IGNORECASE)
_NAMED = re.compile(r"([\w.-]+)(\s*=\s*|['\"]\s*:\s*)('[^']*'|\"[^\"]*\"|[^\s,;)}\]]+)")


def printable(text: str) -> str:
    """`text` with control, formatting and surrogate characters escaped: sampled text must not drive a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def is_secret(name: str) -> bool:
    """Whether what is called `name` must not be shown: hf_token and apiKey, not num_tokens, tokenizer or pad_token."""
    words = [word.lower() for word in _WORDS.findall(name)]
    keys = any(first in SECRET_KEYS and second == "key" for first, second in itertools.pairwise(words))
    token = words[-1:] == ["token"] and not TEXT_TOKENS.intersection(words[-2:-1])
    return keys or token or "apikey" in words or not SECRETS.isdisjoint(words)


def redacted(value: Any, name: str = "") -> Any:
    """`value` with all that `is_secret` within it replaced by `HIDDEN`, and without the logins of URLs."""
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple) and not is_secret(name):
        return type(value)(redacted(item) for item in value)
    if value in (None, "") or isinstance(value, bool):
        return value
    if is_secret(name):
        return HIDDEN
    return _LOGIN.sub(rf"\1{HIDDEN}@", value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """`text` for people, without the logins of its URLs and what stands behind the name of a secret."""

    def hide(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}{HIDDEN if is_secret(found[1]) else redacted_text(found[3])}"

    return _NAMED.sub(hide, _HEADER.sub(rf"\1{HIDDEN}", _LOGIN.sub(rf"\1{HIDDEN}@", text)))
