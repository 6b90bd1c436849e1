"""Errors as clients of OpenAI's API read them."""

from __future__ import annotations

from typing import Any

# Seconds after which a client that was turned away may come again.
RETRY_AFTER = 1

_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what was expected and what came.
        param: the field of the body that is meant.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after: float = RETRY_AFTER) -> ApiError:
    """The server cannot take the request now; the client, or a router, may come again."""
    seconds = max(1, round(retry_after))
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(seconds)})


def engine_failed() -> ApiError:
    """What every client hears that waits for an engine that has ended; the cause stands in the log."""
    return ApiError(500, "engine: the decode ended with an error of the server", code="engine_failed")


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"request: expected to end within {seconds:g} s, it did not", code="timeout")
