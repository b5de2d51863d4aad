"""The request handlers of the server."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from instructax.config import INT_LIMIT
from instructax.serving.engine import SampleRequest, ScoreRequest
from instructax.serving.policy import Policy
from instructax.serving.server import responses
from instructax.serving.server.batcher import Batcher
from instructax.serving.server.errors import RequestError, error_response
from instructax.serving.server.request_bodies import ServerLimits
from instructax.serving.server.requests import (
    ParsedRequest,
    parse_chat,
    parse_completion,
    parse_json,
)
from instructax.serving.text_stream import TextStream

# Largest accepted request body, in bytes.
MAX_BODY_BYTES = 8 * 2**20

# nginx's status for a client that closed the connection; nobody receives it.
CLIENT_CLOSED_REQUEST = 499

Parse = Callable[[dict[str, Any], Policy, ServerLimits], ParsedRequest]


@dataclasses.dataclass
class _Choice:
    """One sample of a request."""

    # i32[n]
    prompt: np.ndarray
    stream: TextStream
    # Sampled tokens, including the end token.
    tokens: list[int] = dataclasses.field(default_factory=list)


class Service:
    """Serves requests with one policy."""

    def __init__(self, policy: Policy, batcher: Batcher, name: str):
        self._policy = policy
        self._batcher = batcher
        self._name = name
        self._created = int(time.time())
        self._limits = ServerLimits(
            model_names=[name],
            max_length=policy.engine.max_length,
            max_samples=batcher.queue_limit,
        )

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse(responses.model_list([self._name], self._created))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        name = request.path_params["name"]
        if name != self._name:
            raise RequestError(f"there is no model {name!r} here", status=404)
        models = responses.model_list([self._name], self._created)
        return JSONResponse(models["data"][0])

    async def health(self, request: Request) -> Response:
        """GET /health"""
        return JSONResponse({"status": "ok"})

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._respond(request, parse_completion)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._respond(request, parse_chat)

    async def _respond(self, request: Request, parse: Parse) -> Response:
        # Parsing a long prompt takes seconds: on a thread, it holds up no other request.
        body = await asyncio.to_thread(parse_json, await _read_body(request))
        parsed = await asyncio.to_thread(parse, body, self._policy, self._limits)
        # Choice i is sample i % n of prompt i // n, as in OpenAI's API.
        choices = []
        for prompt in parsed.prompts:
            for _ in range(parsed.n):
                stream = TextStream(self._policy.tokenizer, parsed.stop_strings)
                choices.append(_Choice(prompt, stream))

        # Nothing is sampled before the first piece is awaited.
        pieces = self._pieces(parsed, choices)
        if not parsed.stream:
            return await _unless_disconnected(
                request, self._complete(parsed, choices, pieces)
            )
        # Wait for the first piece here, so that an error before it still has its own
        # HTTP status.
        first = await _unless_disconnected(request, _first(pieces))
        if isinstance(first, Response):
            return first
        events = self._events(parsed, choices, first, pieces)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _pieces(
        self, parsed: ParsedRequest, choices: list[_Choice]
    ) -> AsyncGenerator[tuple[int, str]]:
        """Yields (index of the choice, new text) while the choices are sampled."""
        if parsed.max_new_tokens == 0:
            return
        # All samples of a request share a seed and differ by their index.
        seed = secrets.randbelow(INT_LIMIT) if parsed.seed is None else parsed.seed
        requests = []
        for index, choice in enumerate(choices):
            requests.append(
                SampleRequest(
                    prompt=choice.prompt,
                    seed=seed,
                    sample_index=index,
                    temperature=parsed.temperature,
                    max_new_tokens=parsed.max_new_tokens,
                )
            )

        # Closing the generator cancels the samples, also when the client has left.
        samples = self._batcher.sample(requests, chat=parsed.chat)
        async with contextlib.aclosing(samples):
            async for index, chunk, cancel in samples:
                choice = choices[index]
                text = choice.stream.add(
                    chunk.tokens, done=chunk.done, hit_eos=chunk.hit_eos
                )
                choice.tokens += chunk.tokens.tolist()
                if choice.stream.finish_reason is not None:
                    # Drop the tokens that were sampled after a stop string.
                    del choice.tokens[choice.stream.num_tokens :]
                    cancel()
                yield index, text

    async def _complete(
        self, parsed: ParsedRequest, choices: list[_Choice], pieces: AsyncIterator[Any]
    ) -> Response:
        """The response of a request that is not streamed."""
        # The choices collect the text; only the end matters here.
        async for _ in pieces:
            pass
        texts = []
        finish_reasons = []
        for choice in choices:
            texts.append(self._echo(parsed, choice) + choice.stream.text)
            # Without new tokens the stream never ended: the limit did.
            finish_reasons.append(choice.stream.finish_reason or "length")

        logprobs: list[Any] = [None] * len(choices)
        if parsed.logprobs:
            logprobs = await self._logprobs(parsed, choices)
        envelope = responses.Envelope.new(parsed.chat, self._name)
        usage = _usage(parsed, choices)
        return JSONResponse(envelope.completion(texts, finish_reasons, logprobs, usage))

    def _echo(self, parsed: ParsedRequest, choice: _Choice) -> str:
        return self._policy.tokenizer.decode(choice.prompt) if parsed.echo else ""

    async def _logprobs(self, parsed: ParsedRequest, choices: list[_Choice]) -> list[Any]:
        """Log-probabilities of each choice, from one forward pass at temperature 1.

        They are the same for tokens of the prompt and sampled tokens.
        """
        requests = []
        for choice in choices:
            # i32[prompt + completion]
            tokens = np.array([*choice.prompt, *choice.tokens], np.int32)
            start = 0 if parsed.echo else len(choice.prompt)
            requests.append(ScoreRequest(tokens=tokens, start=start))
        scores = await self._batcher.score(requests, top=parsed.top > 0)

        # Both formats have the same arguments.
        if parsed.chat:
            to_response = responses.chat_logprobs
        else:
            to_response = responses.completion_logprobs
        tokenizer = self._policy.tokenizer
        logprobs = []
        for request, found in zip(requests, scores, strict=True):
            logprobs.append(
                to_response(
                    tokenizer, request.tokens, found, start=request.start, top=parsed.top
                )
            )
        return logprobs

    async def _events(
        self,
        parsed: ParsedRequest,
        choices: list[_Choice],
        first: tuple[int, str] | None,
        pieces: AsyncGenerator[Any],
    ) -> AsyncIterator[str]:
        """Yields the server-sent events of a stream."""
        envelope = responses.Envelope.new(parsed.chat, self._name)
        # Each choice starts with its role, or with the prompt that it echoes.
        for index, choice in enumerate(choices):
            if parsed.chat:
                yield responses.sse(envelope.role_chunk(index))
            elif parsed.echo:
                # Without new tokens this is also the choice's last chunk.
                finish_reason = "length" if first is None else None
                echo = self._echo(parsed, choice)
                yield responses.sse(envelope.chunk(index, echo, finish_reason))

        try:
            async with contextlib.aclosing(_prepend(first, pieces)) as all_pieces:
                async for index, text in all_pieces:
                    finish_reason = choices[index].stream.finish_reason
                    # Held-back text makes empty pieces, which are not sent.
                    if text or finish_reason is not None:
                        yield responses.sse(envelope.chunk(index, text, finish_reason))
        except Exception as error:
            # The status has been sent already, so the error becomes an event.
            yield responses.sse(error_response(error)[1])
            return

        if parsed.include_usage:
            yield responses.sse(envelope.usage_chunk(_usage(parsed, choices)))
        yield responses.sse("[DONE]")


def _usage(parsed: ParsedRequest, choices: list[_Choice]) -> dict[str, int]:
    prompt_tokens = sum(len(prompt) for prompt in parsed.prompts)
    completion_tokens = sum(len(choice.tokens) for choice in choices)
    return responses.usage(prompt_tokens, completion_tokens)


async def _first(pieces: AsyncGenerator[Any]) -> Any:
    """The first piece, or None if there is none. Closes `pieces` if it is cancelled."""
    try:
        return await anext(pieces, None)
    except asyncio.CancelledError:
        await pieces.aclose()
        raise


async def _prepend(first: Any, rest: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """Yields `first`, unless it is None, and then `rest`, which is closed at the end."""
    async with contextlib.aclosing(rest):
        if first is not None:
            yield first
        async for item in rest:
            yield item


async def _read_body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        # Checked while reading, so that a large body is never held in memory.
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(
                f"the body is larger than {MAX_BODY_BYTES} bytes", status=413
            )
    return body


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Returns the result of `work`. If the client disconnects, cancels it and returns a
    Response that nobody reads."""
    response = asyncio.ensure_future(work)
    # After the body, the next message is the disconnect.
    disconnect = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if response.done():
            return response.result()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        response.cancel()
        disconnect.cancel()
