"""Turns the messages of a conversation into the text and tokens that a policy reads.

With a template this is the result of Hugging Face's `apply_chat_template`. A template is
the Jinja text that comes with an imported model: `chat_template.jinja` beside
`tokenizer.json`, or among the model's files in `source/`. Without a template it is the
stages' own format: a single message of the user is the prompt itself, and longer
conversations are turns "\\n\\nHuman: …\\n\\nAssistant: …".

Templates run in a sandbox (`template_sandbox`). A template may write special tokens, but
people may not: a message that contains the text of a special token is refused, so nobody
can end somebody else's turn.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from instructax.config import ConfigError
from instructax.data import tokenizer_json
from instructax.data.prompt_format import PromptFormat, add_separator, split_turns
from instructax.data.template_sandbox import compile_template, render_template
from instructax.data.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
# Folders of a run that may hold a template: its own, and the imported model's files.
TEMPLATE_FOLDERS = (".", "source")
# Tried in this order where no config names the token.
BOS_CANDIDATES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
ROLES = ("system", "user", "assistant")
# A noncharacter code point, which no text contains. It stands for an answer when the text
# that the template puts after it is looked up.
ANSWER_MARK = "\ufdd0"

# Has "role" and "content".
Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the special tokens of its tokenizer."""

    source: str = dataclasses.field(repr=False)
    # "" if there is none.
    bos_token: str
    eos_token: str
    # The texts of all special tokens.
    special_tokens: tuple[str, ...]


def load_template(workdir: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the run in `workdir`, or None if it has none.

    It is `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`. Raises
    ConfigError if it cannot be used.
    """
    for name in TEMPLATE_FOLDERS:
        folder = workdir / name
        # An imported model may have a config, a template file, or both.
        config: dict[str, Any] = {}
        if (folder / CONFIG_FILE).exists():
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        source = _template_source(folder, config)
        if source:
            template = make_template(source, tokenizer, _bos_token(config))
            # Refuses a template with an error now, rather than at its first use.
            compile_template(template.source)
            return template
    return None


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / TEMPLATE_FILE).exists():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    source = config.get("chat_template")
    if not isinstance(source, list):
        return source
    # Several templates by name.
    for named in source:
        if named["name"] == "default":
            return named["template"]
    return None


def _bos_token(config: dict[str, Any]) -> str | None:
    """The token that a `tokenizer_config.json` names, "" if it names none, None if there is
    no such file."""
    if not config:
        return None
    token = config.get("bos_token") or ""
    return token["content"] if isinstance(token, dict) else token


def copy_template(parent: Path, workdir: Path) -> None:
    """Copies the template files of the run in `parent` to `workdir`, so that the child is
    chatted with as it was trained."""
    for folder in TEMPLATE_FOLDERS:
        for name in (TEMPLATE_FILE, CONFIG_FILE):
            if (parent / folder / name).is_file():
                (workdir / folder).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(parent / folder / name, workdir / folder / name)


def make_template(
    source: str, tokenizer: Tokenizer, bos_token: str | None = None
) -> ChatTemplate:
    """Combines the template `source` with the special tokens of `tokenizer`.

    Args:
      source: the Jinja text.
      tokenizer: the model's tokenizer.
      bos_token: "" for none; None takes the first of BOS_CANDIDATES that the tokenizer has.
    """
    # The tokenizer itself never encodes special tokens; its file still lists them.
    content = json.loads(tokenizer.content)
    eos_token = content["model"]["eos_token"]
    special_tokens = tokenizer_json.special_tokens(content)
    if bos_token is None:
        bos_token = ""
        for candidate in BOS_CANDIDATES:
            if candidate in special_tokens:
                bos_token = candidate
                break
    # In the order of the file: the hash of the prompt format depends on it.
    return ChatTemplate(source, bos_token, eos_token, tuple(special_tokens))


def render_messages(
    messages: Sequence[Message],
    template: ChatTemplate | None,
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of a conversation.

    Raises ConfigError for an invalid message, and for messages that the template refuses.

    Args:
      messages: the conversation.
      template: None uses the stages' own format.
      add_generation_prompt: whether to append what starts the assistant's next answer.
    """
    check_messages(messages, "messages")
    if template is None:
        return _render_plain(messages, add_generation_prompt)
    _refuse_special_tokens(messages, template)
    return _apply_template(messages, template, add_generation_prompt)


def render_demonstration(
    prompt: str, answer: str, template: ChatTemplate | None
) -> tuple[str, str]:
    """The prompt and the answer as a chat model reads and writes them.

    The end token after the answer is left out; a caller that appends it trains on exactly
    one. Raises ConfigError if the template ends an answer with a token other than the
    tokenizer's end token, or if an answered prompt does not start with the prompt.
    """
    question: list[Message] = [{"role": "user", "content": prompt}]
    if template is None:
        return add_separator(prompt), answer
    before = render_messages(question, template, add_generation_prompt=True)
    whole = render_messages(
        [*question, {"role": "assistant", "content": answer}],
        template,
        add_generation_prompt=False,
    )
    if not whole.startswith(before):
        raise ConfigError(
            "the chat template writes an answered prompt differently from an unanswered "
            f"one: {whole}"
        )
    # What follows the prompt: the answer, the end token, and white space at most.
    answered, end, rest = whole[len(before) :].partition(template.eos_token)
    others = [token for token in template.special_tokens if token in answered]
    if others or rest.strip() or not end:
        actual = others[0] if others else rest.strip()
        raise ConfigError(
            f"the chat template ends an answer with {actual or 'nothing'!r}, the tokenizer "
            f"ends a text with {template.eos_token!r}: name the same token as eos_token in "
            "tokenizer_config.json"
        )
    return before, answered


def chat_prompt_format(template: ChatTemplate, tokenizer: Tokenizer) -> PromptFormat:
    """The format of training records: prompts become turns, and answers are written as the
    template writes them, up to the end token.

    Raises ConfigError if the template ends an answer with a different token.
    """
    # The text around an answer is the same for every answer, so one rendering with a
    # mark in the place of the answer is enough.
    answered = render_demonstration("a", ANSWER_MARK, template)[1]
    if ANSWER_MARK not in answered:
        raise ConfigError(
            f"the chat template cannot be trained with: instead of an answer it writes "
            f"{answered!r}"
        )

    def format_prompt(prompt: str) -> str:
        return render_messages(split_turns(prompt), template, add_generation_prompt=True)

    def format_answer(text: str) -> str:
        return answered.replace(ANSWER_MARK, text)

    def encode(text: str) -> np.ndarray:
        return encode_rendered(text, tokenizer, template)

    return PromptFormat(
        hash=hashlib.sha256(repr(dataclasses.astuple(template)).encode()).hexdigest(),
        prompt=format_prompt,
        answer=format_answer,
        encode=encode,
        reserved=template.special_tokens,
    )


def encode_rendered(
    text: str, tokenizer: Tokenizer, template: ChatTemplate | None
) -> np.ndarray:
    """The token ids i32[n] of a result of `render_messages`. If a template wrote it, the
    texts of special tokens become their ids."""
    if template is None:
        return tokenizer.encode(text)
    # A template writes its own special tokens, so the backend must add none.
    backend = _backend_with_special_tokens(tokenizer)
    return np.asarray(backend.encode(text, add_special_tokens=False).ids, np.int32)


def encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate | None
) -> np.ndarray:
    """The prompt i32[n] that the assistant's next answer continues."""
    text = render_messages(messages, template, add_generation_prompt=True)
    return encode_rendered(text, tokenizer, template)


