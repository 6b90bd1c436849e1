"""Continuous batching: requests join and leave between two forwards, and each decodes as it does alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from blockbatch.config import DecodeConfig
from blockbatch.decoding.admission import Admission, branches_under_load, drafts_under_load, fewer_sizes
from blockbatch.decoding.block_lane import BlockLane
from blockbatch.decoding.choice import eos_token_ids, method_for
from blockbatch.decoding.engine_ranks import check_model, part_of
from blockbatch.decoding.lane import Lane, Seat, rules_of
from blockbatch.decoding.method import Method
from blockbatch.decoding.prompt_checks import check_prompt, check_stop
from blockbatch.decoding.requests import (
    EngineClosedError,
    EngineStats,
    QueueFullError,
    Request,
    RequestTooLargeError,
)
from blockbatch.decoding.results import before_eos, result_of
from blockbatch.decoding.rule import try_rule
from blockbatch.decoding.slot_lane import SlotLane
from blockbatch.models.spec import is_block_causal
from blockbatch.stops import PrefixReader
from blockbatch.values import as_int, as_list

__all__ = [
    "BRANCH_RULES",
    "Engine",
    "EngineClosedError",
    "EngineStats",
    "QueueFullError",
    "Request",
    "RequestTooLargeError",
]

BRANCH_RULES = ("fixed", "load")


def _nothing() -> None:
    pass


class Engine:
    """Decodes requests of one model together; each gives the tokens and forwards that `generate` gives alone.

    That is exact in fp32. In lower precision the matrix library may sum a product of another number of rows
    in another order, and a token near a threshold may differ; see docs/engine.md.

    `submit`, `cancel`, `stats`, `wait_for_work` and `close` may be called by any thread, `step` by one.

    Of a model of several ranks every rank makes an engine, with the same options; rank 0 uses it, the others
    call `follow` alone. See docs/tensor_parallel.md.

    Args:
        model: from `load_model`.
        max_requests: that run at a time.
        max_queue: that wait beside them.
        branches: "fixed": as each request's config says; "load": a new request gets fewer, and no drafts, the
            more run or wait, fixed for its life.
        max_tokens_per_step: tokens that a forward holds beyond which whole rows wait for the next one; None:
            as measured.
        deterministic: whether a request's bits do not depend on what runs beside it, at some cost.
        cache_tokens: positions of the K/V cache; None: what the device has free, at most what `max_requests`
            of the model's longest texts take.
    """

    def __init__(
        self,
        model,
        *,
        max_requests: int = 32,
        max_queue: int = 128,
        branches: str = "fixed",
        max_tokens_per_step: int | None = None,
        deterministic: bool = False,
        cache_tokens: int | None = None,
    ) -> None:
        for name, value, least in (("max_requests", max_requests, 1), ("max_queue", max_queue, 0)):
            _check_int(name, value, least)
        for name, value in (("max_tokens_per_step", max_tokens_per_step), ("cache_tokens", cache_tokens)):
            if value is not None:
                _check_int(name, value, 1)
        if branches not in BRANCH_RULES:
            raise ValueError(f"branches: expected one of {', '.join(BRANCH_RULES)}, got {branches!r}")
        check_model(model)
        self.model, self.branches, self.deterministic = model, branches, deterministic
        lane = BlockLane if is_block_causal(model.spec) else SlotLane
        options = dict(
            max_requests=max_requests,
            max_tokens_per_step=max_tokens_per_step,
            deterministic=deterministic,
            cache_tokens=cache_tokens,
        )
        self._lane: Lane = lane(model, **options)
        self._admission = Admission(max_requests, max_queue, self._lane.num_pages)
        self._changed = threading.Condition()
        self._running: list[Seat] = []
        self._seats: dict[Request, Seat] = {}
        self._cancelled: list[Seat] = []
        self._number = self._commits = 0
        self._ends = dict.fromkeys(("finished", "cancelled", "failed"), 0)
        self._closed = False
        self._part = part_of(model, self._lane, options)
        self._part.when_failed(self._wake)

    def submit(
        self,
        prompt: Sequence[int],
        config: DecodeConfig | None = None,
        *,
        stop: Sequence[str] | str = (),
        on_update: Callable[[Request], None] | None = None,
        branches: int | None = None,
        confidences: bool = False,
    ) -> Request:
        """Hands in a request and returns at once.

        Args:
            prompt: token ids.
            config: how to decode; None: `DecodeConfig()`. It must not ask for a trace.
            stop: texts that end it, beside those of the config.
            on_update: called on the engine's thread after a forward in which `request.final` grew or
                `request.status` changed. Its errors fail the request.
            branches: how many of the config's block sizes to decode with; None: as the engine's rule says.
            confidences: whether `request.confidences` and `result.confidences` are wanted. The config's
                confidence must be "probability".

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
            RequestTooLargeError: it would not fit into an empty cache.
            QueueFullError: too many wait.
            EngineClosedError: the engine is closed.
            RankError: another rank of the model failed.
        """
        self._part.check()
        ids = [as_int(item) for item in as_list(prompt) or ()]
        if as_list(prompt) is None or None in ids:
            raise TypeError(f"prompt: expected token ids, got {prompt!r:.80}")
        config = (DecodeConfig() if config is None else config).for_model(self.model.spec)
        if config.trace:
            raise ValueError("config.trace: expected False, since the engine records no traces, got True")
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        if texts:
            config = replace(config, stop=(*config.stop, *texts))
        check_prompt(self.model, ids, config, "prompt")
        check_stop(self.model, config)
        if confidences and config.confidence != "probability":
            raise ValueError(
                f"confidence: expected 'probability' where confidences are wanted, got {config.confidence!r}"
            )
        with self._changed:
            if self._closed:
                raise EngineClosedError("engine: expected an open one, got one that was closed")
            config, method, number = self._with_branches(config, branches)
            if isinstance(method, Method) and method.rule:  # later its error would be that of all
                try_rule(method.rule, method.params, method.block_sizes, config.gen_length)
            request = Request(self._number + 1, ids, config, number, on_update)
            request.confidences = [] if confidences else None
            self._part.check_request(request)
            seat = Seat(request, method, self._lane.pages_of(method, config, len(ids)))
            if config.stop:
                ends = eos_token_ids(self.model, config)
                seat.reader = PrefixReader(self.model.tokenizer, config.stop, ends)
            self._admission.add(seat)
            self._number += 1
            self._seats[request] = seat
            self._changed.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request before the next forward; its pages are free then. One that has ended stays so."""
        with self._changed:
            seat = self._seats.get(request)
            if seat is not None and seat not in self._cancelled:
                self._cancelled.append(seat)
                self._changed.notify_all()

    def step(self, meanwhile: Callable[[], None] = _nothing) -> bool:
        """One forward: leaves, joins, forward, policy. False when nothing runs or waits.

        Args:
            meanwhile: called once, on a GPU after the forward was launched and before the host waits for it:
                the time for what should not delay the next launch, such as waking other threads.

        Raises:
            whatever broke the forward; all requests that ran have failed with it then, those that wait go on.
        """
        updated: list[Request] = []
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            for seat in cancelled:
                if seat.request in self._seats:
                    self._end(seat, "cancelled")
                    updated.append(seat.request)
            joining = self._admission.admit()
        try:
            # Beside the loop: what joins before an error must fail with it.
            self._running += joining
            self._part.check()
            took_part = self._forward(joining, meanwhile) if self._running else meanwhile() or []
            with self._changed:
                updated += [seat.request for seat in took_part if self._note(seat)]
            if not self._running:
                self._part.rest()
            updated += [seat.request for seat in joining if seat.request not in updated]
        except BaseException as error:
            self._part.fail(error)
            with self._changed:
                updated += [seat.request for seat in self._running]
                for seat in list(self._running):
                    self._end(seat, "failed", error)
            self._tell(updated)
            raise
        self._tell(updated)
        with self._changed:
            return bool(self._seats)

    def follow(self) -> None:
        """Takes part in every step until rank 0 closes its engine; for the other ranks of a model.

        It waits for requests however long, at no cost.

        Raises:
            RankError: another rank ended or failed.
            RuntimeError: on rank 0, or for a model of one process.
        """
        self._part.follow()

    def on_rank_failure(self, call: Callable[[BaseException], None]) -> None:
        """`call` hears of the first failure of another rank at once, on another thread, within a step too."""
        self._part.when_failed(call)

    def run_until_idle(self) -> None:
        """Steps until nothing runs or waits."""
        while self.step():
            pass

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """Waits until something runs, waits or is to be cancelled; False: the time is over (seconds)."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._seats or self._cancelled or self._closed or self._part.failed, timeout
            ) and bool(self._seats)

    def stats(self) -> EngineStats:
        """Figures as of the last step."""
        with self._changed:
            counts = self._lane.counts
            return EngineStats(
                running=self._admission.running,
                waiting=len(self._admission.waiting),
                cache_usage=self._admission.usage,
                forwards=dict(counts.forwards),
                steps=counts.steps,
                tokens=counts.tokens,
                refreshes=counts.refreshes,
                commits=self._commits,
                shared_pages=counts.shared_pages,
                **self._ends,
            )

    def close(self, error: BaseException | None = None) -> None:
        """Ends all requests as failed and takes no more; not while another thread is in `step`.

        Args:
            error: what they fail with.
        """
        broken = error is not None
        if not broken:
            error = EngineClosedError("engine: expected to run until its requests end, it was closed")
        with self._changed:
            self._closed = True
            seats = list(self._seats.values())
            for seat in seats:
                self._end(seat, "failed", error)
            self._changed.notify_all()
        self._part.close(error if broken else None)
        self._tell([seat.request for seat in seats])

    def _wake(self, error: BaseException) -> None:
        with self._changed:
            self._changed.notify_all()

    def _forward(self, joining: list[Seat], meanwhile: Callable[[], None]) -> list[Seat]:
        with self._part.step(joining, meanwhile) as meanwhile:
            for seat in joining:
                seat.request.status, seat.request.started = "running", time.monotonic()
                self._lane.join(seat)
            return self._lane.step(meanwhile)

    def _with_branches(self, config: DecodeConfig, asked: int | None):
        """The config with as many branches as a request gets, its method, and their number."""
        method = method_for(self.model, config)
        drafts, load = rules_of(method).drafts, len(self._seats) + 1
        sizes = method.block_sizes[: len(method.block_sizes) - len(drafts)]
        most = max(len(sizes), 1)
        if asked is not None:
            count = as_int(asked)
            if count is None or not 1 <= count <= most:
                raise ValueError(f"branches: expected a number from 1 to {most}, got {asked!r}")
        elif self.branches == "load":
            count = branches_under_load(sizes or (1,), load)
            if drafts and not drafts_under_load(sizes[0], drafts, load):
                config = replace(config, drafts=None)
                method = method_for(self.model, config)
        else:
            count = most
        if count < most:
            config = replace(config, block_sizes=fewer_sizes(sizes, count))
            method = method_for(self.model, config)
        return config, method, count

    def _note(self, seat: Seat) -> bool:
        """Takes over what a forward gave; returns whether that is news for the caller."""
        request = seat.request
        request.nfe = seat.nfe
        if request.confidences is not None:  # before the tokens: other threads read both
            request.confidences += seat.confidences[len(request.confidences) :]
        grown = self._grow(seat, seat.prefix)
        if seat.error is not None:
            self._end(seat, "failed", seat.error)
        elif seat.done or (seat.reader is not None and seat.reader.found):
            self._finish(seat)
        return grown or request.ended

    def _grow(self, seat: Seat, prefix: list[int]) -> bool:
        request = seat.request
        if len(prefix) == seat.seen:
            return False
        seat.seen = len(prefix)
        if seat.reader is not None and not seat.done and len(prefix) > len(request.final):
            seat.reader.push(prefix)
        final = before_eos(prefix, rules_of(seat.method).eos_token_ids)
        if len(final) <= len(request.final):
            return False
        request.final += final[len(request.final) :]
        if request.first is None:
            request.first = time.monotonic()
        return True

    def _finish(self, seat: Seat) -> None:
        request = seat.request
        outcome = self._lane.end(seat)
        ends = rules_of(seat.method).eos_token_ids
        stop = request.config.stop or None
        seconds = time.monotonic() - request.started
        request.result = result_of(self.model, outcome, ends, stop, seconds)
        request.nfe = outcome.nfe
        if request.confidences is not None:
            rest = self._lane.confidences(seat, outcome.winner)[len(request.confidences) :]
            request.confidences += rest
            own = request.confidences[: len(request.result.tokens)]
            request.result = replace(request.result, confidences=own)
        self._commits += sum(branch.committed for branch in outcome.branches)
        canvas = outcome.canvas
        mask = self.model.spec.mask_token_id
        known = canvas[: canvas.index(mask)] if mask in canvas else canvas
        if seat.done and len(before_eos(known, ends)) > len(request.final):
            request.final += before_eos(known, ends)[len(request.final) :]
            request.first = request.first or time.monotonic()
        self._end(seat, "finished")

    def _end(self, seat: Seat, status: str, error: BaseException | None = None) -> None:
        request = seat.request
        if self._seats.pop(request, None) is None:
            return
        if seat in self._running:
            self._running.remove(seat)
            self._lane.leave(seat)
            self._part.left(request)
            ran = time.monotonic() - request.started if status == "finished" else None
            self._admission.release(seat, ran)
        else:
            self._admission.remove(seat)
        request.status, request.error, request.finished = status, error, time.monotonic()
        self._ends[status] += 1

    def _tell(self, requests: list[Request]) -> None:
        for request in requests:
            if request.on_update is None:
                continue
            try:
                request.on_update(request)
            except Exception as error:
                with self._changed:
                    seat = self._seats.get(request)
                    if seat is not None:
                        self._end(seat, "failed", error)


def _check_int(name: str, value: object, least: int) -> None:
    number = as_int(value)
    if number is None or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
