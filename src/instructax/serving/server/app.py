"""The routes of the server, and what runs it."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from instructax.config import INT_LIMIT, ConfigError, require
from instructax.data.chat_template import turn_end_mask
from instructax.serving.chat import Policy, open_served
from instructax.serving.engine import Draw
from instructax.serving.server import responses as replies
from instructax.serving.server.batcher import Batcher, Busy, Score, Stopping
from instructax.serving.server.requests import (
    MOST_TOP_LOGPROBS,
    ParsedRequest,
    RequestError,
    chat_of,
    completion_of,
    parse_json,
)
from instructax.serving.text_stream import Finish, TextStream

LARGEST_BODY = 8 * 2**20  # bytes
GOODBYE_SECONDS = 3  # that answers under way have at the end


@dataclasses.dataclass
class _Answer:
    """One sample of a request."""

    prompt: np.ndarray  # i32[n]
    stream: TextStream
    tokens: list[int] = dataclasses.field(
        default_factory=list
    )  # that were drawn, the end token too


class _Service:
    """Answers requests with one policy."""

    def __init__(self, policy: Policy, batcher: Batcher, name: str):
        self._policy, self._batcher, self._name = policy, batcher, name
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse(replies.models([self._name], self._created))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        if request.path_params["name"] != self._name:
            raise RequestError(
                f"there is no model {request.path_params['name']!r} here", status=404
            )
        return JSONResponse(replies.models([self._name], self._created)["data"][0])

    async def health(self, request: Request) -> Response:
        """GET /health"""
        return JSONResponse({"status": "ok"})

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answered(request, completion_of)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answered(request, chat_of)

    async def _answered(
        self, request: Request, parse: Callable[..., ParsedRequest]
    ) -> Response:
        asked = parse(
            parse_json(await _body(request)),
            self._policy,
            [self._name],
            self._batcher.queue_limit,
        )
        answers = [
            _Answer(prompt, TextStream(self._policy.tokenizer, asked.stops))
            for prompt in asked.prompts
            for _ in range(asked.n)
        ]
        pieces = self._pieces(asked, answers)
        if asked.stream:
            # The first piece is awaited here, so that what goes wrong before it has a
            # status of its own.
            first = await anext(pieces, None)
            return StreamingResponse(
                self._events(asked, answers, first, pieces), media_type="text/event-stream"
            )
        return await _unless_gone(request, self._whole(asked, answers, pieces))

    async def _pieces(
        self, asked: ParsedRequest, answers: list[_Answer]
    ) -> AsyncGenerator[tuple[int, str]]:
        """(index of the answer, text that can be shown) as the answers are drawn."""
        seed = secrets.randbelow(INT_LIMIT) if asked.seed is None else asked.seed
        limits = [limit for limit in asked.limits for _ in range(asked.n)]
        draws = [
            Draw(
                prompt=answer.prompt,
                seed=seed,
                number=number,
                temperature=asked.temperature,
                limit=limit,
            )
            for number, (answer, limit) in enumerate(zip(answers, limits, strict=True))
        ]
        if limits[0] == 0:
            return
        async with contextlib.aclosing(self._batcher.draw(draws, chat=asked.chat)) as found:
            async for index, piece, done in found:
                answer = answers[index]
                text = answer.stream.add(piece.tokens, over=piece.over, ended=piece.ended)
                answer.tokens += piece.tokens.tolist()
                if answer.stream.finish is not None:
                    del answer.tokens[answer.stream.tokens :]
                    done()
                yield index, text

    async def _whole(
        self, asked: ParsedRequest, answers: list[_Answer], pieces: AsyncIterator[Any]
    ) -> Response:
        async for _ in pieces:
            pass
        texts = [self._echoed(asked, answer) + answer.stream.text for answer in answers]
        finishes: list[Finish] = [answer.stream.finish or "length" for answer in answers]
        logprobs: list[Any] = [None] * len(answers)
        if asked.logprobs:
            logprobs = await self._logprobs(asked, answers)
        envelope = replies.Envelope.new(asked.chat, self._name)
        return JSONResponse(
            envelope.whole(texts, finishes, logprobs, _usage(asked, answers))
        )

    def _echoed(self, asked: ParsedRequest, answer: _Answer) -> str:
        return self._policy.tokenizer.decode(answer.prompt) if asked.echo else ""

    async def _logprobs(self, asked: ParsedRequest, answers: list[_Answer]) -> list[Any]:
        """At temperature 1, of a forward pass over prompt and answer: the same for tokens
        read and tokens drawn."""
        texts = [np.array([*answer.prompt, *answer.tokens], np.int32) for answer in answers]
        firsts = [0 if asked.echo else len(answer.prompt) for answer in answers]
        wanted = [Score(text, first) for text, first in zip(texts, firsts, strict=True)]
        scores = await self._batcher.score(wanted, top=asked.top > 0)
        written = replies.chat_logprobs if asked.chat else replies.completion_logprobs
        return [
            written(self._policy.tokenizer, text, found, first=first, top=asked.top)
            for text, found, first in zip(texts, scores, firsts, strict=True)
        ]

    async def _events(
        self,
        asked: ParsedRequest,
        answers: list[_Answer],
        first: tuple[int, str] | None,
        pieces: AsyncGenerator[Any],
    ) -> AsyncIterator[str]:
        envelope = replies.Envelope.new(asked.chat, self._name)
        for index, answer in enumerate(answers):
            if asked.chat:
                yield replies.sse(envelope.piece(index, "", None, opens=True))
            elif asked.echo:
                finish = "length" if first is None else None
                yield replies.sse(
                    envelope.piece(index, self._echoed(asked, answer), finish)
                )
        try:
            async with contextlib.aclosing(_joined(first, pieces)) as joined:
                async for index, text in joined:
                    finish = answers[index].stream.finish
                    if text or finish is not None:
                        yield replies.sse(envelope.piece(index, text, finish))
        except Exception as error:  # the status is sent already
            yield replies.sse(_error_of(error)[1])
            return
        if asked.include_usage:
            yield replies.sse(envelope.last(_usage(asked, answers)))
        yield replies.sse("[DONE]")


def _usage(asked: ParsedRequest, answers: list[_Answer]) -> dict[str, int]:
    return replies.usage(
        sum(map(len, asked.prompts)), sum(len(answer.tokens) for answer in answers)
    )


async def _joined(first: Any, rest: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    async with contextlib.aclosing(rest):
        if first is not None:
            yield first
        async for one in rest:
            yield one


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise RequestError(f"the body is larger than {LARGEST_BODY} bytes", status=413)
    return body


async def _unless_gone(request: Request, work: Any) -> Response:
    """What `work` returns; it is given up if the client leaves."""
    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=499)
    finally:
        for task in (answer, gone):
            task.cancel()


def _error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of what went wrong; faults of the program are told without their
    insides."""
    if isinstance(error, RequestError):
        kind = "invalid_request_error"
        return error.status, replies.error_object(
            str(error), kind=kind, param=error.param, code=error.code
        )
    if isinstance(error, Busy):
        return 429, replies.error_object(
            str(error), kind="rate_limit_error", code="rate_limit_exceeded"
        )
    if isinstance(error, Stopping):
        return 503, replies.error_object("the server is shutting down", kind="server_error")
    if isinstance(error, HTTPException):
        return error.status_code, replies.error_object(
            error.detail, kind="invalid_request_error"
        )
    return 500, replies.error_object(
        "the server has failed; its log says how", kind="server_error"
    )


