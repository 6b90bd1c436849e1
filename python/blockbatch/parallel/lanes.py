"""Forwards that do not depend on each other, side by side on one GPU.

While the sums of one travel between the ranks, another computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from blockbatch.parallel.group import RankGroup


class Lanes:
    """Streams with a transport of their own each; the first is the current stream with the group's.

    Args:
        group: the ranks.
        count: of lanes, at most the group's; one where transports other than symmetric memory are used.
    """

    def __init__(self, group: RankGroup, count: int) -> None:
        self._group = group
        self._others = []
        if group.transport == "symmetric":
            self._others = [
                (torch.cuda.Stream(group.device), group.another_transport())
                for _ in range(min(count, group.most_lanes) - 1)
            ]

    @property
    def count(self) -> int:
        return 1 + len(self._others)

    @contextmanager
    def open(self, most: int | None = None) -> Iterator[Callable[[int], AbstractContextManager]]:
        """Gives a function: in its context work number n goes into lane n modulo their count.

        Lanes begin behind the work of the current stream, which goes on behind theirs. What is allocated in a
        lane is freed only once the current stream has done with it: the lane's next work waits for that.

        Args:
            most: lanes to use; None: all of them.
        """
        current, begun = None, []
        count = self.count if most is None else min(most, self.count)
        if count > 1:
            current = torch.cuda.current_stream(self._group.device)

        @contextmanager
        def lane(number: int) -> Iterator[None]:
            if number % count == 0:
                yield
                return
            stream, transport = self._others[number % count - 1]
            if stream not in begun:
                stream.wait_stream(current)
                begun.append(stream)
            with torch.cuda.stream(stream), self._group.through(transport):
                yield

        self._group.alone = count == 1
        try:
            yield lane
        finally:
            self._group.alone = True
            for stream in begun:
                current.wait_stream(stream)
