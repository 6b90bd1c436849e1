"""The engine on a thread of its own, and asyncio on the other side.

The engine's thread runs one forward after the other. It tells a request's owner by an event of asyncio that
there is something new; what is new the owner reads from the request, so that a slow reader costs nothing but
that it reads more at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from blockbatch.decoding.engine import EngineClosedError, QueueFullError, RequestTooLargeError
from blockbatch.parallel import RankError
from blockbatch.serving.errors import ApiError, engine_failed, unavailable
from blockbatch.serving.reading import Job, named

# Seconds that the thread sleeps at most while nothing runs; work wakes it at once.
_IDLE = 0.1


class Bridge:
    """Runs an engine until `stop`, or until a forward raises anything but MemoryError.

    Once another rank of the model fails all who wait are answered, though a forward may never end then.

    Args:
        engine: of `blockbatch.decoding.engine`; nobody else calls its `step`.
        on_failure: called on the loop, once, with what a forward raised.

    Attributes:
        error: what ended the engine; None while it runs.
        refusal: what everybody hears who waits or comes; None: nobody hears anything.
    """

    def __init__(self, engine: Any, on_failure: Callable[[BaseException], None]) -> None:
        self.engine, self.error = engine, None
        self.refusal: ApiError | None = None
        self._on_failure, self._failed = on_failure, False
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._events: set[asyncio.Event] = set()
        # Of the last step: all owners are told by one call, since each costs the engine's thread time, and
        # while the device computes the next one, since their work would delay its launch.
        self._changed: list[asyncio.Event] = []
        engine.on_rank_failure(lambda error: self._call(self._turn_to_failure, error))
        self._thread = threading.Thread(target=self._run, name="blockbatch-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, event: asyncio.Event) -> Any:
        """The engine's request for a job; `event` is set whenever it changed, until `leave`.

        Raises:
            ApiError: 400 for bad input, 413 for what can never fit, 503 with Retry-After for a full queue,
                500 after the engine has ended.
        """
        if self.refusal is not None:
            raise self.refusal
        self._events.add(event)
        try:
            return self.engine.submit(
                job.prompt,
                job.config,
                stop=job.stop,
                branches=job.branches,
                **({"confidences": True} if job.logprobs else {}),
                on_update=lambda request: self._changed.append(event),
            )
        except QueueFullError as error:
            raise unavailable(str(error), error.retry_after) from None
        except RequestTooLargeError as error:
            raise ApiError(413, str(error), code="request_too_large") from None
        except (EngineClosedError, RankError):
            raise engine_failed() from None
        except (ValueError, TypeError) as error:
            raise named(error) from None

    def leave(self, event: asyncio.Event, requests: list[Any]) -> None:
        """Nobody waits for these requests any more; those that have not ended are cancelled."""
        self._events.discard(event)
        if self.error is not None:
            return
        for request in requests:
            if not request.ended:
                self.engine.cancel(request)

    async def stop(self) -> None:
        """Ends the thread after the forward that it is in, and the engine with it."""
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, 10)
        if self.error is None:
            self.engine.close()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if not self._step():
                    self.engine.wait_for_work(_IDLE)
        except BaseException as error:
            self.error = error
            self._call(self._fail)
        finally:
            self._tell()

    def _step(self) -> bool:
        going = False
        try:
            going = self.engine.step(self._tell)
            return going
        except MemoryError:  # its requests have failed with it; the device is whole
            return True
        finally:
            if not going:
                self._tell()

    def _tell(self) -> None:
        if self._changed:
            changed, self._changed = self._changed, []
            self._call(_set_all, changed)

    def turn_away(self, refusal: ApiError) -> None:
        """Ends the waiting of all with this error, and that of those who come."""
        self.refusal = refusal
        _set_all(list(self._events))

    def _turn_to_failure(self, error: BaseException) -> None:
        """Answers all who wait, once; the engine's thread may still be in a forward that never ends."""
        if not self._failed:
            self._failed = True
            self.turn_away(engine_failed())
            self._on_failure(error)

    def _fail(self) -> None:
        self._turn_to_failure(self.error)
        # Behind the answers: a broken device may let this wait.
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        self.engine.close(self.error)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, and nobody listens
            self._stopping.set()


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
