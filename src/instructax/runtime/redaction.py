"""Keeps control characters and secrets out of terminals and files.

No config has a field for a secret, but overrides, error messages and URLs can contain one.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"

# A name with one of these words is a secret.
SECRET_WORDS = {
    "apikey",
    "auth",
    "authorization",
    "credential",
    "credentials",
    "passphrase",
    "passwd",
    "password",
    "pwd",
    "secret",
    "secrets",
}

# "… key" is a secret after one of the first, and at the end of a name unless after one of
# the second: `access_key_id` and `wandb_key`, but not `rng_key`.
SECRET_KEYS = {"access", "api", "private", "secret"}
HARMLESS_KEYS = {
    "cache",
    "foreign",
    "primary",
    "prng",
    "query",
    "random",
    "rng",
    "sort",
    "step",
}

# "… token" at the end of a name is a secret, but not after one of these: `pad_token`.
TEXT_TOKENS = {
    "bos",
    "cls",
    "end",
    "eos",
    "first",
    "last",
    "mask",
    "pad",
    "per",
    "sep",
    "start",
    "stop",
    "unk",
}

# The words of snake_case, kebab-case and camelCase names.
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

# The next three patterns begin where a word begins, so a long word is scanned only once.
# The login of a URL; it may itself contain an @.
_LOGIN = re.compile(r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
# An HTTP header, with or without a scheme such as "Bearer".
_HEADER = re.compile(
    r"(authorization['\"]?\s*[:=]\s*['\"]?(?:[a-z]+\s+(?=[^\s'\",]))?)[^\s'\",]+",
    re.IGNORECASE,
)
# A name and what separates it from its value: `name=`, `'name': ` or `--name `.
_NAME = re.compile(r"(?<![\w.-])([\w.-]+)(['\"]?\s*[:=]\s*|(?<=[\w.-])\s+)")

# A value: a quoted string, which may contain escaped quotes, a bracketed group or a word.
_VALUE = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|[^\s,;)}\]]+"
)


def printable(text: str) -> str:
    """`text` with control, formatting and surrogate characters escaped.

    Sampled text must not be able to control a terminal.
    """
    shown = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        shown.append(character)
    return "".join(shown)


def is_secret(name: str) -> bool:
    """Whether the value called `name` must not be shown.

    True for `hf_token` and `apiKey`, False for `num_tokens`, `tokenizer` and `pad_token`.
    """
    # `hf_token` → hf, token; `apiKey` → api, key.
    words = [word.lower() for word in _WORDS.findall(name)]
    if not SECRET_WORDS.isdisjoint(words):
        return True
    for before, word in itertools.pairwise(words):
        if word == "key" and before in SECRET_KEYS:
            return True
    last = words[-1] if words else ""
    before_last = words[-2] if len(words) > 1 else ""
    if last == "key":
        return bool(before_last) and before_last not in HARMLESS_KEYS
    return last == "token" and before_last not in TEXT_TOKENS


def redact(value: Any, name: str = "") -> Any:
    """`value`, nested or not, with secrets and the logins of URLs replaced by `HIDDEN`.

    Args:
      value: of a config or manifest.
      name: what it is called, which decides whether it is a secret.
    """
    if value in (None, "") or isinstance(value, bool):  # nothing to hide
        return value
    if is_secret(name):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact(item) for item in value)
    if isinstance(value, str):
        return _hide_logins(value)
    return value


def redact_text(text: str) -> str:
    """A message with secrets and the logins of URLs replaced by `HIDDEN`.

    Finds the values in name=value, name: value, 'name': value and --name value.
    """
    # Logins first: a URL can be the value of a header.
    text = _HEADER.sub(rf"\1{HIDDEN}", _hide_logins(text))
    parts = []
    end = 0  # of the text that is already in `parts`
    for match in _NAME.finditer(text):
        name, separator = match[1], match[2]
        if match.start() < end or not is_secret(name):
            continue
        if name.lower() == "token" and separator.startswith(":"):
            continue  # prose: "end token: …"
        if name.lower().endswith("authorization"):
            continue  # a header, which is hidden already
        if separator.isspace() and not name.startswith("--"):
            continue  # prose: "a password of letters"
        # Anchored: the value must follow its name directly.
        value = _VALUE.match(text, match.end())
        if value and value[0] != HIDDEN:
            parts += [text[end : value.start()], HIDDEN]
            end = value.end()
    return "".join([*parts, text[end:]])


def _hide_logins(text: str) -> str:
    return _LOGIN.sub(rf"\1{HIDDEN}@", text)
