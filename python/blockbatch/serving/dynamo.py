"""A worker of NVIDIA Dynamo: `python -m blockbatch.serving.dynamo MODEL`, behind `python -m dynamo.frontend`.

The frontend has the HTTP face, the chat format and the tokenizer; the worker gets ids and sends ids. See
`moves` for requests whose worker dies. It needs `ai-dynamo-runtime` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockbatch.serving import logs, moves
from blockbatch.serving.answers import Ended, Usage, phases
from blockbatch.serving.bridge import Bridge
from blockbatch.serving.errors import ApiError, engine_failed, unavailable
from blockbatch.serving.metrics import Metrics
from blockbatch.serving.reading import Reader

ENGINE_FAILED = 1
# Messages one behind the other, as `--chat-format plain` of the server has them. The frontend reads the file.
PLAIN_TEMPLATE = Path(__file__).with_name("plain.jinja")
# Seconds between two looks whether the last request has ended.
_LOOK = 0.02
# Seconds for the errors of those that are sent elsewhere to reach the frontend.
_LAST_WORDS = 0.5


@dataclass(frozen=True)
class Settings:
    """How a worker answers.

    Attributes:
        model_name: the name that clients know.
        folder: of the checkpoint, from which the frontend has tokenizer and chat format.
        endpoint: where the frontend finds it, three names with dots between them.
        options, chat_format: see `blockbatch.serving.reading.Reader`.
        max_requests: that run at a time, for the frontend to know.
        drain_seconds: that running requests get when the worker is told to end; then they move.
        discovery, request_plane: of Dynamo.
    """

    model_name: str
    folder: Path
    endpoint: str = "dynamo.blockbatch.generate"
    options: dict[str, Any] = field(default_factory=dict)
    chat_format: str = "auto"
    max_requests: int = 32
    drain_seconds: float = 30.0
    discovery: str = "file"
    request_plane: str = "tcp"


class Worker:
    """Answers the frontend's requests with an engine.

    Args:
        model, engine: loaded.
        settings: how it answers.
        errors: the module `dynamo.llm.exceptions`.

    Attributes:
        ended: set when the engine has failed.
        in_flight: requests that are being answered.
    """

    def __init__(self, model: Any, engine: Any, settings: Settings, errors: Any) -> None:
        self._model, self._settings, self._errors = model, settings, errors
        self.reader = Reader(model, settings.options, settings.chat_format)
        self.ended, self.in_flight, self.error = asyncio.Event(), 0, None
        self.bridge = Bridge(engine, self._failed)
        self.metrics = Metrics(settings.model_name, lambda: None if self.error else engine.stats())

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one request, until it ends, or until nobody waits for it any more."""
        self.in_flight += 1
        try:
            async for chunk in self._generate(request, context):
                yield chunk
        except ApiError as error:
            raise moves.refused(error, self._errors) from None
        except moves.StreamDiffersError as error:
            raise self._errors.Unknown(str(error)) from None
        finally:
            self.in_flight -= 1

    async def _generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        asked = moves.read(request, self.reader, context.id(), seeded="seed" in self._settings.options)
        event, begun, first = asyncio.Event(), time.monotonic(), None
        stream = moves.TokenStream(self._model, asked)
        running = self.bridge.submit(asked.job, event)
        gone = asyncio.ensure_future(_stopped(context))
        gone.add_done_callback(lambda _: event.set())
        outcome = "error"
        try:
            while not stream.done:
                await event.wait()
                event.clear()
                if gone.done():
                    outcome = "abort"
                    return
                if self.bridge.refusal is not None:
                    raise self.bridge.refusal
                if running.ended and running.status != "finished":
                    raise engine_failed()
                chunk = stream.chunk(running)
                if chunk is not None:
                    first = time.monotonic() - begun if first is None else first
                    if stream.done:
                        outcome = stream.answer.finish_reason
                        told = _usage(asked, stream, running).json()
                        chunk["engine_data"] = {"blockbatch": told["blockbatch"]}
                    yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "abort"
            raise
        finally:
            gone.cancel()
            self.bridge.leave(event, [running])
            usage = _usage(asked, stream, running)
            queued = [running.started - running.submitted] if running.started is not None else []
            seconds = time.monotonic() - begun
            self.metrics.record(Ended(context.id(), outcome, usage, seconds, first, queued))
            logs.event(
                "request",
                id=context.id(),
                finish=outcome,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                forwards=usage.forwards,
                seconds=round(seconds, 4),
                skipped=len(asked.sent) or None,
            )

    async def drain(self, seconds: float) -> None:
        """Waits for the running requests; those that take longer are sent to other workers."""
        begun = time.monotonic()
        while self.in_flight and time.monotonic() - begun < seconds:
            await asyncio.sleep(_LOOK)
        if self.in_flight:
            logs.event("moved", level=logging.WARNING, requests=self.in_flight)
            self.bridge.turn_away(unavailable("worker: it ended before the request did"))
            await asyncio.sleep(_LAST_WORDS)

    def _failed(self, error: BaseException) -> None:
        logs.event("engine_failed", level=logging.ERROR, error=error)
        self.error = error
        self.ended.set()


