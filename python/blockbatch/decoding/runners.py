"""Batches and their graphs, kept for the next decode of the same shape."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from blockbatch.decoding.method import Method
from blockbatch.decoding.session import Runner, Session, Stops, new_runner


class _Shape(NamedTuple):
    num_requests: int
    method: Method
    gen_length: int
    max_prompt: int


class RunnerPool:
    """The runners of one model. One that a session uses is not in the pool: it comes back when the session is
    gone, however it ended."""

    def __init__(self) -> None:
        self._idle: dict[_Shape, Runner] = {}  # the one used last stands last

    def open_session(
        self,
        model,
        prompts: list[list[int]],
        method: Method,
        gen_length: int,
        max_prompt: int,
        *,
        observed: bool = False,
        stops: Stops | None = None,
    ) -> Session:
        """A session on a runner with room for `max_prompt` tokens, kept from earlier or new."""
        shape = _Shape(len(prompts), method, gen_length, max_prompt)
        runner = self._idle.pop(shape, None)
        if runner is None:
            runner = new_runner(model, shape.num_requests, method, gen_length, max_prompt)
        session = Session(model, prompts, method, gen_length, runner=runner, observed=observed, stops=stops)
        weakref.finalize(session, _put_back, weakref.ref(self), shape, runner)
        return session

    def has(self, num_requests: int, method: Method, gen_length: int, max_prompt: int) -> bool:
        """Whether such a runner waits in the pool."""
        return _Shape(num_requests, method, gen_length, max_prompt) in self._idle

    def idle_bytes(self) -> int:
        """Device memory of the K/V caches that wait in the pool."""
        return sum(runner.batch.cache.kv.nbytes for runner in self._idle.values())

    def make_room(self, needed: int, free: int) -> None:
        """Drops runners, the one used longest ago first, until `needed` bytes are free."""
        for shape in list(self._idle):
            if needed <= free:
                return
            free += self._idle.pop(shape).batch.cache.kv.nbytes


def _put_back(pool: weakref.ref[RunnerPool], shape: _Shape, runner: Runner) -> None:
    alive = pool()
    if alive is not None:
        alive._idle[shape] = runner
