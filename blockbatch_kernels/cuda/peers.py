"""What ranks put together whose GPUs reach each other's memory: sums of rows with the norm, the LM head."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.shapes import E4M3

DTYPES = (torch.float32, torch.bfloat16)
MOST_RANKS = 16
# Turns of an inbox: see csrc/layer/all_reduce_norm.cu, which says why two are enough.
TURNS = 2
# Every byte of an inbox before the first call, and of what was read.
NOT_THERE = 0xFF
_ALIGNMENT, _MOST_VECTORS = 16, 4096


@dataclass(frozen=True)
class Inboxes:
    """Memory through which the ranks of a model give each other rows.

    An inbox is [TURNS, ranks - 1, source_bytes] of bytes, for the parts of the other ranks in their order.

    Attributes:
        addresses: of every rank's inbox, as this process reaches it; each filled with NOT_THERE before any
            rank's first call.
        rank: of this process.
        source_bytes: a multiple of 16.
        turn: [2] int32 of this rank's GPU, zeros before the first call; *written* by every call.
        lanes: streams of a GPU on which such sums may run at the same time, each with inboxes of its own.
    """

    addresses: tuple[int, ...]
    rank: int
    source_bytes: int
    turn: Tensor
    lanes: int = 1


def sums_run_on(device: torch.device) -> bool:
    """Whether the kernel runs on a GPU; not with BBK_FUSED_SUMS=0 in the environment."""
    return os.environ.get("BBK_FUSED_SUMS", "1") != "0" and extension.why_unavailable(device) is None


def takes(x: Tensor, weight: Tensor, residual: Tensor, source_bytes: int) -> bool:
    """Whether the kernel has these rows: whole, aligned vectors of 16 bytes, none longer than a block holds.

    The answer is the same on all ranks where shapes, strides and alignments are.
    """
    size = _ALIGNMENT // x.element_size()
    return (
        x.dtype in DTYPES
        and x.shape[1] % size == 0
        and 0 < x.shape[1] <= _MOST_VECTORS * size
        and x.shape[1] * x.element_size() <= source_bytes
        and all(_is_aligned(tensor) for tensor in (x, residual))
        and weight.is_contiguous()
        and weight.data_ptr() % _ALIGNMENT == 0
    )


def all_reduce_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    inboxes: Inboxes,
    *,
    eps: float,
    quantized: bool = False,
    alone: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm`, or `rms_norm_fp8`, of the sum of every rank's `x`, on the current stream; bit for bit.

    Parts are added in the order of the ranks and rounded to the dtype after each addition. Every rank makes
    the same calls in the same order, with an equal number of tokens; results are the same bits on all.

    Args:
        x: [tokens, dim] fp32 or bf16, this rank's part.
        weight: [dim], same dtype.
        residual: [tokens, dim], same dtype; *written*: the sum of all parts and itself.
        eps: added to the mean square.
        quantized: whether rows come in e4m3.
        alone: whether no other lane of this GPU is at work.

    Returns:
        [tokens, dim] in the dtype of `x`, or values [tokens, dim] float8_e4m3fn and scale [tokens] fp32.
    """
    out = torch.empty(x.shape, dtype=E4M3 if quantized else x.dtype, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device) if quantized else None
    most = inboxes.source_bytes // (x.shape[1] * x.element_size())
    for first in range(0, len(x), most):
        rows = slice(first, first + most)
        extension.load().all_reduce_norm(
            x=x[rows],
            weight=weight,
            residual=residual[rows],
            out=out[rows].view(torch.uint8) if quantized else out[rows],
            scale=None if scale is None else scale[rows],
            turn=inboxes.turn,
            inboxes=inboxes.addresses,
            rank=inboxes.rank,
            source_bytes=inboxes.source_bytes,
            eps=eps,
            lanes=inboxes.lanes,
            lets_next_wait=alone,
            programmatic=tuning.PROGRAMMATIC_LAUNCH,
            stream=extension.stream_of(x),
        )
    return out if scale is None else (out, scale)


def merge_head(parts: Tensor, inboxes: Inboxes, *, probes: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `lm_head_confidence` returns, from what `lm_head_parts` says on every rank; the same bits on all.

    Args:
        parts: [predictions, 4] fp32, this rank's; an equal number on all ranks.
        probes: whether there were probes.
    """
    top_token = torch.empty(len(parts), dtype=torch.int32, device=parts.device)
    confidence = torch.empty(len(parts), dtype=torch.float32, device=parts.device)
    probe_probability = torch.empty_like(confidence) if probes else None
    extension.load().lm_head_merge(
        parts=parts,
        top_token=top_token,
        confidence=confidence,
        probe_probability=probe_probability,
        turn=inboxes.turn,
        inboxes=inboxes.addresses,
        rank=inboxes.rank,
        source_bytes=inboxes.source_bytes,
        stream=extension.stream_of(parts),
    )
    return top_token, confidence, probe_probability


def _is_aligned(rows: Tensor) -> bool:
    stride = rows.stride(0) * rows.element_size()
    return (
        rows.stride(1) == 1
        and rows.stride(0) >= rows.shape[1]
        and stride % _ALIGNMENT == 0
        and rows.data_ptr() % _ALIGNMENT == 0
    )
