"""Who may begin: pages and places for requests in the order in which they came, and branches for each.

A request begins once the pages that it may come to need are free at worst. So no running request ever waits
for a page or gives its own back, which would decode it anew and could answer differently.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from blockbatch.decoding.lane import Seat
from blockbatch.decoding.requests import QueueFullError, RequestTooLargeError

# While the first in the queue waits for pages, so many behind it that need fewer may begin before it.
MOST_OVERTAKEN = 32
# Packed tokens of windows that a step computes in about the time that it takes to read the weights: on an
# H100 or H200 what 200 to 300 tokens take at full speed, in 16 bits and whatever the size of the model.
LOAD_TOKENS = 256
# A single branch has the block size nearest to this one, which the baselines have.
_USUAL_SIZE = 32
# Seconds that a request is guessed to take before any has ended.
_FIRST_GUESS = 2.0


class Admission:
    """The queue, and what running requests have reserved. Its caller holds a lock.

    Args:
        max_requests: that run at a time.
        max_queue: that wait at most.
        num_pages: of the cache.

    Attributes:
        waiting: seats in the order in which they came.
        reserved: pages of running requests.
        running: number of them.
    """

    def __init__(self, max_requests: int, max_queue: int, num_pages: int) -> None:
        self.max_requests, self.max_queue, self.num_pages = max_requests, max_queue, num_pages
        self.waiting: deque[Seat] = deque()
        self.reserved = self.running = 0
        self._overtaken = 0  # how often the first in the queue was
        self._seconds: float | None = None  # that a request runs, in the mean

    def add(self, seat: Seat) -> None:
        """Puts a request at the end of the queue.

        Raises:
            RequestTooLargeError: it would not fit into an empty cache.
            QueueFullError: too many wait.
        """
        if seat.pages > self.num_pages:
            raise RequestTooLargeError(
                f"prompt: expected a request of at most {self.num_pages} pages of the cache, got "
                f"{len(seat.request.prompt)} tokens and gen_length = {seat.config.gen_length} with "
                f"{seat.request.branches} branches, which may come to need {seat.pages}"
            )
        self.check_queue()
        self.waiting.append(seat)

    def check_queue(self) -> None:
        """Raises QueueFullError if a request would wait behind as many as may wait."""
        # Those that find a free place do not wait, though the next step has yet to seat them.
        free = max(0, self.max_requests - self.running)
        if len(self.waiting) >= self.max_queue + free:
            raise QueueFullError(self.max_queue, self.retry_after())

    def retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free, at least one."""
        each = _FIRST_GUESS if self._seconds is None else self._seconds
        return max(1.0, math.ceil(each / self.max_requests))

    def remove(self, seat: Seat) -> bool:
        """Takes a request out of the queue; False: it is not there."""
        if seat not in self.waiting:
            return False
        if self.waiting[0] is seat:
            self._overtaken = 0
        self.waiting.remove(seat)
        return True

    def admit(self) -> list[Seat]:
        """The requests that begin now, off the queue, their pages reserved.

        First come, first served. One that lacks pages lets smaller ones pass, but not for ever: what is freed
        then is kept for it.
        """
        admitted = []
        for seat in list(self.waiting):
            if self.running >= self.max_requests:
                break
            is_first = seat is self.waiting[0]
            if self.reserved + seat.pages > self.num_pages or (
                not is_first and self._overtaken >= MOST_OVERTAKEN
            ):
                continue
            self._overtaken = 0 if is_first else self._overtaken + 1
            self.waiting.remove(seat)
            self.reserved += seat.pages
            self.running += 1
            admitted.append(seat)
        return admitted

    def release(self, seat: Seat, seconds: float | None = None) -> None:
        """Gives back what a running request has reserved.

        Args:
            seconds: that it ran; None: that says nothing of others.
        """
        self.reserved -= seat.pages
        self.running -= 1
        if seconds is not None:
            self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds

    @property
    def usage(self) -> float:
        """Share of the pages that is reserved."""
        return self.reserved / self.num_pages if self.num_pages else 0.0


def fewer_sizes(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the block sizes, ascending: those nearest to the usual one by their ratio to it (ours)."""
    nearest = sorted(sizes, key=lambda size: (abs(math.log2(size / _USUAL_SIZE)), size))
    return tuple(sorted(nearest[:count]))


def branches_under_load(sizes: Sequence[int], requests: int) -> int:
    """How many branches a new request gets while `requests` run or wait, itself among them (ours).

    As many as its share of LOAD_TOKENS has room for, by their windows; at least one.
    """
    share = LOAD_TOKENS / max(requests, 1)
    count = 1
    while count < len(sizes) and sum(fewer_sizes(sizes, count + 1)) <= share:
        count += 1
    return count


def drafts_under_load(size: int, drafts: Sequence[int], requests: int) -> bool:
    """Whether a new request gets its drafts while `requests` run or wait, itself among them (ours).

    They save forwards and compute more in each, so only while its share of LOAD_TOKENS has room for all. What
    is decoded is the same with and without.

    Args:
        size: of the window, which every draft has once more.
    """
    return size * (1 + len(drafts)) * requests <= LOAD_TOKENS


def rows_within(waiting: Sequence[Sequence[int]], budget: int) -> list[int]:
    """How many whole rows of each waiting request the next forward holds.

    Args:
        waiting: tokens of the rows that each still has to compute, the request that has waited longest first.
        budget: tokens for them; the first row goes even if it is longer, so that all come to their turn.
    """
    taken = []
    used = 0
    for rows in waiting:
        count = 0
        for tokens in rows:
            if used and used + tokens > budget:
                break
            used += tokens
            count += 1
        taken.append(count)
    return taken
