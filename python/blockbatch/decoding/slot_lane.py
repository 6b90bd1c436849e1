"""Requests of a model with full attention in the engine."""

from __future__ import annotations

from blockbatch import kv_cache
from blockbatch.branches import RequestOutcome
from blockbatch.config import DecodeConfig
from blockbatch.decoding.lane import Counts, Seat
from blockbatch.decoding.method import Method
from blockbatch.decoding.non_finite import NonFiniteLogitsError
from blockbatch.decoding.session import Session


class SlotLane:
    """See `lane.Lane`."""

    def __init__(
        self,
        model,
        *,
        max_requests: int,
        max_tokens_per_step: int | None,
        deterministic: bool,
        cache_tokens: int | None,
    ) -> None:
        self._model = model
        tokens = cache_tokens or 6 * max_requests * model.spec.max_length
        self.num_pages = kv_cache.pages_per_row(tokens)
        self.counts = Counts(dict.fromkeys(("init", "block", "refresh"), 0))
        self._seats: list[Seat] = []

    def pages_of(self, method: Method, config: DecodeConfig, prompt: int) -> int:
        return len(method.block_sizes) * kv_cache.pages_per_row(prompt + config.gen_length)

    def join(self, seat: Seat) -> None:
        seat.place = Session(self._model, [seat.request.prompt], seat.method, seat.config.gen_length)
        self._seats.append(seat)

    def step(self) -> list[Seat]:
        for seat in self._seats:
            try:
                step = seat.place.step()
            except NonFiniteLogitsError as error:
                seat.error = error.with_traceback(None)
                continue
            self.counts.forwards[step.phase] += 1
            self.counts.steps += 1
            self.counts.tokens += step.plan.query_tokens
            seat.prefix = seat.place.final_prefixes()[0]
            seat.nfe = seat.place.outcome(0).nfe
            seat.done = bool(seat.place.state.finished[0])
        return list(self._seats)

    def end(self, seat: Seat) -> RequestOutcome:
        seat.place._end([0])
        return seat.place.outcome(0)

    def leave(self, seat: Seat) -> None:
        if seat in self._seats:
            self._seats.remove(seat)