def turn_end_mask(tokenizer: Tokenizer, template: ChatTemplate | None) -> np.ndarray:
    """Marks the special token that the template puts after an answer, if any: b[V].

    Some models end a turn with one token and a text with another.
    """
    # Without a template only the tokenizer's end token ends an answer.
    mask = np.zeros((tokenizer.size,), bool)
    if template is None:
        return mask
    turns: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ANSWER_MARK},
    ]
    text = _apply_template(turns, template, add_generation_prompt=False)
    rest = text.rpartition(ANSWER_MARK)[2].strip()
    # The longest first, because one token may be the beginning of another.
    for token in sorted(template.special_tokens, key=len, reverse=True):
        if rest.startswith(token):
            mask[encode_rendered(token, tokenizer, template)[0]] = True
            break
    return mask


def check_messages(messages: Any, where: str) -> None:
    """Raises ConfigError unless `messages` is a list of objects with a role of `ROLES` and
    a text; `where` names it in the message."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ConfigError(f"{where} must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ConfigError(
                f"{where}[{index}] must be an object with role and content, both strings"
            )
        if message.get("role") not in ROLES:
            raise ConfigError(
                f"{where}[{index}].role = {message.get('role')!r} must be one of "
                f"{', '.join(ROLES)}"
            )


def _refuse_special_tokens(messages: Sequence[Message], template: ChatTemplate) -> None:
    for index, message in enumerate(messages):
        for token in template.special_tokens:
            if token in message["content"]:
                raise ConfigError(
                    f"messages[{index}].content contains {token!r}, which is a token of "
                    "this model: spell it differently"
                )


def _render_plain(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The stages' own format of prompts."""
    system = "".join(
        message["content"] for message in messages if message["role"] == "system"
    )
    # System messages come first, whatever their place in the conversation.
    turns = [message for message in messages if message["role"] != "system"]
    # A single question is a plain prompt, as in the training data.
    if not system and len(turns) == 1 and turns[0]["role"] == "user":
        content = turns[0]["content"]
        return add_separator(content) if add_generation_prompt else content

    speakers = {"user": "Human", "assistant": "Assistant"}
    text = system
    for turn in turns:
        text += f"\n\n{speakers[turn['role']]}: {turn['content']}"
    if add_generation_prompt:
        text = add_separator(f"{text}\n\nAssistant:")
    return text


def _apply_template(
    messages: Sequence[Message], template: ChatTemplate, add_generation_prompt: bool
) -> str:
    # Outside of `try`: a template that cannot be parsed has a message of its own.
    compile_template(template.source)
    try:
        return render_template(
            template.source,
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=template.bos_token,
            eos_token=template.eos_token,
        )
    except Exception as error:
        # A template can fail in any way that a program can.
        raise ConfigError(f"the chat template refuses these messages: {error}") from None


@functools.lru_cache(maxsize=8)
def _backend_with_special_tokens(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as its file defines it, which parses special tokens in text."""
    return tokenizers.Tokenizer.from_str(tokenizer.content)
