"""Block steps as CUDA graphs, one for each packed capacity and kind of attention."""

from __future__ import annotations

import torch

import blockbatch_kernels as bbk
from blockbatch.decoding.batch import Batch
from blockbatch.decoding.forward import block_denoise
from blockbatch.decoding.graph_pool import MAX_GRAPH_TOKENS, GraphPool
from blockbatch_kernels import tuning

# Operators of a step whose reference asks the host for lengths.
_DEVICE_OPS = ("varlen_attention", "attention_plan", "copy_pages", "decode_policy", "pack_windows")


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

    def __init__(self, model, batch: Batch, pool: GraphPool | None = None) -> None:
        self._model, self._batch = model, batch
        # By capacity and by whether the attention is planned in units.
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = pool or GraphPool(batch.device)
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
            e4m3=cache.kv.dtype == torch.float8_e4m3fn,
        )

    @property
    def pool_bytes(self) -> int:
        """Memory that the graphs work in, which nothing else can use while they are there."""
        return self._pool.nbytes

    def _capture(self, capacity: int) -> torch.cuda.CUDAGraph:
        def step() -> None:
            block_denoise(self._model, self._batch, capacity, capacity)

        try:
            return self._pool.capture(step)[0]
        except RuntimeError as error:
            if self._batch.rule is None:
                raise
            name = self._batch.method.rule.name
            raise RuntimeError(
                f"method {name!r}: expected a rule whose steps can be captured as a CUDA graph, or one of "
                f"commit_rule(..., graphs=False), got: {error}"
            ) from error
