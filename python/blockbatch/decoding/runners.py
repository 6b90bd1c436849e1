"""Batches and their graphs, kept for the next decode of the same shape."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from blockbatch.decoding.method import Method
from blockbatch.decoding.sampling import RequestSampling
from blockbatch.decoding.session import Runner, Session, Stops, new_runner


class _Shape(NamedTuple):
    num_requests: int
    method: Method
    gen_length: int
    max_prompt: int
    number: int = 0  # among runners of this shape, which several threads have at the same time


class RunnerPool:
    """The runners of one model. One that a session uses is not in the pool: it comes back when the session is
    gone, however it ended.

    Its methods are called in a turn of the model's device (see `blockbatch.devices`), so by one thread at a
    time. A session may end in any thread, in the middle of such a call, too: its runner waits in front of the
    pool until the next call.
    """

    def __init__(self) -> None:
        self._shelf: dict[_Shape, Runner] = {}  # the one used last stands last
        self._returned: deque[tuple[_Shape, Runner]] = deque()

    @property
    def _idle(self) -> dict[_Shape, Runner]:
        while self._returned:
            shape, runner = self._returned.popleft()
            numbers = {other.number for other in self._shelf if other._replace(number=0) == shape}
            free = next(number for number in range(len(numbers) + 1) if number not in numbers)
            self._shelf[shape._replace(number=free)] = runner
        return self._shelf

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
        regions: Sequence[Sequence[int]] | None = None,
        sampling: Sequence[RequestSampling] | None = None,
    ) -> Session:
        """A session on a runner with room for `max_prompt` tokens, kept from earlier or new."""
        shape = _Shape(len(prompts), method, gen_length, max_prompt)
        found = self._find(shape)
        runner = None if found is None else self._idle.pop(found)
        if runner is None:
            runner = new_runner(model, shape.num_requests, method, gen_length, max_prompt)
        more = dict(observed=observed, stops=stops, regions=regions, sampling=sampling)
        session = Session(model, prompts, method, gen_length, runner=runner, **more)
        weakref.finalize(session, _put_back, weakref.ref(self), shape, runner)
        return session

    def has(self, num_requests: int, method: Method, gen_length: int, max_prompt: int) -> bool:
        """Whether such a runner waits in the pool."""
        return self._find(_Shape(num_requests, method, gen_length, max_prompt)) is not None

    def _find(self, shape: _Shape) -> _Shape | None:
        """The key of the runner of this shape that was used last."""
        matching = [key for key in self._idle if key._replace(number=0) == shape]
        return matching[-1] if matching else None

    def idle_bytes(self) -> int:
        """Device memory of the K/V caches and graphs that wait in the pool."""
        return sum(runner.nbytes for runner in self._idle.values())

    def make_room(self, needed: int, free: int, *, keep: tuple[int, Method, int, int] | None = None) -> None:
        """Drops runners, the one used longest ago first, until `needed` bytes are free.

        Args:
            keep: the arguments of `has` for a runner that is about to be used.
        """
        kept = None if keep is None else self._find(_Shape(*keep))
        for shape in [shape for shape in self._idle if shape != kept]:
            if needed <= free:
                return
            free += self._idle.pop(shape).nbytes


def _put_back(pool: weakref.ref[RunnerPool], shape: _Shape, runner: Runner) -> None:
    alive = pool()
    if alive is not None:
        alive._returned.append((shape, runner))
