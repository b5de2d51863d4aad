"""From the messages of a conversation to the text, and the tokens, that a policy reads.

With a template, the Jinja text that comes with an imported model (`chat_template.jinja`
beside `tokenizer.json`, or among the files of the model kept in `source`), it is what
Hugging Face's `apply_chat_template` makes of them. Without one it is the stages' own format
of prompts: a single message of the user is the prompt, and of longer conversations the
turns are "\\n\\nHuman: …\\n\\nAssistant: …".

A template is a program by somebody else, and is run in Jinja's sandbox, for a bounded
number of steps. What it writes may hold special tokens; what people write may not: a
message that holds the text of one is refused, so that nobody can end somebody's turn.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from instructax.config import ConfigError
from instructax.data.prompt_format import PromptFormat, add_separator, split_turns
from instructax.data.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
PLACES = (
    ".",
    "source",
)  # of a run where a template may be: its own, and the files of the model that it was made from
BOS_CANDIDATES = (
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "<|startoftext|>",
)  # tried in this order
STEPS = (
    1_000_000  # lines of Python that a template may run: long conversations need thousands
)
CHARACTERS = 1_000_000  # that a template's product may have
ROLES = ("system", "user", "assistant")
MARK = "\ufdd0"  # a code point that is no character: stands for an answer where the end of a turn is looked up

Message = Mapping[str, str]  # role, content


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and the tokens of its tokenizer that it may write, by their text."""

    source: str = dataclasses.field(repr=False)
    bos_token: str  # "" = none
    eos_token: str
    special: tuple[str, ...]  # all texts that become one token by themselves


def load_template(workdir: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the run in `workdir`: `chat_template.jinja`, or what
    `tokenizer_config.json` says; None if there is none. Raises ValueError if it cannot be
    used."""
    for folder in (workdir / place for place in PLACES):
        file, config_file = folder / TEMPLATE_FILE, folder / "tokenizer_config.json"
        config = (
            json.loads(config_file.read_text(encoding="utf-8"))
            if config_file.exists()
            else {}
        )
        source = (
            file.read_text(encoding="utf-8")
            if file.exists()
            else config.get("chat_template")
        )
        if isinstance(source, list):  # several, by name
            source = next(
                (named["template"] for named in source if named["name"] == "default"), None
            )
        if source:
            bos = config.get("bos_token") or "" if config else None
            template = make_template(
                source, tokenizer, bos["content"] if isinstance(bos, dict) else bos
            )
            _compiled(template.source)
            return template
    return None


def copy_template(parent: Path, workdir: Path) -> None:
    """Puts the files that the chat template of the run in `parent` is read from into
    `workdir`, for whoever talks to the child as it was trained."""
    for place in PLACES:
        for name in (TEMPLATE_FILE, "tokenizer_config.json"):
            if (parent / place / name).is_file():
                (workdir / place).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(parent / place / name, workdir / place / name)


def make_template(
    source: str, tokenizer: Tokenizer, bos_token: str | None = None
) -> ChatTemplate:
    """`source` with the special tokens of `tokenizer`; `bos_token` "" = none, None = the
    first candidate."""
    content = json.loads(tokenizer.content)
    added = [
        token
        for token in content["added_tokens"]
        if token.get("special") or len(token["content"]) > 1
    ]
    special = tuple(
        dict.fromkeys(
            [*(token["content"] for token in added), content["model"]["eos_token"]]
        )
    )
    found = next((token for token in BOS_CANDIDATES if token in special), "")
    return ChatTemplate(
        source,
        found if bos_token is None else bos_token,
        content["model"]["eos_token"],
        special,
    )


def render(
    messages: Sequence[Message],
    template: ChatTemplate | None,
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of `messages`, and what opens the next answer if `add_generation_prompt`.

    Raises ValueError for a message that is none, or that the template refuses.
    """
    check_messages(messages, "messages")
    if template is None:
        return _plain(messages, add_generation_prompt)
    _refuse_special(messages, template)
    return _rendered(messages, template, add_generation_prompt)


def render_demonstration(
    prompt: str, answer: str, template: ChatTemplate | None
) -> tuple[str, str]:
    """(prompt, answer) as a model that is chatted with reads and writes them, the end token
    left out.

    Whoever puts the end token after the answer trains on exactly one. Raises ValueError
    where the template ends an answer with another token than the tokenizer ends a text
    with, or does not continue its own prompt.
    """
    asked: list[Message] = [{"role": "user", "content": prompt}]
    if template is None:
        return add_separator(prompt), answer
    before = render(asked, template, add_generation_prompt=True)
    whole = render(
        [*asked, {"role": "assistant", "content": answer}],
        template,
        add_generation_prompt=False,
    )
    if not whole.startswith(before):
        raise ConfigError(
            f"the chat template writes an answered prompt in another way than one to be answered: {whole}"
        )
    answered, end, rest = whole[len(before) :].partition(template.eos_token)
    others = [token for token in template.special if token in answered]
    if others or rest.strip() or not end:
        found = others[0] if others else rest.strip() or "nothing"
        raise ConfigError(
            f"the chat template ends an answer with {found!r}, the tokenizer ends a text with {template.eos_token!r}: "
            "name one and the same in tokenizer_config.json, as eos_token"
        )
    return before, answered


def chat_prompt_format(template: ChatTemplate, tokenizer: Tokenizer) -> PromptFormat:
    """How records are worded for training with `template`: the turns of their prompt and
    what opens an answer, then the answer as the template writes it, behind which the stages
    put the one end token.

    Raises ValueError where the template ends an answer with another token.
    """
    answered = render_demonstration("a", MARK, template)[1]
    if MARK not in answered:
        raise ConfigError(
            f"the chat template writes no answer, but {answered!r}: it cannot be trained with"
        )
    return PromptFormat(
        hash=hashlib.sha256(repr(dataclasses.astuple(template)).encode()).hexdigest(),
        prompt=lambda prompt: render(
            split_turns(prompt), template, add_generation_prompt=True
        ),
        answer=lambda text: answered.replace(MARK, text),
        encode=lambda text: encode_rendered(text, tokenizer, template),
        reserved=template.special,
    )


def encode_rendered(
    text: str, tokenizer: Tokenizer, template: ChatTemplate | None
) -> np.ndarray:
    """The ids of what `render` returned, i32[n]: the texts of special tokens are their ids
    if a template wrote them."""
    if template is None:
        return tokenizer.encode(text)
    return np.asarray(
        _with_special_tokens(tokenizer).encode(text, add_special_tokens=False).ids, np.int32
    )


def encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate | None
) -> np.ndarray:
    """The prompt i32[n] to which the next answer is the assistant's."""
    return encode_rendered(
        render(messages, template, add_generation_prompt=True), tokenizer, template
    )


