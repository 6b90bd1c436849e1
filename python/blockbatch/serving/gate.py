"""What every HTTP request passes first: its name, its key, the size of its body."""

from __future__ import annotations

import hmac
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockbatch.serving.errors import ApiError
from blockbatch.serving.respond import Json
from blockbatch.serving.service import Service

# Paths that need the key, and whose requests are waited for when the server ends.
_GUARDED = re.compile(r"/(v1|live)(/|$)")
_NAME = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """ASGI middleware in front of all routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        key = service.settings.api_key
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _NAME.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name

        guarded = _GUARDED.match(scope["path"]) is not None

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                if guarded:
                    self._service.metrics.answered(message["status"])
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = name
                if self._service.status != "ready":
                    answer["connection"] = "close"
            await send(message)

        if not guarded:
            await self._app(scope, receive, named_send)
            return
        self._service.in_flight += 1
        try:
            refused = self._refuse(headers)
            if refused is not None:
                await Json(refused.body(), refused.status, refused.headers)(scope, receive, named_send)
            else:
                await self._app(scope, self._limited(receive), named_send)
        finally:
            self._service.in_flight -= 1

    def _refuse(self, headers: Headers) -> ApiError | None:
        """The error of a request without the key, or with a body that says to be too large."""
        if self._key is not None:
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, self._key):
                return ApiError(
                    401,
                    "Authorization: expected 'Bearer' and the key of this server",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._service.settings.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        most = self._service.settings.max_body_bytes
        return ApiError(
            413,
            f"body: expected at most {most} bytes, got more",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _limited(self, receive: Receive) -> Receive:
        left = self._service.settings.max_body_bytes

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    error = self._too_large()
                    raise HTTPException(error.status, error.message, error.headers)
            return message

        return limited