async def _refused(request: Request, error: Exception) -> Response:
    status, body = _error_of(error)
    return JSONResponse(
        body, status_code=status, headers={"Retry-After": "1"} if status == 429 else None
    )


def make_app(policy: Policy, name: str, *, queue_limit: int) -> Starlette:
    """The server of `policy`, under the name `name`, as an ASGI application; `queue_limit`
    samples may wait."""
    top = min(MOST_TOP_LOGPROBS, policy.tokenizer.size)
    ends = turn_end_mask(policy.tokenizer, policy.template)
    batcher = Batcher(policy.engine, ends=ends, queue_limit=queue_limit, top=top)
    service = _Service(policy, batcher, name)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.begin()
        try:
            yield
        finally:
            batcher.close()

    app = Starlette(
        routes=[
            Route("/health", service.health),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys(
            (RequestError, Busy, Stopping, HTTPException, Exception), _refused
        ),
        lifespan=lifespan,
    )
    app.state.batcher = batcher
    return app


def warm_up(policy: Policy) -> None:
    """Compiles the smallest programs, so that a first short request does not wait for them."""
    for count in sorted({1, policy.engine.rows}):
        draw = Draw(
            prompt=np.array([policy.engine.eos_id]),
            seed=0,
            number=0,
            temperature=0.0,
            limit=2,
        )
        for _ in policy.engine.stream([draw] * count):
            pass


def serve(
    path: str, *, name: str, host: str, port: int, dtype: Any, rows: int, queue_limit: int
) -> None:
    """Serves the finished run at `path` until Ctrl-C, which raises KeyboardInterrupt once
    answers under way have ended.

    Raises ConfigError for what cannot be served.
    """
    require(
        queue_limit >= rows, f"--queue = {queue_limit} must be at least --rows = {rows}"
    )
    policy = open_served(path, dtype=dtype, rows=rows)
    warm_up(policy)
    app = make_app(policy, name, queue_limit=queue_limit)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=GOODBYE_SECONDS,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise ConfigError(
            f"{host}:{port} cannot be listened on: choose another --port"
        ) from None
    host, port = socket.getsockname()[:2]
    print(
        f"{name} is served on http://{host}:{port}/v1, {rows} requests at a time; Ctrl-C ends it",
        flush=True,
    )
    try:
        server.run(sockets=[socket])
    finally:
        app.state.batcher.close()  # a second Ctrl-C passes the application's own end over
