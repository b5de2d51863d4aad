"""Parses requests in the format of OpenAI's API into prompts and sampling parameters."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from instructax.runtime.files import refuse_constant
from instructax.serving.policy import Policy
from instructax.serving.server.errors import RequestError
from instructax.serving.server.request_bodies import (
    ChatBody,
    CompletionBody,
    RequestBody,
    ServerLimits,
    show_value,
    validate_body,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParsedRequest:
    """A request that can be served."""

    # The format of the response, and whether turn tokens end an answer.
    chat: bool
    # i32[n] each, n >= 1.
    prompts: tuple[np.ndarray, ...]
    # 0 only with `echo`.
    max_new_tokens: int
    # Samples of each prompt.
    n: int
    temperature: float
    # None = a random one.
    seed: int | None
    # Not part of the text that they end.
    stop_strings: tuple[str, ...]
    # Whether the text of a choice includes its prompt.
    echo: bool
    logprobs: bool
    # Most likely tokens to report at each position.
    top: int
    stream: bool
    # Whether a stream ends with the token counts.
    include_usage: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """Returns the JSON object in `body`; raises RequestError if there is none."""
    try:
        parsed = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    # Deeply nested arrays exceed Python's recursion limit.
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise RequestError("the body must be a JSON object")
    return parsed


def parse_completion(
    body: dict[str, Any], policy: Policy, limits: ServerLimits
) -> ParsedRequest:
    """Parses the body of /v1/completions.

    Args:
      body: the JSON object.
      policy: the policy that will serve it.
      limits: what the server allows.

    Raises:
      RequestError: the request cannot be served.
    """
    request = validate_body(CompletionBody, body, limits)
    prompts = [_prompt_tokens(prompt, policy) for prompt in request.prompt]
    return _parsed(
        request,
        chat=False,
        prompts=prompts,
        max_new_tokens=request.max_tokens,
        limits=limits,
        echo=request.echo,
        logprobs=request.logprobs,
    )


def parse_chat(body: dict[str, Any], policy: Policy, limits: ServerLimits) -> ParsedRequest:
    """Parses the body of /v1/chat/completions; as `parse_completion`."""
    request = validate_body(ChatBody, body, limits)
    try:
        prompt = policy.encode(request.messages)
    except ValueError as error:
        raise RequestError(str(error), param="messages") from None
    if len(prompt) == 0:
        raise RequestError(
            "messages have no text; they need at least one token", param="messages"
        )

    # Both are at least 1 if they are given.
    max_new_tokens = request.max_completion_tokens or request.max_tokens
    if max_new_tokens is None:
        # At least 1, so that a prompt without room is refused with its numbers.
        max_new_tokens = max(limits.max_length - len(prompt), 1)
    # As in /v1/completions: the number of top tokens, or None.
    logprobs = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
    return _parsed(
        request,
        chat=True,
        prompts=[prompt],
        max_new_tokens=max_new_tokens,
        limits=limits,
        echo=False,
        logprobs=logprobs,
    )


def _parsed(
    request: RequestBody,
    *,
    chat: bool,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    limits: ServerLimits,
    echo: bool,
    logprobs: int | None,
) -> ParsedRequest:
    """Checks how the fields fit together; `logprobs` is the number of top tokens."""
    for prompt in prompts:
        _check_context_length(len(prompt), max_new_tokens, limits.max_length)
    if request.stream and logprobs is not None:
        raise RequestError(
            "logprobs cannot be streamed: leave out logprobs or stream", param="logprobs"
        )
    if request.n * len(prompts) > limits.max_samples:
        raise RequestError(
            f"n = {request.n} for {len(prompts)} prompts is more than "
            f"{limits.max_samples} samples",
            param="n",
        )
    return ParsedRequest(
        chat=chat,
        prompts=tuple(prompts),
        max_new_tokens=max_new_tokens,
        n=request.n,
        temperature=request.temperature,
        seed=request.seed,
        stop_strings=tuple(request.stop),
        echo=echo,
        logprobs=logprobs is not None,
        top=logprobs or 0,
        stream=request.stream,
        include_usage=request.stream_options.include_usage,
    )


def _check_context_length(prompt_tokens: int, max_new_tokens: int, max_length: int) -> None:
    total = prompt_tokens + max_new_tokens
    if total > max_length:
        raise RequestError(
            f"this model's maximum context length is {max_length} tokens, but {total} were "
            f"requested ({prompt_tokens} of the prompt, {max_new_tokens} of the "
            "completion): shorten one of them",
            param="max_tokens",
            code="context_length_exceeded",
        )


def _prompt_tokens(prompt: str | list[Any], policy: Policy) -> np.ndarray:
    """The tokens i32[n] of a prompt that is a string or a list of token ids."""
    if isinstance(prompt, str):
        try:
            tokens = policy.tokenizer.encode(prompt)
        except ValueError as error:
            raise RequestError(f"prompt: {error}", param="prompt") from None
    else:
        size = policy.tokenizer.size
        for token in prompt:
            if type(token) is not int or not 0 <= token < size:
                raise RequestError(
                    f"prompt contains {show_value(token)}; token ids are integers "
                    f"from 0 to {size - 1}",
                    param="prompt",
                )
        tokens = np.asarray(prompt, np.int32)
    if len(tokens) == 0:
        raise RequestError("prompt is empty; it needs at least one token", param="prompt")
    return tokens
