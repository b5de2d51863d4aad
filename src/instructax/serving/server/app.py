"""The server as an ASGI application, and the command that runs it."""

import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from instructax.config import ConfigError, require
from instructax.data.chat_template import turn_end_mask
from instructax.serving.engine import SampleRequest
from instructax.serving.policy import Policy, open_served
from instructax.serving.server.batcher import Batcher
from instructax.serving.server.errors import HANDLED, error_response
from instructax.serving.server.request_bodies import MAX_TOP_LOGPROBS
from instructax.serving.server.service import Service

# Seconds that running requests get to finish after Ctrl-C.
SHUTDOWN_SECONDS = 3


async def _handle_error(request: Request, error: Exception) -> Response:
    status, body = error_response(error)
    # Clients with a retry policy wait for so many seconds.
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(body, status_code=status, headers=headers)


def make_app(policy: Policy, name: str, *, queue_limit: int) -> Starlette:
    """Creates the ASGI application.

    Args:
      policy: the policy to serve.
      name: the model's name in requests.
      queue_limit: number of samples that may wait.
    """
    # A small vocabulary may have fewer tokens than a client may ask for.
    top = min(MAX_TOP_LOGPROBS, policy.tokenizer.size)
    batcher = Batcher(
        policy.engine,
        turn_end_mask=turn_end_mask(policy.tokenizer, policy.template),
        queue_limit=queue_limit,
        top=top,
    )
    service = Service(policy, batcher, name)

    # The batcher's thread lives as long as the application.
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.start()
        try:
            yield
        finally:
            batcher.close()

    app = Starlette(
        routes=[
            Route("/health", service.health),
            Route("/v1/models", service.models),
            # A name may contain slashes.
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys(HANDLED, _handle_error),
        lifespan=lifespan,
    )
    # For the command, which closes it, and for tests.
    app.state.batcher = batcher
    return app


def warm_up(policy: Policy) -> None:
    """Compiles the smallest programs, so that a first short request is fast."""
    request = SampleRequest(
        prompt=np.array([policy.engine.eos_id]),
        seed=0,
        sample_index=0,
        temperature=0.0,
        max_new_tokens=2,
    )
    # The engine has programs for one row and for all rows.
    for count in sorted({1, policy.engine.batch_size}):
        for _ in policy.engine.stream([request] * count):
            pass


def serve(
    path: str,
    *,
    name: str,
    host: str,
    port: int,
    dtype: Any,
    batch_size: int,
    queue_limit: int,
) -> None:
    """Serves a finished run until Ctrl-C.

    Args:
      path: the finished run.
      name: the model's name in requests.
      host: address to listen on.
      port: port to listen on; 0 = any free one.
      dtype: the computation's dtype.
      batch_size: samples that are drawn at a time.
      queue_limit: number of samples that may wait; more are refused.

    Raises:
      ConfigError: the run cannot be served, or the port is taken.
      KeyboardInterrupt: after Ctrl-C, once running requests are done.
    """
    require(
        queue_limit >= batch_size,
        f"--queue_limit = {queue_limit} must be at least --batch_size = {batch_size}",
    )
    policy = open_served(path, dtype=dtype, batch_size=batch_size)
    warm_up(policy)
    app = make_app(policy, name, queue_limit=queue_limit)
    config = _uvicorn_config(app, host, port)
    # Bind first, so that the printed port is the real one.
    listener = _bind(config)
    host, port = listener.getsockname()[:2]
    print(
        f"serving {name} on http://{host}:{port}/v1 with batch size {batch_size}; "
        "press Ctrl-C to stop",
        flush=True,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        # A second Ctrl-C skips the application's own shutdown.
        app.state.batcher.close()


def _uvicorn_config(app: Starlette, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        lifespan="on",
    )


def _bind(config: uvicorn.Config) -> socket.socket:
    """Opens the server's port; raises ConfigError if it is taken."""
    try:
        return config.bind_socket()
    # uvicorn exits the process if the port is taken.
    except SystemExit:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: choose another --port"
        ) from None