async def _stopped(context: Any) -> None:
    """Until the client has gone."""
    with contextlib.suppress(Exception):
        await context.async_killed_or_stopped()


def _usage(asked: moves.Asked, stream: moves.TokenStream, running: Any) -> Usage:
    usage = Usage()
    written = len(stream.answer.tokens) if stream.done else len(running.final)
    usage.add(len(asked.job.prompt), written, phases(running.nfe), running.branches)
    usage.adopted = 0 if running.result is None else running.result.adopted
    return usage


def run(settings: Settings, load: Callable[[], tuple[Any, Any]], *, log_level: str = "info") -> int:
    """Works until a signal ends it or the engine fails.

    The first SIGTERM or SIGINT takes the worker from the list of those that get requests; those that are
    there get `settings.drain_seconds`, and then move. The second one ends at once.

    Args:
        load: gives the model and its engine.

    Returns:
        the exit status: 0 after a signal, ENGINE_FAILED after a failure of the engine.

    Raises:
        whatever `load` raises.
    """
    logs.set_up(log_level)
    return asyncio.run(_work(settings, load))


async def _work(settings: Settings, load: Callable[[], tuple[Any, Any]]) -> int:
    from dynamo.llm import exceptions
    from dynamo.runtime import DistributedRuntime

    model, engine = await asyncio.to_thread(load)
    worker = Worker(model, engine, settings, exceptions)
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, settings.discovery, settings.request_plane)
    endpoint = runtime.endpoint(settings.endpoint)
    with contextlib.suppress(AttributeError):  # figures at /metrics of DYN_SYSTEM_PORT
        endpoint.metrics.register_prometheus_expfmt_callback(lambda: worker.metrics.text().decode())
    serving = asyncio.ensure_future(endpoint.serve_endpoint(worker.generate, graceful_shutdown=True))
    told, at_once = asyncio.Event(), asyncio.Event()

    def told_to_end(number: int) -> None:
        logs.event("signal", signal=signal.Signals(number).name, at_once=told.is_set())
        (at_once if told.is_set() else told).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_end, number)
    await _register(settings, worker, model, endpoint)
    runtime.set_health_status(True)
    logs.event("ready", model=settings.model_name, endpoint=settings.endpoint)
    ends = [asyncio.ensure_future(event.wait()) for event in (told, worker.ended)]
    await asyncio.wait([serving, *ends], return_when=asyncio.FIRST_COMPLETED)
    if told.is_set():
        await endpoint.unregister_endpoint_instance()
        draining = asyncio.ensure_future(worker.drain(settings.drain_seconds))
        await asyncio.wait([draining, asyncio.ensure_future(at_once.wait())], return_when="FIRST_COMPLETED")
    elif worker.ended.is_set():
        await asyncio.sleep(_LAST_WORDS)
    status = ENGINE_FAILED if worker.error is not None or not told.is_set() else 0
    logs.event("ended", status=status)
    runtime.shutdown()
    await asyncio.wait([serving], timeout=_LAST_WORDS)
    await worker.bridge.stop() if worker.error is None else None
    logging.shutdown()
    # The runtime's own threads, and those of a broken device, may wait for ever on their way out.
    os._exit(status)


async def _register(settings: Settings, worker: Worker, model: Any, endpoint: Any) -> None:
    """Tells the frontends of the model."""
    from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model

    known = ModelRuntimeConfig()
    known.context_length, known.max_num_seqs = model.spec.max_length, settings.max_requests
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        str(settings.folder),
        settings.model_name,
        worker_type=WorkerType.Aggregated,
        runtime_config=known,
        custom_template_path=str(PLAIN_TEMPLATE) if worker.reader.plain_chat else None,
        ignore_weights=True,
    )


if __name__ == "__main__":
    # The command line knows this package, not the other way round: it is found by its name.
    sys.exit(importlib.import_module("blockbatch.cli").main(["dynamo", *sys.argv[1:]]))