def turn_end_mask(tokenizer: Tokenizer, template: ChatTemplate | None) -> np.ndarray:
    """Marks the token that the template puts behind an answer, if it is a special one:
    b[size]. Some models end their turn with it, and a text with another."""
    ends = np.zeros((tokenizer.size,), bool)
    if template is not None:
        split_turns: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": MARK},
        ]
        rest = _rendered(split_turns, template, False).rpartition(MARK)[2].strip()
        behind = next(
            (
                token
                for token in sorted(template.special, key=len, reverse=True)
                if rest.startswith(token)
            ),
            "",
        )
        if behind:
            ends[encode_rendered(behind, tokenizer, template)[0]] = True
    return ends


def check_messages(messages: Any, where: str) -> None:
    """Raises ValueError unless `messages` is a list of objects, each a role of `ROLES` and
    a text."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ConfigError(f"{where} must be a list with one message at least")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ConfigError(
                f"{where}[{number}] must be an object with role and content, both of them texts"
            )
        if message.get("role") not in ROLES:
            raise ConfigError(
                f"{where}[{number}].role = {message.get('role')!r} must be one of {', '.join(ROLES)}"
            )


def _refuse_special(messages: Sequence[Message], template: ChatTemplate) -> None:
    for number, message in enumerate(messages):
        found = next(
            (token for token in template.special if token in message["content"]), None
        )
        if found:
            raise ConfigError(
                f"messages[{number}].content holds {found!r}, which is a token of this model: spell it differently"
            )


def _plain(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    system = "".join(
        message["content"] for message in messages if message["role"] == "system"
    )
    split_turns = [message for message in messages if message["role"] != "system"]
    if not system and [turn["role"] for turn in split_turns] == ["user"]:
        content = split_turns[0]["content"]
        return add_separator(content) if add_generation_prompt else content
    names = {"user": "Human", "assistant": "Assistant"}
    text = system + "".join(
        f"\n\n{names[turn['role']]}: {turn['content']}" for turn in split_turns
    )
    return add_separator(f"{text}\n\nAssistant:") if add_generation_prompt else text


def _rendered(
    messages: Sequence[Message], template: ChatTemplate, add_generation_prompt: bool
) -> str:
    compiled = _compiled(template.source)
    try:
        with _bounded_steps():
            return compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=template.bos_token,
                eos_token=template.eos_token,
            )
    except Exception as error:  # a template can fail in any way that a program can
        raise ConfigError(f"the chat template refuses these messages: {error}") from None


@contextlib.contextmanager
def _bounded_steps() -> Iterator[None]:
    """While entered, this thread raises ValueError once it has run `STEPS` lines of Python:
    a template may loop for ever. A debugger's or coverage's own tracing rests for so long.
    """
    left = STEPS

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise ValueError(f"it has not ended after {STEPS} steps")
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(outer)


def _small(operands: tuple[Any, Any], operator: str) -> None:
    """Raises ValueError for a product or power that would take all memory."""
    left, right = operands
    if operator == "**" and isinstance(right, int) and abs(right) > 64:
        raise ValueError(f"its power {right} is above 64")
    sized = next((x for x in operands if isinstance(x, str | list | tuple)), None)
    times = right if sized is left else left
    if (
        operator == "*"
        and sized is not None
        and isinstance(times, int)
        and len(sized) * times > CHARACTERS
    ):
        raise ValueError(f"it makes a text of more than {CHARACTERS} characters")


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The template with the names that Hugging Face gives templates."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError:
        raise ConfigError(
            "a chat template needs jinja2: pip install 'instructax[chat]'"
        ) from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %}, which marks what is trained, and changes
        nothing of the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Without products that take all memory."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _small((left, right), operator)
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, Generation],
    )
    # Jinja's own filter escapes for HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template cannot be read: line {error.lineno}: {error.message}"
        ) from None


@functools.lru_cache(maxsize=8)
def _with_special_tokens(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.content)
