"""Answers to requests that decode: one JSON, or a stream of server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from blockbatch.serving.answers import Shape
from blockbatch.serving.errors import ApiError
from blockbatch.serving.exchange import ClientGone, Exchange, Piece
from blockbatch.serving.reading import Job
from blockbatch.serving.service import Service

DONE = b"data: [DONE]\n\n"
# What nobody reads: the client has gone.
_GONE = 499


class Json(JSONResponse):
    """JSON; half characters, which no client can have sent as text, come as question marks."""

    def render(self, content: Any) -> bytes:
        return encode(content)


def encode(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


def server_event(content: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + encode(content) + b"\n\n"


async def respond(
    service: Service,
    request: Request,
    jobs: list[Job],
    shape: Shape,
    *,
    stream: bool = False,
) -> Response:
    """Decodes the jobs. A stream begins with the first news of them: what fails before has its status."""
    timeout = service.settings.request_timeout
    exchange = Exchange(service, jobs, request.receive, shape.request_id, timeout)
    try:
        exchange.begin()
        if stream:
            return EventStream(exchange, shape, await exchange.wait())
        await exchange.finish()
        texts = exchange.texts
        tokens = [None if told is None else told.told for told in exchange.logprobs]
        reasons = [text.finish_reason for text in texts]
        return Json(shape.answer([text.text for text in texts], reasons, exchange.usage(), tokens))
    except ClientGone:
        return Response(status_code=_GONE)
    finally:
        if not exchange.streaming:
            exchange.close()


class EventStream(Response):
    """Server-sent events of an exchange, which it closes.

    Args:
        exchange: that has begun.
        shape: of the chunks.
        pieces: the first texts, as `Exchange.wait` gives them.
    """

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, shape: Shape, pieces: list[Piece]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._shape, self._pieces = exchange, shape, pieces
        self._said = [False] * len(exchange.texts)
        exchange.streaming = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._run(send)
        except ClientGone:
            pass  # an answer that breaks off is one that the client cannot take for a whole one
        finally:
            self._exchange.close()

    async def _run(self, send: Send) -> None:
        sent = self._exchange.sent
        await sent(send({"type": "http.response.start", "status": 200, "headers": self.raw_headers}))
        chunks = self._begin()
        try:
            while True:
                chunks += self._news()
                if chunks:
                    await self._send_chunks(send, chunks)
                if self._exchange.done:
                    break
                self._pieces, chunks = await self._exchange.wait(), []
            last = [self._shape.usage(self._exchange.usage())] if self._shape.with_usage else []
            await self._send_chunks(send, last, DONE)
        except ApiError as error:
            await self._send_chunks(send, [error.body()])
        await sent(send({"type": "http.response.body", "body": b"", "more_body": False}))

    def _begin(self) -> list[dict[str, Any]]:
        return [chunk for index in range(len(self._said)) if (chunk := self._shape.begin(index)) is not None]

    def _news(self) -> list[dict[str, Any]]:
        """Chunks of the new texts, and of the ends that came."""
        chunks = [self._shape.piece(*piece) for piece in self._pieces]
        for index, text in enumerate(self._exchange.texts):
            if text.finish_reason is not None and not self._said[index]:
                self._said[index] = True
                chunks.append(self._shape.end(index, text.finish_reason))
        return chunks

    async def _send_chunks(self, send: Send, chunks: Iterable[dict[str, Any]], end: bytes = b"") -> None:
        body = b"".join(map(server_event, chunks)) + end
        await self._exchange.sent(send({"type": "http.response.body", "body": body, "more_body": True}))
