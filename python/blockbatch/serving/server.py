"""The process: sockets, signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from blockbatch.serving import logs
from blockbatch.serving.app import create_app
from blockbatch.serving.errors import unavailable
from blockbatch.serving.service import Service, Settings

ENGINE_FAILED = 1
_BACKLOG = 2048
# Until the engine's thread, back from the device, takes its turn from the loop's thread.
_SWITCH_SECONDS = 1e-4
# Seconds for the answers that say so, after the engine has failed.
_LAST_WORDS = 5.0
# Seconds for the answers to those who are cut off.
_LAST_ANSWERS = 0.5
# Seconds between two looks whether the last request has ended.
_LOOK = 0.02
# Seconds that connections get to close once nobody is answered any more.
_CLOSING = 2


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    settings: Settings,
    load: Callable[[], tuple[Any, Any]],
    *,
    host: str,
    port: int,
    version: str,
    log_level: str = "info",
) -> int:
    """Serves until a signal ends it or the engine fails.

    The first SIGTERM or SIGINT drains: no more requests are taken, those that are there get
    `settings.drain_seconds`. The second one ends at once.

    Args:
        load: gives the model and its engine.
        port: 0: any that is free; the log says which.

    Returns:
        the exit status: 0 after a signal, ENGINE_FAILED after a failure of the engine.

    Raises:
        whatever `load` raises: the process has no reason to stay.
    """
    logs.set_up(log_level)
    sys.setswitchinterval(_SWITCH_SECONDS)
    return _loop_factory()(_serve(settings, load, host, port, version, log_level))


def _loop_factory() -> Callable[[Any], int]:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return asyncio.run
    return uvloop.run


async def _serve(settings: Settings, load: Any, host: str, port: int, version: str, log_level: str) -> int:
    listener = _listen(host, port)
    logs.event("listening", host=host, port=listener.getsockname()[1], pid=os.getpid())
    service = Service(settings, load)
    config = uvicorn.Config(
        create_app(service, version),
        log_config=None,
        log_level=log_level,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=_CLOSING,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def told_to_end(number: int) -> None:
        again = service.status == "draining"
        logs.event("signal", signal=signal.Signals(number).name, at_once=again)
        service.drain()
        if again:
            server.should_exit = server.force_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_end, number)
    ending = asyncio.ensure_future(_end(service, server))
    await server.serve(sockets=[listener])
    ending.cancel()
    return _status(service)


def _listen(host: str, port: int) -> socket.socket:
    """A socket on which the server will listen.

    Raises:
        OSError: the address is not to be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"--host, --port: expected an address to listen on, got {host}:{port} ({reason})"
        ) from None


async def _end(service: Service, server: uvicorn.Server) -> None:
    """Waits for the end of the service, and for its last answers; then lets the server end."""
    await service.ended.wait()
    if service.status == "failed" and service.bridge is None:
        server.should_exit = True
        return
    seconds = service.settings.drain_seconds if service.status == "draining" else _LAST_WORDS
    begun = time.monotonic()
    while service.in_flight and time.monotonic() - begun < seconds and not server.should_exit:
        await asyncio.sleep(_LOOK)
        if service.status == "failed":
            seconds = min(seconds, _LAST_WORDS)
    if service.in_flight:
        logs.event("cut_off", level=logging.WARNING, requests=service.in_flight)
        service.bridge.turn_away(unavailable("server: it ended before the request did"))
        await asyncio.sleep(_LAST_ANSWERS)
    server.should_exit = True


def _status(service: Service) -> int:
    if service.status != "failed":
        logs.event("ended")
        return 0
    if service.bridge is None:
        raise service.error
    logs.event("ended", error=None, status=ENGINE_FAILED)
    # Threads and libraries of a broken device may wait for ever on their way out.
    logging.shutdown()
    os._exit(ENGINE_FAILED)
