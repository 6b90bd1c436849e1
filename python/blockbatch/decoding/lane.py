"""What the engine asks of what runs its requests: `slot_lane.py`, or `block_lane.py` if block-causal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from blockbatch.branches import NFE, BlockNFE, RequestOutcome
from blockbatch.config import DecodeConfig
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.method import Method
from blockbatch.decoding.requests import Request
from blockbatch.stops import PrefixReader
from blockbatch_kernels import PolicyParams


def rules_of(method: Method | BlockMethod) -> PolicyParams | BlockMethod:
    """What holds the settings that both kinds of methods have: `drafts`, `eos_token_ids`."""
    return method.params if isinstance(method, Method) else method


@dataclass(eq=False)
class Seat:
    """A request on its way through the engine.

    Attributes:
        method: what it runs.
        pages: that it may come to need, reserved while it runs.
        reader: looks for its stop texts; None: it has none.
        prefix: all of its ids that are final, an EOS and what stands behind it among them.
        confidences: of these, where the request asks for them.
        seen: of the prefix, ids that the engine has passed on.
        nfe: forwards so far.
        done: the rules ended it.
        error: what ended it instead.
        place: what the lane knows it by.
    """

    request: Request
    method: Method | BlockMethod
    pages: int
    reader: PrefixReader | None = None
    prefix: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    seen: int = 0
    nfe: NFE | BlockNFE = NFE(0, 0, 0)
    done: bool = False
    error: BaseException | None = None
    place: Any = None

    @property
    def config(self) -> DecodeConfig:
        return self.request.config

    @property
    def wants_confidences(self) -> bool:
        return self.request.confidences is not None


@dataclass
class Counts:
    """What a lane did so far; see `EngineStats`."""

    forwards: dict[str, int]
    steps: int = 0
    tokens: int = 0
    refreshes: int = 0
    shared_pages: int = 0


class Lane(Protocol):
    """Runs the requests of one model. All calls but `pages_of` come from one thread, the engine's.

    Attributes:
        num_pages: of the cache.
        counts: see `Counts`.
    """

    num_pages: int
    counts: Counts

    def pages_of(self, method: Method | BlockMethod, config: DecodeConfig, prompt: int) -> int:
        """Pages that a request behind a prompt of so many tokens may come to hold."""

    def join(self, seat: Seat) -> None:
        """Makes a request ready for its first forward."""

    def step(self, meanwhile: Callable[[], None]) -> list[Seat]:
        """One forward; gives the seats that took part, with `prefix`, `nfe`, `done` and `error` as of now.

        Args:
            meanwhile: called once, while the device computes where the lane can.
        """

    def end(self, seat: Seat) -> RequestOutcome:
        """How a request ended by the rules, or as it stands."""

    def confidences(self, seat: Seat, branch: int) -> list[float]:
        """What a branch was sure of at its commits, for a request that asked; waits for the device."""

    def leave(self, seat: Seat) -> None:
        """Frees all that a request holds."""

    def states(self) -> list[Any]:
        """The records that all ranks of a model must have alike, where several can hold it."""
