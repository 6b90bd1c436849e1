"""An engine on a model of several ranks: rank 0 decides, the others follow.

What depends on clocks, sockets and callers is decided on rank 0 alone: which requests join, in which order,
and which leave. Before every forward it tells the others. All else follows from numbers that every rank has
alike, so each runs the same lane on the same requests.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import NamedTuple

from blockbatch.config import DecodeConfig
from blockbatch.decoding.choice import method_for
from blockbatch.decoding.lane import Lane, Seat
from blockbatch.decoding.requests import Request
from blockbatch.parallel import Plans, RankError, share_of
from blockbatch.registry import registered_methods


class Join(NamedTuple):
    """A request as the other ranks come to know it."""

    number: int
    prompt: list[int]
    config: DecodeConfig
    branches: int
    confidences: bool


class Plan(NamedTuple):
    """What happens on every rank, in this order.

    Attributes:
        leaves: numbers of the requests that leave, in the order in which they left on rank 0.
        joins: requests that join.
        runs: whether a forward follows; else nothing runs any more and the ranks compare their states.
    """

    leaves: list[int]
    joins: list[Join]
    runs: bool


_GO_ON, _END = pickle.dumps(Plan([], [], True)), b""


class Alone:
    """Of a model that one process holds: there is nobody to tell anything.

    Attributes:
        failed: whether another rank has failed.
    """

    failed = False

    def check(self) -> None:
        """Raises RankError if a rank failed, RuntimeError where another rank decides."""

    def check_request(self, request: Request) -> None:
        """Raises TypeError for a request that the other ranks cannot be told of."""

    def when_failed(self, call: Callable[[BaseException], None]) -> None:
        """`call` hears, on a thread of its own, of the first failure of another rank."""

    def left(self, request: Request) -> None:
        """A request that ran has left."""

    def step(
        self, joining: Sequence[Seat], meanwhile: Callable[[], None]
    ) -> AbstractContextManager[Callable[[], None]]:
        """Around the joins and the forward of a step; gives what the lane is to call meanwhile."""
        return nullcontext(meanwhile)

    def rest(self) -> None:
        """Behind the last forward for a while."""

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on."""

    def close(self, error: BaseException | None) -> None:
        """The end of the engine; `error`: what broke it."""

    def follow(self) -> None:
        raise RuntimeError("engine: expected a model of several ranks to follow the first, got one alone")


class _Rank(Alone):
    def __init__(self, model, lane: Lane, plans: Plans) -> None:
        self._model, self._lane, self._plans = model, lane, plans
        self.failed = False
        plans.when_failed(self._note_failure)

    def _note_failure(self, error: BaseException) -> None:
        self.failed = True

    def when_failed(self, call: Callable[[BaseException], None]) -> None:
        self._plans.when_failed(call)


class Leader(_Rank):
    """Rank 0."""

    def __init__(self, model, lane: Lane, plans: Plans) -> None:
        super().__init__(model, lane, plans)
        self._left: list[int] = []

    def check(self) -> None:
        self._plans.check()

    def check_request(self, request: Request) -> None:
        try:
            pickle.dumps(_join_of(request))
        except Exception as error:
            raise TypeError(
                f"config: expected settings that the other ranks can be told, got some that cannot be "
                f"pickled ({error})"
            ) from error

    def left(self, request: Request) -> None:
        self._left.append(request.id)

    @contextmanager
    def step(self, joining: Sequence[Seat], meanwhile: Callable[[], None]) -> Iterator[Callable[[], None]]:
        def sample() -> None:
            self._plans.sample(self._lane.states())
            meanwhile()

        joins = [_join_of(seat.request) for seat in joining]
        self._tell(joins, runs=True)
        with self._plans.forward():
            yield sample
        self._plans.compare()

    def rest(self) -> None:
        if self._plans.settled:
            return
        self._tell([], runs=False)
        self._plans.settle(self._lane.states())

    def fail(self, error: BaseException) -> None:
        self._plans.fail(error)

    def close(self, error: BaseException | None) -> None:
        if error is not None:
            self.fail(error)
        else:
            with suppress(RankError):
                self._plans.tell(_END)
                self._plans.wait_for_others()
        self._plans.close()

    def follow(self) -> None:
        raise RuntimeError("engine: expected another rank than the first to follow it, got rank 0")

    def _tell(self, joins: list[Join], *, runs: bool) -> None:
        left, self._left = self._left, []
        self._plans.tell(pickle.dumps(Plan(left, joins, runs)) if left or joins or not runs else _GO_ON)


class Follower(_Rank):
    """Any other rank."""

    def check(self) -> None:
        raise RuntimeError(
            f"engine: expected to be used on rank 0, which decides for all, this is rank {self._plans.rank}: "
            "there follow() is to be called"
        )

    def close(self, error: BaseException | None) -> None:
        self._plans.close()

    def follow(self) -> None:
        """See `Engine.follow`."""
        seats: dict[int, Seat] = {}
        try:
            while (told := self._plans.hear()) != _END:
                self._do(pickle.loads(told), seats)
            for seat in seats.values():
                self._lane.leave(seat)
        except BaseException as error:
            self._plans.fail(error)
            raise
        finally:
            self._plans.close()

    def _do(self, plan: Plan, seats: dict[int, Seat]) -> None:
        for number in plan.leaves:
            self._lane.leave(seats.pop(number))
        if not plan.runs:
            self._plans.settle(self._lane.states())
            return
        with self._plans.forward():
            for join in plan.joins:
                seats[join.number] = seat = self._seat(join)
                self._lane.join(seat)
            self._lane.step(lambda: self._plans.sample(self._lane.states()))
        self._plans.compare()

    def _seat(self, join: Join) -> Seat:
        request = Request(join.number, join.prompt, join.config, join.branches)
        request.confidences = [] if join.confidences else None
        method = method_for(self._model, join.config)
        return Seat(request, method, self._lane.pages_of(method, join.config, len(join.prompt)))


def _join_of(request: Request) -> Join:
    return Join(request.id, request.prompt, request.config, request.branches, request.confidences is not None)


def check_model(model) -> None:
    """Raises ValueError for a model whose ranks an engine cannot use."""
    if share_of(model).whole is not None:
        raise ValueError(
            "model: expected one that was loaded without whole_rows, since an engine deals no rows out, got "
            "one with"
        )


def part_of(model, lane: Lane, options: dict) -> Alone:
    """What this process is to an engine; all ranks of the model make it at one time.

    Args:
        lane: of the engine.
        options: of the engine, which must be the same everywhere.
    """
    plans = share_of(model).engine(repr((options, lane.num_pages, sorted(registered_methods()))))
    if plans is None:
        return Alone()
    return (Leader if plans.rank == 0 else Follower)(model, lane, plans)
