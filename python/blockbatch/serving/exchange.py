"""The decodes of one HTTP request, from the engine's queue to the last text."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from blockbatch.decoding.choice import eos_token_ids
from blockbatch.decoding.non_finite import NonFiniteLogitsError
from blockbatch.serving.answers import Answer, Ended, Usage, phases
from blockbatch.serving.bridge import Bridge
from blockbatch.serving.errors import ApiError, engine_failed, timed_out
from blockbatch.serving.logprobs import TokenLogprob, TokenLogprobs
from blockbatch.serving.reading import Job

# Seconds that a reader has for what comes when the time of a request is over.
_LAST_WORDS = 0.5


class Host(Protocol):
    """What an exchange needs of the server."""

    model: Any
    bridge: Bridge

    def record(self, exchange: Exchange) -> None:
        """Takes note of one that has ended."""


class Piece(NamedTuple):
    """What is new of one text: the text, and its tokens where their log-probabilities were asked for."""

    index: int
    text: str
    tokens: list[TokenLogprob] | None


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Exchange:
    """Submits jobs and follows them; `close`, which must be called, cancels what still runs.

    Args:
        host: the server, with an engine.
        jobs: one for each choice of the answer.
        receive: ASGI's, of a request whose body was read: the next message says that the client is gone.
        request_id: what the log calls it.
        timeout: seconds that it may take; None: as many as it wants.

    Attributes:
        texts: an `Answer` for each job.
        logprobs: what is told of its tokens; None where nobody asked.
        first: seconds until the first text; None before it.
        outcome: "stop", "length", "abort" or "error", once it has ended.
        streaming: whether a response has taken over to close it.
    """

    def __init__(
        self, host: Host, jobs: Sequence[Job], receive: Any, request_id: str, timeout: float | None
    ) -> None:
        self._host, self._jobs, self._bridge, self._timeout = host, list(jobs), host.bridge, timeout
        self.request_id, self._event = request_id, asyncio.Event()
        self._started = time.monotonic()
        self._gone = self._late = False
        self._sender: asyncio.Task | None = None
        over = asyncio.get_running_loop().call_later
        self._timer = None if timeout is None else over(timeout, self._time_is_over)
        model = host.model
        self.texts = [
            Answer(model.tokenizer, job.limit, job.stop, eos_token_ids(model, job.config)) for job in jobs
        ]
        self.logprobs = [TokenLogprobs(model.tokenizer) if job.logprobs else None for job in jobs]
        self.first: float | None = None
        self.outcome, self.streaming = "error", False
        self._requests: list[Any] = []
        self._begun = self._closed = False
        self._watch = asyncio.ensure_future(self._wait_for_disconnect(receive))

    def begin(self) -> None:
        """Hands all jobs to the engine; raises what `Bridge.submit` raises."""
        for job in self._jobs:
            self._requests.append(self._bridge.submit(job, self._event))
        self._begun = True

    def close(self) -> None:
        """Cancels what still runs, and tells metrics and log how it went."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._watch.cancel()
        self._bridge.leave(self._event, self._requests)
        if self._begun:  # not one that was turned away
            self._host.record(self)

    @property
    def done(self) -> bool:
        return all(text.finish_reason is not None for text in self.texts)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    async def wait(self) -> list[Piece]:
        """Waits until something changed. Returns the new texts.

        Raises:
            ApiError: 500 when the engine or a request failed, 504 when the time is over.
            ClientGone: the client has closed the connection.
        """
        await self._event.wait()
        self._event.clear()
        if self._gone:
            self.outcome = "abort"
            raise ClientGone
        if self._bridge.refusal is not None:
            raise self._bridge.refusal
        if self._late:
            raise timed_out(self._timeout)
        pieces = []
        for index, (request, text) in enumerate(zip(self._requests, self.texts, strict=True)):
            if text.finish_reason is not None:
                continue
            piece = self._read(request, text)
            tokens = self._tokens(index, request, text)
            if piece or tokens:
                pieces.append(Piece(index, piece, tokens))
        if self.first is None and any(piece.text for piece in pieces):
            self.first = self.seconds
        if self.done:
            self.outcome = self.texts[0].finish_reason
        return pieces

    async def finish(self) -> None:
        """Waits until all texts are whole; raises what `wait` raises."""
        while not self.done:
            await self.wait()

    async def sent(self, sending: Any) -> None:
        """Waits until something is sent; a reader who takes none of it in the request's time has gone.

        Raises:
            ClientGone.
        """
        # A timer for each wait would cost more than most of them take.
        self._sender = None if self._late else asyncio.current_task()
        try:
            await (asyncio.wait_for(sending, _LAST_WORDS) if self._late else sending)
        except (asyncio.TimeoutError, OSError):
            self.outcome = "abort"
            raise ClientGone from None
        except asyncio.CancelledError:
            self.outcome = "abort"
            if self._sender is not None and self._late:
                getattr(self._sender, "uncancel", int)()  # since Python 3.11
                raise ClientGone from None
            raise
        finally:
            self._sender = None

    def _time_is_over(self) -> None:
        self._late = True
        self._event.set()
        if self._sender is not None:
            self._sender.cancel()

    def usage(self) -> Usage:
        """Of all jobs, as far as they came."""
        usage = Usage()
        for job, request, text in zip(self._jobs, self._requests, self.texts):  # not all may have been taken
            usage.add(len(job.prompt), len(text.tokens), phases(request.nfe), request.branches)
            usage.adopted += 0 if request.result is None else request.result.adopted
        return usage

    def ended(self) -> Ended:
        """How it ended."""
        times = [(request.submitted, request.started) for request in self._requests]
        queued = [started - submitted for submitted, started in times if started is not None]
        return Ended(self.request_id, self.outcome, self.usage(), self.seconds, self.first, queued)

    def prompts(self) -> list[str]:
        """The prompts as text, special tokens written out."""
        tokenizer = self._host.model.tokenizer
        return [tokenizer.decode(job.prompt, skip_special=False) for job in self._jobs]

    def _read(self, request: Any, text: Answer) -> str:
        if not request.ended:
            piece = text.push(list(request.final))
            if text.finish_reason is not None:
                self._bridge.engine.cancel(request)  # it would write what nobody reads
            return piece
        if request.status == "finished":
            return text.finish(request.result.canvas)
        if isinstance(request.error, NonFiniteLogitsError):
            raise ApiError(500, str(request.error), code="non_finite_logits")
        if isinstance(request.error, MemoryError):
            raise ApiError(500, str(request.error), code="out_of_memory")
        raise engine_failed()

    def _tokens(self, index: int, request: Any, text: Answer) -> list[TokenLogprob] | None:
        """The tokens whose text is told now."""
        told = self.logprobs[index]
        if told is None:
            return None
        if text.finish_reason is not None:
            return told.push(text.tokens, request.confidences, None)
        final = request.final[: self._jobs[index].limit]
        return told.push(final, request.confidences, len(text.text))

    async def _wait_for_disconnect(self, receive: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            self._gone = True
            self._event.set()
