"""Forwards of whole rows as CUDA graphs: the GPU does not wait for the host's launches.

Rows of a decode have the same length whenever they are computed whole, so their forward is the same work on
other values. A graph is captured at the second forward of its sizes, while the GPU is at work on that very
forward, so that the capture takes no time of its own; the first one loads kernels and chooses algorithms.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch

import blockbatch_kernels as bbk
from blockbatch.decoding.graph_pool import MAX_GRAPH_TOKENS, GraphPool
from blockbatch.parallel import share_of

# Graphs that are kept, and sizes that are known to have come up once.
_MOST_GRAPHS, _MOST_SEEN = 8, 64
# Forwards after which a graph that none of them used gives way to another. One that is in use stays, so that
# many sizes in turns do not capture each other's away.
_STALE = 256
# Forwards of fewer sizes are captured where lengths are rounded up. Products are computed in tiles of 128
# tokens or 64, so that most of the padding costs little.
_LONG, _LONG_STEP, _SHORT_STEP = 1024, 64, 16


class RowSizes(NamedTuple):
    """What decides which work a forward of whole rows launches.

    Attributes:
        tokens, predictions: room for them, at least as many as there are.
        rows: that are computed.
        captured: whether such a forward is worth a graph.
    """

    tokens: int
    predictions: int
    rows: int
    captured: bool = True


def row_capacity(tokens: int) -> int:
    """Room that a forward of whole rows makes for its tokens, where graphs run it."""
    if tokens > MAX_GRAPH_TOKENS:
        return tokens
    step = _SHORT_STEP if tokens <= _LONG else _LONG_STEP
    return -(-tokens // step) * step


def row_sizes(tokens: int, predictions: int, rows: int, most: int) -> RowSizes:
    """Sizes, rounded up to few, of a forward of `tokens` tokens and at most `predictions` predictions.

    Args:
        most: predictions that so many rows can make.
    """
    most = min(most, tokens)
    if tokens > MAX_GRAPH_TOKENS:
        return RowSizes(tokens, min(predictions, most), rows, captured=False)
    quarter = -(-most // 4)
    return RowSizes(row_capacity(tokens), quarter if predictions <= quarter else most, rows)


@dataclass
class _Captured:
    """A graph, what it writes, and the last forward that it ran."""

    graph: torch.cuda.CUDAGraph
    kept: bbk.Predictions | None
    last_run: int


class RowGraphs:
    """Runs the forwards of whole rows of one batch, whose buffers stay where they are.

    Args:
        model: see `Session`.
        pool: that the graphs work in, with others of the batch.
        most: graphs that are kept.

    Attributes:
        runs, replays: forwards so far, and those of them that a graph ran.
    """

    def __init__(self, model, pool: GraphPool, most: int = _MOST_GRAPHS) -> None:
        self._pool, self._most = pool, most
        # Sums over ranks are captured with the device at rest, as those of steps are.
        self._alone = share_of(model).size == 1
        # The one used last stands last.
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._can_capture = True
        self.runs = self.replays = 0

    @property
    def pool_bytes(self) -> int:
        return self._pool.nbytes

    def run(self, key: Hashable, compute: Callable[[], bbk.Predictions | None]) -> bbk.Predictions | None:
        """What `compute` gives, by its graph where there is one; returns while the device works.

        Args:
            key: equal for calls that launch the same work.
            compute: reads nothing of the host that `key` does not hold, and tensors at the same addresses.
        """
        self.runs += 1
        found = self._graphs.get(key)
        if found is not None:
            self._graphs.move_to_end(key)
            found.last_run = self.runs
            found.graph.replay()
            self.replays += 1
            return _copied(found.kept)
        computed = compute()
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > _MOST_SEEN:
                self._seen.popitem(last=False)
        elif self._has_room():
            self._capture(key, compute)
        return computed

    def _has_room(self) -> bool:
        if not self._can_capture:
            return False
        if len(self._graphs) >= self._most:
            oldest = next(iter(self._graphs))
            if self.runs - self._graphs[oldest].last_run < _STALE:
                return False
            del self._graphs[oldest]
        return True

    def _capture(self, key: Hashable, compute: Callable[[], bbk.Predictions | None]) -> None:
        try:
            graph, kept = self._pool.capture(compute, idle=not self._alone)
        except torch.OutOfMemoryError:  # the forward as it is needs no memory but what it had
            self._can_capture = False
            return
        self._graphs[key] = _Captured(graph, kept, self.runs)
        del self._seen[key]


def _copied(kept: bbk.Predictions | None) -> bbk.Predictions | None:
    """Out of memory that the next graph works in."""
    if kept is None:
        return None
    return bbk.Predictions(*(None if tensor is None else tensor.clone() for tensor in kept))


def new_row_graphs(model, pool: GraphPool, most: int = _MOST_GRAPHS) -> RowGraphs | None:
    """None: forwards of whole rows run side by side, which one memory of graphs cannot serve."""
    return RowGraphs(model, pool, most) if share_of(model).num_lanes == 1 else None
