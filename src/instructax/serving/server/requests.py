"""What clients ask for: bodies in OpenAI's format, checked field by field.

What cannot be done is refused with a reason, also by its mere name: a setting that is
passed over in silence would give other answers than the client thinks.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from instructax.config import INT_LIMIT
from instructax.data.chat_template import Message, check_messages
from instructax.serving.chat import Policy

COMPLETION_TOKENS = 16  # where a completion's request does not say, as OpenAI has it
MOST_STOPS, HIGHEST_TEMPERATURE = 4, 2.0  # OpenAI's
MOST_LOGPROBS, MOST_TOP_LOGPROBS = 5, 20  # OpenAI's, of completions and of chats


class RequestError(Exception):
    """A request that cannot be answered: HTTP status, and the fields of OpenAI's error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(" ".join(message.split()))
        self.status, self.param, self.code = status, param, code


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParsedRequest:
    """A request that can be answered."""

    chat: bool
    prompts: tuple[np.ndarray, ...]  # i32[n] each
    limits: tuple[int, ...]  # the most new tokens after each
    n: int  # samples of each prompt
    temperature: float
    seed: int | None
    stops: tuple[str, ...]
    echo: bool  # the prompt comes back before its completion
    logprobs: bool
    top: int  # likeliest tokens beside each
    stream: bool
    include_usage: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in `body`; raises RequestError."""
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise RequestError("the body must be a JSON object")
    return given


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def completion_of(
    given: Mapping[str, Any], policy: Policy, names: Sequence[str], most: int
) -> ParsedRequest:
    """The request of /v1/completions in `given`; the model is one of `names`, and it asks
    for `most` samples at most.

    Raises RequestError.
    """
    fields = _Fields(
        given,
        names,
        COMMON | {"prompt", "max_tokens", "logprobs", "echo", "best_of", "suffix"},
    )
    echo, logprobs = fields.boolean("echo"), fields.integer("logprobs", 0, MOST_LOGPROBS)
    fields.refuse_all({"best_of": (1, fields.integer("n", 1, most) or 1), "suffix": ("",)})
    prompts = [_tokens(prompt, policy) for prompt in _prompts(given.get("prompt"))]
    limit = fields.integer("max_tokens", 0 if echo else 1, policy.engine.max_length)
    limit = COMPLETION_TOKENS if limit is None else limit
    limits = [_limit(len(prompt), limit, policy) for prompt in prompts]
    if fields.boolean("stream") and logprobs is not None:
        raise RequestError(
            "logprobs are not streamed: leave out logprobs or stream", param="logprobs"
        )
    return fields.asked(
        chat=False, prompts=prompts, limits=limits, most=most, logprobs=logprobs, echo=echo
    )


def chat_of(
    given: Mapping[str, Any], policy: Policy, names: Sequence[str], most: int
) -> ParsedRequest:
    """The request of /v1/chat/completions in `given`, as `completion_of`."""
    fields = _Fields(given, names, COMMON | CHAT_ONLY)
    fields.refuse_all(
        {"tools": ([],), "functions": ([],), "response_format": ({"type": "text"},)}
    )
    messages = _messages(given.get("messages"))
    try:
        check_messages(messages, "messages")
        prompt = policy.encode(messages)
    except ValueError as error:
        raise RequestError(str(error), param="messages") from None
    limit = next(
        (
            found
            for name in LIMITS
            if (found := fields.integer(name, 1, policy.engine.max_length)) is not None
        ),
        max(policy.engine.max_length - len(prompt), 1),
    )
    wanted, top = (
        fields.boolean("logprobs"),
        fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS),
    )
    if top is not None and not wanted:
        raise RequestError("top_logprobs goes with logprobs = true", param="top_logprobs")
    if fields.boolean("stream") and wanted:
        raise RequestError(
            "logprobs are not streamed: leave out logprobs or stream", param="logprobs"
        )
    limits = [_limit(len(prompt), limit, policy)]
    logprobs = (top or 0) if wanted else None
    return fields.asked(
        chat=True, prompts=[prompt], limits=limits, most=most, logprobs=logprobs, echo=False
    )


LIMITS = ("max_completion_tokens", "max_tokens")
# What changes nothing of an answer is taken and left alone.
COMMON = {
    "model",
    "temperature",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "user",
    "metadata",
} | {*("top_p", "frequency_penalty", "presence_penalty", "logit_bias")}
CHAT_ONLY = {
    "messages",
    "logprobs",
    "top_logprobs",
    "tools",
    "functions",
    "response_format",
    "store",
    *LIMITS,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}


class _Fields:
    """The fields of a body; each function reads one, None where it is null or not given."""

    def __init__(self, given: Mapping[str, Any], names: Sequence[str], known: set[str]):
        self._given = given
        for name in given:
            if name not in known:
                raise RequestError(f"{name} is not a field of this request", param=name)
        model = given.get("model")
        if not isinstance(model, str):
            raise RequestError(
                "model must be the name of a model, as /v1/models lists it", param="model"
            )
        if model not in names:
            message = (
                f"there is no model {model!r} here, only {', '.join(map(repr, names))}"
            )
            raise RequestError(message, status=404, param="model", code="model_not_found")
        self.refuse_all(NEUTRAL)

    def refuse_all(self, neutral: Mapping[str, Sequence[Any]]) -> None:
        """Refuses fields that cannot be served, but for values that change nothing."""
        for name, values in neutral.items():
            value = self._given.get(name)
            if value is not None and (isinstance(value, bool) or value not in values):
                raise RequestError(
                    f"{name} is not supported here: leave it out", param=name
                )

    def _read(self, name: str, fits: Callable[[Any], bool], allowed: str) -> Any:
        value = self._given.get(name)
        if value is not None and not fits(value):
            raise RequestError(f"{name} = {_shown(value)} must be {allowed}", param=name)
        return value

    def boolean(self, name: str) -> bool:
        """False if it is not given."""
        return bool(
            self._read(name, lambda value: isinstance(value, bool), "true or false")
        )

    def integer(self, name: str, least: int, most: int) -> int | None:
        """From `least` to `most`."""
        allowed = f"an integer from {least} to {most}"
        return self._read(
            name, lambda value: type(value) is int and least <= value <= most, allowed
        )

    def number(self, name: str, most: float) -> float | None:
        """From 0 to `most`."""

        def fits(value: Any) -> bool:
            return (
                type(value) in (int, float) and math.isfinite(value) and 0 <= value <= most
            )

        return self._read(name, fits, f"a number from 0 to {most:g}")

    def stops(self) -> tuple[str, ...]:
        """One text or several."""

        def fits(value: Any) -> bool:
            texts = value if isinstance(value, list) else [value]
            return len(texts) <= MOST_STOPS and all(
                isinstance(text, str) and text for text in texts
            )

        value = self._read(
            "stop", fits, f"a text or up to {MOST_STOPS} of them, none empty"
        )
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)

    def asked(
        self,
        *,
        chat: bool,
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        most: int,
        logprobs: int | None,
        echo: bool,
    ) -> ParsedRequest:
        """All that both kinds of request have."""
        n, temperature = (
            self.integer("n", 1, most) or 1,
            self.number("temperature", HIGHEST_TEMPERATURE),
        )
        if n * len(prompts) > most:
            raise RequestError(
                f"n = {n} of {len(prompts)} prompts are more than {most} samples", param="n"
            )
        options = self._read(
            "stream_options", lambda value: isinstance(value, dict), "an object"
        )
        return ParsedRequest(
            chat=chat,
            prompts=tuple(prompts),
            limits=tuple(limits),
            n=n,
            temperature=1.0 if temperature is None else float(temperature),
            seed=self.integer("seed", 0, INT_LIMIT - 1),
            stops=self.stops(),
            echo=echo,
            logprobs=logprobs is not None,
            top=logprobs or 0,
            stream=self.boolean("stream"),
            include_usage=bool((options or {}).get("include_usage")),
        )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _prompts(given: Any) -> list[Any]:
    """The prompts that a field `prompt` holds: texts, or lists of token ids."""
    if isinstance(given, str) or (
        isinstance(given, list) and given and all(type(item) is int for item in given)
    ):
        return [given]
    if (
        isinstance(given, list)
        and given
        and all(isinstance(item, str | list) for item in given)
    ):
        return given
    raise RequestError(
        "prompt must be a text, a list of token ids, or a list of either", param="prompt"
    )


def _tokens(prompt: Any, policy: Policy) -> np.ndarray:
    if isinstance(prompt, str):
        try:
            tokens = policy.tokenizer.encode(prompt)
        except ValueError as error:
            raise RequestError(f"prompt: {error}", param="prompt") from None
    else:
        size = policy.tokenizer.size
        wrong = [item for item in prompt if type(item) is not int or not 0 <= item < size]
        if wrong:
            message = f"prompt holds {_shown(wrong[0])}; token ids are integers from 0 to {size - 1}"
            raise RequestError(message, param="prompt")
        tokens = np.asarray(prompt, np.int32)
    if len(tokens) == 0:
        raise RequestError("prompt has no token; it needs 1 at least", param="prompt")
    return tokens


def _limit(prompt_tokens: int, limit: int, policy: Policy) -> int:
    longest = policy.engine.max_length
    if prompt_tokens + limit > longest:
        raise RequestError(
            f"this model's longest text is {longest} tokens, but {prompt_tokens + limit} were asked for "
            f"({prompt_tokens} of the prompt, {limit} of the completion): shorten one of them",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return limit


def _messages(given: Any) -> list[Message]:
    """Messages whose contents are texts, also where they came as lists of parts."""
    if not isinstance(given, list):
        raise RequestError("messages must be a list of messages", param="messages")
    return [
        _with_text(message) if isinstance(message, dict) else message for message in given
    ]


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    if not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
    ):
        raise RequestError(
            "messages hold a part that is not a text; only texts are read here",
            param="messages",
        )
    return message | {"content": "".join(part["text"] for part in parts)}
