"""Block steps as CUDA graphs, one for each packed capacity and kind of attention."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

import blockbatch_kernels as bbk
from blockbatch.decoding.batch import Batch
from blockbatch.decoding.forward import block_denoise
from blockbatch_kernels import tuning

# Larger packs keep the GPU busy for longer than the host needs to launch them.
MAX_GRAPH_TOKENS = 4096
# torch captures one graph at a time in a process, whatever the device.
_capturing = threading.Lock()
_capture_streams: dict[torch.device, torch.cuda.Stream] = {}
# Of each device, bytes in the memory pool of every batch's graphs: torch counts them as free.
_pools: dict[torch.device, list[list[int]]] = {}
# Operators of a step whose reference asks the host for lengths.
_DEVICE_OPS = ("varlen_attention", "attention_plan", "copy_pages", "decode_policy", "pack_windows")


def pool_bytes(device: torch.device) -> int:
    """Memory of a device that captured steps keep for themselves, which torch counts as free."""
    return sum(held for (held,) in list(_pools.get(device, ())))


def packed_capacity(tokens: int) -> int:
    """The captured size that serves a pack of `tokens`.

    Up to 128 tokens a step costs the reading of the weights whatever its size, so a few sizes serve; beyond,
    four sizes to each doubling keep the padding below a fifth.
    """
    for size in (16, 32, 64, 128):
        if tokens <= size:
            return size
    size = 1 << (tokens - 1).bit_length()
    step = size // 8
    return -(-tokens // step) * step


class StepGraphs:
    """Runs the block steps of one batch; the first step of a size runs as it is and is captured then.

    A capture forbids the calls that would break it to its own thread alone: other threads may allocate and
    wait meanwhile. It is for the current device, which is the batch's in a turn (see `blockbatch.devices`).
    """

    def __init__(self, model, batch: Batch) -> None:
        self._model, self._batch = model, batch
        # By capacity and by whether the attention is planned in units.
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = None
        self._held = [0]  # bytes of the pool
        pools = _pools.setdefault(batch.device, [])
        pools.append(self._held)
        weakref.finalize(self, _forget, pools, self._held)
        # Not only is padding beyond it useless: the matrix library is faster on 252 rows than on 256.
        self._most = batch.most_tokens()

    @staticmethod
    def possible(model) -> bool:
        """Whether every operator of a step runs without the host."""
        if model.device.type != "cuda":
            return False
        # The operators that `head_dim` does not concern take no notice.
        size = dict(head_dim=model.spec.head_dim)
        return all(
            bbk.backend_of(op, model.device, model.backend, **size) != "reference" for op in _DEVICE_OPS
        )

    def run(self, tokens: int) -> None:
        """One block step of `tokens` packed tokens; returns while the device works."""
        capacity = min(packed_capacity(tokens), self._most)
        key = capacity, self._plans_units(capacity)
        if capacity > MAX_GRAPH_TOKENS:
            block_denoise(self._model, self._batch, tokens, tokens)
        elif key in self._graphs:
            self._graphs[key].replay()
        else:
            # This step is real work and warms up what a capture must not do: loading kernels, choosing
            # algorithms.
            block_denoise(self._model, self._batch, capacity, capacity)
            self._graphs[key] = self._capture(capacity)

    def _plans_units(self, capacity: int) -> bool:
        spec, cache = self._model.spec, self._batch.cache
        heads, pages_per_row = (spec.num_heads, spec.num_kv_heads), cache.page_table.shape[1]
        return tuning.plans_units(
            *heads,
            cache.page_size,
            pages_per_row,
            cache.distinct_rows,
            self._batch.device,
            num_tokens=capacity,
        )

    @property
    def pool_bytes(self) -> int:
        """Memory that the graphs work in, which nothing else can use while they are there."""
        return self._held[0]

    def _capture(self, capacity: int) -> torch.cuda.CUDAGraph:
        def step() -> None:
            block_denoise(self._model, self._batch, capacity, capacity)

        # The graphs run one after the other, so all can work in the same memory.
        try:
            graph, _, held = capture(step, self._batch.device, self._pool)
        except RuntimeError as error:
            if self._batch.rule is None:
                raise
            name = self._batch.method.rule.name
            raise RuntimeError(
                f"method {name!r}: expected a rule whose steps can be captured as a CUDA graph, or one of "
                f"commit_rule(..., graphs=False), got: {error}"
            ) from error
        self._held[0] += held
        self._pool = self._pool or graph.pool()
        return graph


def capture(run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Any, int]:
    """`run` as a graph, what it returned while it was captured, and bytes that the capture came to hold.

    Args:
        device: the current one.
        pool: of memory, of another graph (None: one of its own).
    """
    with _capturing:
        # Of this device: torch's own stream is of whichever device was the first to capture.
        stream = _capture_streams.get(device)
        if stream is None:
            stream = _capture_streams[device] = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved(device)
            kept = run()
            held = max(0, torch.cuda.memory_reserved(device) - before)
    return graph, kept, held


def _forget(pools: list[list[int]], held: list[int]) -> None:
    # By identity: two batches may hold equally much.
    for index, other in enumerate(pools):
        if other is held:
            del pools[index]
            return
