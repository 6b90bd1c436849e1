"""What callers of the engine hold: requests, figures of the engine, and why a request is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from blockbatch.branches import NFE, BlockNFE
from blockbatch.config import DecodeConfig
from blockbatch.result import Result

STATUSES = ("queued", "running", "finished", "cancelled", "failed")


class QueueFullError(RuntimeError):
    """As many requests wait as may.

    Attributes:
        retry_after: seconds after which a place is likely to be free.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(waiting, retry_after)
        self.waiting, self.retry_after = waiting, retry_after

    def __str__(self) -> str:
        return (
            f"queue: expected fewer than {self.waiting} requests waiting, got {self.waiting}; try again in "
            f"about {self.retry_after:.0f} s"
        )


class RequestTooLargeError(ValueError):
    """A request needs more of the cache than there is, however few others run."""


class EngineClosedError(RuntimeError):
    """The engine was closed before a request ended, or before it was submitted."""


@dataclass(eq=False)
class Request:
    """One request to an engine, which writes it; callers read. Times are those of `time.monotonic`.

    Attributes:
        id: number of the request, from 1.
        prompt: token ids.
        config: as it is decoded, with the branches that it got.
        status: one of STATUSES.
        final: ids of the text that can no longer change, before the first EOS; only ever grows. A stop text
            may end `result.tokens` earlier.
        confidences: of `final`, and of what may stand behind it: how sure the model was of each token in the
            forward that committed it, in the first branch while all agree, then in the winner. None: nobody
            asked for them.
        result: once it is finished; `result.seconds` counts from `started`.
        error: why it failed.
        branches: number of branches that it decodes with; fixed for its life.
        nfe: forwards so far, by phase.
        submitted, started, first, finished: when it was handed in, began to run, had its first final token,
            and ended in whatever way; None: not yet.
    """

    id: int
    prompt: list[int]
    config: DecodeConfig
    branches: int
    on_update: Callable[[Request], None] | None = None
    status: str = "queued"
    final: list[int] = field(default_factory=list)
    result: Result | None = None
    error: BaseException | None = None
    nfe: NFE | BlockNFE = NFE(0, 0, 0)
    confidences: list[float] | None = None
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first: float | None = None
    finished: float | None = None

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "running")


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine, since it was made where they are counts.

    Attributes:
        running, waiting: requests.
        cache_usage: share of the cache's pages that running requests have reserved, 0 to 1.
        forwards: by phase; a forward that holds several phases counts for each.
        steps: packed forwards.
        tokens: packed tokens that were computed, without padding.
        refreshes: rows that a refresh computed, each distinct row once.
        commits: tokens that branches of ended requests committed.
        shared_pages: pages that the running rows save by sharing, now.
        finished, cancelled, failed: requests that ended so.
    """

    running: int
    waiting: int
    cache_usage: float
    forwards: dict[str, int]
    steps: int
    tokens: int
    refreshes: int
    commits: int
    shared_pages: int
    finished: int
    cancelled: int
    failed: int
