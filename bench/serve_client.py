"""Clients of the server under measurement: so many at a time, each with one stream, on asyncio alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from typing import Any, NamedTuple


class Told(NamedTuple):
    """One answer.

    Attributes:
        number: of the request.
        text, tokens: of the answer.
        branches: that it was decoded with.
        first, whole: seconds from the request to the first text and to the end.
    """

    number: int
    text: str
    tokens: int
    branches: int
    first: float
    whole: float


def load(port: int, bodies: list[dict[str, Any]], clients: int) -> tuple[list[Told], float]:
    """Asks for all bodies with `clients` streams at a time. Returns the answers in order, and the seconds."""
    return asyncio.run(_load(port, bodies, clients))


async def _load(port: int, bodies: list[dict[str, Any]], clients: int) -> tuple[list[Told], float]:
    waiting, told = deque(enumerate(bodies)), []

    async def client() -> None:
        while waiting:
            told.append(await _stream(port, *waiting.popleft()))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return sorted(told), time.perf_counter() - begun


async def _stream(port: int, number: int, body: dict[str, Any]) -> Told:
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    about = ("Host: bench", "Connection: close", "Content-Type: application/json")
    head = "\r\n".join(("POST /v1/completions HTTP/1.1", *about, f"Content-Length: {len(content)}"))
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(head.encode() + b"\r\n\r\n" + content)
    text, first, usage, done = "", None, None, False
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"the server answered {status!r}: {(await reader.read(2000))!r}")
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise SystemExit(f"the server answered {event['error']}")
        usage = event["usage"] or usage
        for choice in event["choices"]:
            if choice["text"] and first is None:
                first = time.perf_counter() - begun
            text += choice["text"]
    writer.close()
    if not done:
        raise SystemExit("the server broke an answer off")
    whole = time.perf_counter() - begun
    branches = usage["blockbatch"]["branches"]
    return Told(number, text, usage["completion_tokens"], branches, whole if first is None else first, whole)
