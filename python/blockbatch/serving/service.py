"""The state of a server: what its routes share, and where it stands between its start and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from blockbatch.serving.bridge import Bridge
from blockbatch.serving.errors import ApiError, bad_request, engine_failed, unavailable
from blockbatch.serving.exchange import Exchange
from blockbatch.serving.logs import event
from blockbatch.serving.metrics import Metrics
from blockbatch.serving.reading import Job, Reader

# Characters of a body that are read on the loop; longer ones would hold up the streams of others.
_SHORT = 20_000


@dataclass(frozen=True)
class Settings:
    """How a server answers.

    Attributes:
        model_name: the name that clients know.
        options: decode options that requests have unless they say otherwise, `preset` among them.
        chat_format: see `Reader`.
        api_key: what clients must bring; None: nobody is asked.
        request_timeout: seconds that a request may take; None: as long as it wants.
        drain_seconds: seconds that running requests get when the server is told to end.
        max_body_bytes: of a request.
        log_prompts: whether the log holds what clients send.
        page: whether there is a page at /.
    """

    model_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    chat_format: str = "auto"
    api_key: str | None = None
    request_timeout: float | None = 600.0
    drain_seconds: float = 30.0
    max_body_bytes: int = 4 << 20
    log_prompts: bool = False
    page: bool = True


class Service:
    """One model behind HTTP.

    Args:
        settings: how it answers.
        load: gives the model and its engine; runs on a thread, while the server says that it is starting.

    Attributes:
        status: "starting", "ready", "draining" or "failed".
        error: what made it fail.
        in_flight: HTTP requests that are being answered, those for its health apart.
        live: held by the decode that the page at / shows.
    """

    def __init__(self, settings: Settings, load: Callable[[], tuple[Any, Any]]) -> None:
        self.settings, self._load = settings, load
        self.status, self.error = "starting", None
        self.model: Any = None
        self.reader: Reader | None = None
        self.bridge: Bridge | None = None
        self.in_flight = 0
        self.live = asyncio.Lock()
        self.ended = asyncio.Event()  # failed, or told to end: the process is to look
        self.metrics = Metrics(settings.model_name, self._stats)
        self._loading: asyncio.Task | None = None

    def start(self) -> None:
        """Begins to load; called on the loop that will serve."""
        self._loading = asyncio.ensure_future(self._start())

    async def _start(self) -> None:
        try:
            self.model, engine = await _on_daemon(self._load)
            self.reader = Reader(self.model, self.settings.options, self.settings.chat_format)
        except Exception as error:  # the process says it and leaves
            self.fail(error)
            return
        self.bridge = Bridge(engine, self._engine_failed)
        if self.status == "starting":
            self.status = "ready"
        if self.reader.plain_chat:
            event("chat_format", format="plain", model=self.settings.model_name)
        event("ready", model=self.settings.model_name)

    async def stop(self) -> None:
        """Ends the engine."""
        if self._loading is not None:
            self._loading.cancel()
        if self.bridge is not None:
            await self.bridge.stop()

    def drain(self) -> None:
        """Takes no more requests; those that are there go on."""
        if self.status != "failed":
            self.status = "draining"
        self.ended.set()

    def fail(self, error: BaseException) -> None:
        """The server is of no use any more."""
        self.status, self.error = "failed", error
        self.ended.set()

    def require_ready(self) -> None:
        """Raises ApiError while the server takes no requests."""
        if self.status == "failed":
            raise engine_failed()
        if self.status != "ready":
            raise unavailable(f"server: expected to be ready, it is {self.status}")

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for the name of another model."""
        if name not in (None, self.settings.model_name):
            raise ApiError(
                404,
                f"model: expected {self.settings.model_name!r}, got {name[:200]!r}",
                param="model",
                code="model_not_found",
            )

    async def read(self, read: Callable[[Any], list[Job]], body: Any, size: int) -> list[Job]:
        """The jobs of a body of `size` bytes."""
        try:
            return read(body) if size < _SHORT else await asyncio.to_thread(read, body)
        except RecursionError:
            raise bad_request("body: expected less nesting") from None

    def record(self, exchange: Exchange) -> None:
        """Metrics and log of a request that has ended."""
        ended = exchange.ended()
        self.metrics.record(ended)
        usage = ended.usage
        event(
            "request",
            id=ended.request_id,
            finish=ended.outcome,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            forwards=usage.forwards,
            seconds=round(ended.seconds, 4),
            first_seconds=None if ended.first is None else round(ended.first, 4),
            logprobs=True if any(told is not None for told in exchange.logprobs) else None,
            prompts=exchange.prompts() if self.settings.log_prompts else None,
            answers=[text.text for text in exchange.texts] if self.settings.log_prompts else None,
        )

    def _stats(self) -> Any:
        return self.bridge.engine.stats() if self.bridge is not None and self.status != "failed" else None

    def _engine_failed(self, error: BaseException) -> None:
        event("engine_failed", level=logging.ERROR, error=error)
        self.fail(error)


async def _on_daemon(function: Callable[[], Any]) -> Any:
    """What `function` gives on a thread that does not keep the process from ending."""
    loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="blockbatch-load", daemon=True).start()
    return await future
