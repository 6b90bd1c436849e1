"""How work is captured as CUDA graphs, and the memory that the graphs of a batch work in."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Larger packs keep the GPU busy for longer than the host needs to launch them.
MAX_GRAPH_TOKENS = 4096
# torch captures one graph at a time in a process, whatever the device.
_capturing = threading.Lock()
_capture_streams: dict[torch.device, torch.cuda.Stream] = {}
# Of each device, bytes in the memory pool of every batch's graphs: torch counts them as free.
_pools: dict[torch.device, list[list[int]]] = {}


def pool_bytes(device: torch.device) -> int:
    """Memory of a device that captured steps keep for themselves, which torch counts as free."""
    return sum(held for (held,) in list(_pools.get(device, ())))


class GraphPool:
    """Memory that the graphs of one batch work in: they run one after the other.

    Args:
        device: of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._handle = device, None
        self._held = [0]
        pools = _pools.setdefault(device, [])
        pools.append(self._held)
        weakref.finalize(self, _forget, pools, self._held)

    @property
    def nbytes(self) -> int:
        """Memory that nothing else can use while the graphs are there."""
        return self._held[0]

    def capture(self, run: Callable[[], Any], *, idle: bool = True) -> tuple[torch.cuda.CUDAGraph, Any]:
        """`run` as a graph and what it returned while it was captured; see `capture`."""
        graph, kept, held = capture(run, self._device, self._handle, idle=idle)
        self._held[0] += held
        self._handle = self._handle or graph.pool()
        return graph, kept


def capture(
    run: Callable[[], Any], device: torch.device, pool: Any, *, idle: bool = True
) -> tuple[torch.cuda.CUDAGraph, Any, int]:
    """`run` as a graph, what it returned while it was captured, and bytes that the capture came to hold.

    Args:
        device: the current one.
        pool: of memory, of another graph (None: one of its own).
        idle: whether to wait for the device first, and give back what it has cached; else the capture is
            made while the device works.
    """
    with _capturing:
        # Of this device: torch's own stream is of whichever device was the first to capture.
        stream = _capture_streams.get(device)
        if stream is None:
            stream = _capture_streams[device] = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        options = dict(pool=pool, capture_error_mode="thread_local")
        begun = torch.cuda.graph(graph, stream=stream, **options) if idle else _busy(graph, stream, options)
        with _without_collection(), begun:
            before = torch.cuda.memory_reserved(device)
            kept = run()
            held = max(0, torch.cuda.memory_reserved(device) - before)
    return graph, kept, held


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keeps Python from collecting garbage: graphs among it cannot be freed while another one is captured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _busy(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, options: dict[str, Any]) -> Iterator[None]:
    """`torch.cuda.graph` without the wait for the device in front of it."""
    with torch.cuda.stream(stream):
        graph.capture_begin(**options)
        try:
            yield
        finally:
            graph.capture_end()


def _forget(pools: list[list[int]], held: list[int]) -> None:
    # By identity: two batches may hold equally much.
    for index, other in enumerate(pools):
        if other is held:
            del pools[index]
            return
