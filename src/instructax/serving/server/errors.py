"""Errors of the server, and the error objects of OpenAI's API that clients get for them."""

from typing import Any

from starlette.exceptions import HTTPException


class RequestError(Exception):
    """A request that cannot be served: HTTP status and the fields of OpenAI's error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ):
        # A value from the request may have a lone surrogate, which UTF-8 cannot encode.
        message = message.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(" ".join(message.split()))
        self.status = status
        self.param = param
        self.code = code


class QueueFullError(Exception):
    """The queue has no room for the request."""


class ShuttingDownError(Exception):
    """The server is shutting down."""


# Exceptions whose handlers send an error object.
HANDLED = (RequestError, QueueFullError, ShuttingDownError, HTTPException, Exception)


def error_response(error: Exception) -> tuple[int, dict[str, Any]]:
    """Returns (HTTP status, error object).

    Internal errors are reported without details, which are in the server's log.
    """
    if isinstance(error, RequestError):
        body = _error_object(
            str(error), "invalid_request_error", param=error.param, code=error.code
        )
        return error.status, body
    if isinstance(error, QueueFullError):
        body = _error_object(str(error), "rate_limit_error", code="rate_limit_exceeded")
        return 429, body
    if isinstance(error, ShuttingDownError):
        return 503, _error_object("the server is shutting down", "server_error")
    if isinstance(error, HTTPException):
        return error.status_code, _error_object(error.detail, "invalid_request_error")
    return 500, _error_object("internal error; see the server's log", "server_error")


def _error_object(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
