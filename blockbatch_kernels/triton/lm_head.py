"""Top token and its softmax probability: the library's product, a part of the vocabulary at a time.

The logits of a part are reduced while they are still in the L2 cache, and the next part overwrites them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.triton.gemm_fp8 import product_into
from blockbatch_kernels.triton.launch import on_device_of_first
from blockbatch_kernels.triton.quantized import quantize_rows


@triton.jit
def highest_of(logit, token):
    """The highest logit and its lowest token. What is not a number is the highest, as torch has it."""
    is_nan = logit != logit
    any_nan = tl.max(is_nan.to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(is_nan, float("-inf"), logit), axis=0)
    is_top = tl.where(any_nan, is_nan, logit == top)
    top_token = tl.min(tl.where(is_top, token, 2147483647), axis=0)
    return tl.where(any_nan, float("nan"), top), top_token


@triton.jit(do_not_specialize=["first_token", "first_block", "suppress_token", "probe_stride"])
def _reduce_kernel(
    logits,  # [predictions, num_columns], contiguous: of the tokens from first_token on
    probe_tokens,  # [predictions]
    highest,  # [blocks, predictions] fp32; this and the next two: written from first_block on
    total,  # [blocks, predictions] fp32, sum of exp(logit - highest)
    top_token,  # [blocks, predictions] int32
    probe_logit,  # [predictions] fp32; written where the probe token is in this part
    num_columns,
    first_token,
    first_block,
    suppress_token,
    probe_stride,
    HAS_PROBE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = first_token + column
    inside = column < num_columns
    pointer = logits + row.to(tl.int64) * num_columns + column
    logit = tl.load(pointer, mask=inside, other=float("-inf")).to(tl.float32)
    logit = tl.where(token == suppress_token, float("-inf"), logit)
    top, top_id = highest_of(logit, token)
    base = tl.where(top == float("-inf"), 0.0, top)
    result = (first_block + tl.program_id(1)) * num_rows + row
    tl.store(highest + result, top)
    tl.store(total + result, tl.sum(tl.exp(logit - base), axis=0))
    tl.store(top_token + result, top_id)
    if HAS_PROBE:
        is_probe = inside & (token == tl.load(probe_tokens + row * probe_stride))
        tl.store(probe_logit + row + tl.zeros([BLOCK], tl.int32), logit, mask=is_probe)


@triton.jit
def _combine_kernel(
    highest,  # [blocks, predictions]
    total,
    top_token,
    probe_tokens,
    probe_logit,
    token_out,  # [predictions]; this and the next two: written
    confidence_out,
    probe_out,
    num_blocks,
    vocab_size,
    probe_stride,
    HAS_PROBE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    block = tl.arange(0, BLOCK)
    source, is_block = block * num_rows + row, block < num_blocks
    top_of = tl.load(highest + source, mask=is_block, other=float("-inf"))
    top, top_id = highest_of(top_of, tl.load(top_token + source, mask=is_block, other=2147483647))
    sums = tl.load(total + source, mask=is_block, other=0.0) * tl.exp(top_of - top)
    denominator = tl.sum(sums, axis=0)
    tl.store(token_out + row, top_id)
    tl.store(confidence_out + row, 1.0 / denominator)
    if HAS_PROBE:
        probe = tl.load(probe_tokens + row * probe_stride)
        logit = tl.load(probe_logit + row, mask=(probe >= 0) & (probe < vocab_size), other=float("-inf"))
        tl.store(probe_out + row, tl.exp(logit - top) / denominator)


def product_of(hidden: Tensor, weight: Tensor, weight_scale: Tensor | None, out: Tensor) -> None:
    """Logits of hidden states; `out` [rows, tokens] *written*."""
    if weight_scale is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        product_into(out, *quantize_rows(hidden), weight, weight_scale)


def parts_of_logits(
    hidden: Tensor, weight: Tensor, weight_scale: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The first token of each part of the vocabulary, and its logits; the next part overwrites them."""
    num_rows, vocab_size, block = hidden.shape[0], weight.shape[0], tuning.TRITON_LM_HEAD.block
    row_bytes = num_rows * hidden.element_size()
    part = max(1, tuning.TRITON_LM_HEAD.part_bytes // (row_bytes * block)) * block
    part = min(part, triton.cdiv(vocab_size, block) * block)
    logits = torch.empty(num_rows * part, dtype=hidden.dtype, device=hidden.device)
    for first in range(0, vocab_size, part):
        columns = min(part, vocab_size - first)
        chunk = logits[: num_rows * columns].view(num_rows, columns)
        tokens = slice(first, first + columns)
        product_of(hidden, weight[tokens], None if weight_scale is None else weight_scale[tokens], chunk)
        yield first, chunk


@on_device_of_first
def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, weight = hidden.detach(), weight.detach()  # products into a given tensor know no gradient
    (num_rows, _), vocab_size = hidden.shape, weight.shape[0]
    has_probe, block = probe_tokens is not None, tuning.TRITON_LM_HEAD.block
    top_token = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    confidence = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    probe_probability = torch.empty_like(confidence) if has_probe else None
    if num_rows == 0:
        return top_token, confidence, probe_probability

    num_blocks = triton.cdiv(vocab_size, block)
    highest, total = torch.empty(2, num_blocks, num_rows, dtype=torch.float32, device=hidden.device)
    top_of = torch.empty(num_blocks, num_rows, dtype=torch.int32, device=hidden.device)
    probe_logit = torch.empty_like(confidence)
    probe_stride = probe_tokens.stride(0) if has_probe else 0
    for first, chunk in parts_of_logits(hidden, weight, weight_scale):
        columns = chunk.shape[1]
        _reduce_kernel[(num_rows, triton.cdiv(columns, block))](
            chunk,
            probe_tokens,
            highest,
            total,
            top_of,
            probe_logit,
            columns,
            first,
            first // block,
            -1 if suppress_token is None else suppress_token,
            probe_stride,
            HAS_PROBE=has_probe,
            BLOCK=block,
            num_warps=tuning.TRITON_LM_HEAD.num_warps,
        )
    _combine_kernel[(num_rows,)](
        highest,
        total,
        top_of,
        probe_tokens,
        probe_logit,
        top_token,
        confidence,
        probe_probability,
        num_blocks,
        vocab_size,
        probe_stride,
        HAS_PROBE=has_probe,
        BLOCK=triton.next_power_of_2(num_blocks),
        num_warps=1,
    )
    return top_token, confidence, probe_probability
