"""Request bodies in the format of OpenAI's API, as pydantic models.

Unknown and unsupported fields are refused rather than ignored, because an ignored field
would give other answers than the client expects. Values that change nothing are accepted.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Self, TypeVar

import pydantic
from pydantic import Field, ValidationInfo, field_validator, model_validator

from instructax.config import INT_LIMIT
from instructax.data.chat_template import Message, check_messages
from instructax.serving.server.errors import RequestError

# OpenAI's limits and defaults.
DEFAULT_MAX_TOKENS = 16  # of completions; a chat may fill the context
MAX_STOP_STRINGS = 4
MAX_TEMPERATURE = 2.0
MAX_LOGPROBS = 5  # of completions
MAX_TOP_LOGPROBS = 20  # of chats

# Values of unsupported fields that change nothing, and are therefore accepted.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """What the server allows; the validation context of the request models."""

    # Names under which the policy is served.
    model_names: Sequence[str]
    # Tokens of prompt and completion together.
    max_length: int
    # Samples of one request; as many as may wait in the queue.
    max_samples: int


class StreamOptions(pydantic.BaseModel):
    """Options of a streamed response."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    # Whether the stream ends with the token counts.
    include_usage: bool = False


class RequestBody(pydantic.BaseModel):
    """The fields that both endpoints share."""

    # Strict: "5" is not accepted for 5, nor 1 for true.
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    # Samples of each prompt; the upper limit is the server's.
    n: int = 1
    # 0 = greedy.
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = 1.0
    # None = a random one.
    seed: Annotated[int, Field(ge=0, lt=INT_LIMIT)] | None = None
    # A single string is accepted, too.
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    # Accepted and ignored: they do not change the answer.
    user: Any = None
    metadata: Any = None

    # Unsupported, except for neutral values.
    top_p: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Null means "not given". Unknown fields stay, so that they are refused."""
        given = {}
        for name, value in body.items():
            if value is not None or name not in cls.model_fields:
                given[name] = value
        return given

    # The fields of subclasses are included, which pydantic cannot check here.
    @field_validator(*NEUTRAL_VALUES, mode="plain", check_fields=False)
    @classmethod
    def _check_neutral(cls, value: Any, info: ValidationInfo[ServerLimits]) -> Any:
        name = str(info.field_name)
        _check_supported(name, value, NEUTRAL_VALUES[name])
        return value

    @field_validator("model")
    @classmethod
    def _check_model(cls, name: str, info: ValidationInfo[ServerLimits]) -> str:
        # Raised directly, because pydantic's own errors have no status.
        names = info.context.model_names
        if name not in names:
            raise RequestError(
                f"there is no model {name!r} here, only {', '.join(map(repr, names))}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name

    @field_validator("n")
    @classmethod
    def _check_n(cls, n: int, info: ValidationInfo[ServerLimits]) -> int:
        return _check_range("n", n, 1, info.context.max_samples)

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, stop: Any) -> Any:
        if isinstance(stop, str):
            return [stop]
        if not isinstance(stop, list):
            raise RequestError(
                f"stop = {show_value(stop)} must be a string or a list of up to "
                f"{MAX_STOP_STRINGS} strings",
                param="stop",
            )
        return stop


class CompletionBody(RequestBody):
    """The body of /v1/completions."""

    # A missing prompt gets the same message as one of a wrong type.
    prompt: Any = Field(default=None, validate_default=True)
    # Whether the text of a choice includes its prompt.
    echo: bool = False
    max_tokens: int = DEFAULT_MAX_TOKENS
    # Most likely tokens at each position; 0 = only the chosen token.
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    # Unsupported, except for neutral values.
    best_of: Any = None
    suffix: Any = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _list_of_prompts(cls, prompt: Any) -> list[Any]:
        """A list of prompts, each a string or a list of token ids."""
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            # Not isinstance: booleans are integers in Python.
            if all(type(item) is int for item in prompt):
                return [prompt]
            if all(isinstance(item, str | list) for item in prompt):
                return prompt
        raise RequestError(
            "prompt must be a string, a list of token ids, or a list of either",
            param="prompt",
        )

    @field_validator("max_tokens")
    @classmethod
    def _check_max_tokens(cls, max_tokens: int, info: ValidationInfo[ServerLimits]) -> int:
        # With echo, 0 asks for the log-probabilities of the prompt alone.
        least = 0 if info.data.get("echo") else 1
        return _check_range("max_tokens", max_tokens, least, info.context.max_length)

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        # The best n of n samples are all of them.
        _check_supported("best_of", self.best_of, (1, self.n))
        return self


class ChatBody(RequestBody):
    """The body of /v1/chat/completions."""

    # Unsupported, except for neutral values; first, because their errors explain most.
    tools: Any = None
    functions: Any = None
    response_format: Any = None
    # Accepted and ignored.
    store: Any = None

    # Missing messages get the same message as those of a wrong type.
    messages: Any = Field(default=None, validate_default=True)
    # The new name of `max_tokens`, which takes precedence.
    max_completion_tokens: int | None = None
    # None = what the prompt leaves of the context.
    max_tokens: int | None = None
    logprobs: bool = False
    # Requires `logprobs`.
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @field_validator("messages", mode="plain")
    @classmethod
    def _check_messages(cls, messages: Any) -> list[Message]:
        """Messages whose contents are strings; content parts are joined."""
        if not isinstance(messages, list):
            raise RequestError("messages must be a list of messages", param="messages")
        messages = [_join_parts(message) for message in messages]
        try:
            check_messages(messages, "messages")
        except ValueError as error:
            raise RequestError(str(error), param="messages") from None
        return messages

    @field_validator("max_completion_tokens", "max_tokens")
    @classmethod
    def _check_max_tokens(cls, max_tokens: int, info: ValidationInfo[ServerLimits]) -> int:
        name = str(info.field_name)
        return _check_range(name, max_tokens, 1, info.context.max_length)

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs requires logprobs = true", param="top_logprobs"
            )
        return self


Body = TypeVar("Body", bound=RequestBody)


def validate_body(
    body_type: type[Body], body: dict[str, Any], limits: ServerLimits
) -> Body:
    """Validates a JSON object; raises RequestError."""
    try:
        return body_type.model_validate(body, context=limits)
    except pydantic.ValidationError as error:
        raise _request_error(error) from None


def _request_error(error: pydantic.ValidationError) -> RequestError:
    """One line about the first error: the field, its value and what is allowed."""
    # Errors are in the order of the fields; unknown fields come last.
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        # The one error without a place: a lone surrogate in the name of a field.
        name = show_value(first["input"])
        return RequestError(f"the field name {name} is not valid Unicode")
    param = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        return RequestError(f"{name} is not a field of this request", param=param)
    if first["type"] == "missing":
        return RequestError(f"{param} is required", param=param)

    # An element of a list, stop[1], or a field of an object, stream_options.include_usage.
    where = param
    for part in first["loc"][1:]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}"
    # Pydantic writes "Input should be a valid integer" or "List should have at most 4 items
    # after validation"; after the value, "must be a valid integer" reads better.
    allowed = re.sub(r"^\w+ should", "must", first["msg"])
    allowed = allowed.replace(" after validation", "")
    return RequestError(f"{where} = {show_value(first['input'])} {allowed}", param=param)


def _check_range(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise RequestError(
            f"{name} = {show_value(value)} must be an integer from {least} to {most}",
            param=name,
        )
    return value


def _check_supported(name: str, value: Any, neutral: Sequence[Any]) -> None:
    """Refuses a field that is not supported, except for its neutral values."""
    # In Python True == 1, but true is not a neutral number.
    if value is not None and (isinstance(value, bool) or value not in neutral):
        raise RequestError(f"{name} is not supported here: leave it out", param=name)


def _join_parts(message: Any) -> Any:
    """`message` with its list of text parts joined to one string."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = ""
    # Images, audio and files are parts of other types, even if they have a text too.
    for part in message["content"]:
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"}
        if not is_text or part["type"] != "text" or not isinstance(part["text"], str):
            raise RequestError(
                f"messages contain the part {show_value(part)}; only parts "
                '{"type": "text", "text": "..."} are supported',
                param="messages",
            )
        content += part["text"]
    return message | {"content": content}


def show_value(value: Any) -> str:
    """`value` as JSON, cut to 40 characters."""
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
