"""What must not reach a terminal or a file: control characters, and secrets."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
SECRETS = {
    "secret",
    "secrets",
    "password",
    "passwd",
    "pwd",
    "passphrase",
    "auth",
    "authorization",
}
SECRETS |= {"credential", "credentials"}
SECRET_KEYS = {"api", "private", "access", "secret"}  # before "key", wherever it stands
PLAIN_KEYS = {
    "rng",
    "prng",
    "random",
    "step",
    "cache",
    "sort",
    "primary",
    "foreign",
    "query",
}  # before a last "key"
TEXT_TOKENS = {
    "pad",
    "eos",
    "bos",
    "unk",
    "sep",
    "cls",
    "mask",
    "stop",
    "end",
    "start",
    "first",
    "last",
    "per",
}

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# All start where a word does, so that a long word is looked at once; what is hidden may
# hold an @ or an escaped quote.
_LOGIN = re.compile(r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
_HEADER = re.compile(
    r"(authorization['\"]?\s*[:=]\s*['\"]?(?:[a-z]+\s+(?=[^\s'\",]))?)[^\s'\",]+",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<![\w.-])([\w.-]+)(['\"]?\s*[:=]\s*|(?<=[\w.-])\s+)")
_VALUE = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|[^\s,;)}\]]+"
)


def printable(text: str) -> str:
    """`text` with control, formatting and surrogate characters escaped: sampled text must
    not drive a terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def is_secret(name: str) -> bool:
    """Whether what is called `name` must not be shown: hf_token and apiKey, not num_tokens,
    tokenizer or pad_token."""
    words = [word.lower() for word in _WORDS.findall(name)]
    keys = any(
        first in SECRET_KEYS and second == "key"
        for first, second in itertools.pairwise(words)
    )
    keys |= len(words) > 1 and words[-1] == "key" and words[-2] not in PLAIN_KEYS
    token = words[-1:] == ["token"] and not TEXT_TOKENS.intersection(words[-2:-1])
    return keys or token or "apikey" in words or not SECRETS.isdisjoint(words)


def redact(value: Any, name: str = "") -> Any:
    """`value` with all that `is_secret` within it replaced by `HIDDEN`, and without the
    logins of URLs."""
    if value in (None, "") or isinstance(value, bool):
        return value
    if is_secret(name):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact(item) for item in value)
    return _LOGIN.sub(rf"\1{HIDDEN}@", value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """`text` for people, without the logins of its URLs and what stands behind the name of
    a secret: name=value, name: value (but for "token:", which is prose), 'name': value and
    --name value."""

    text = _HEADER.sub(rf"\1{HIDDEN}", _LOGIN.sub(rf"\1{HIDDEN}@", text))
    parts, end = [], 0
    for name in _NAME.finditer(text):
        word, flag = name[1].lower(), name[1].startswith("--")
        # "end token: …" is prose, and a header is hidden already.
        done = (word == "token" and name[2].startswith(":")) or word.endswith(
            "authorization"
        )
        if (
            name.start() < end
            or not is_secret(name[1])
            or done
            or (name[2].isspace() and not flag)
        ):
            continue
        if (value := _VALUE.match(text, name.end())) and value[0] != HIDDEN:
            parts += [text[end : value.start()], HIDDEN]
            end = value.end()
    return "".join([*parts, text[end:]])
