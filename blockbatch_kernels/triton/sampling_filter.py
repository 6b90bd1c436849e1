"""The lowest logit that `top_p` and `top_k` leave of each row, found by halving the range of fp32 numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.structs import SamplingRules
from blockbatch_kernels.triton.sampling_math import changed_logits


@triton.jit
def _ordered(x):
    """The place of a number among all of fp32, int64."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _number(place):
    """The number of a place."""
    place = place.to(tl.int32)
    return tl.where(place >= 0, place, place ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["suppress_token", "num_changed"])
def _least_kernel(
    logits,  # [rows, vocabulary], contiguous
    request,  # [rows]
    positions,  # [rows]
    temperature,  # [requests], as the next two
    top_p,
    top_k,
    changed_token,
    logit_bias,
    banned_before,
    least,  # [rows] fp32, written
    vocab_size,
    suppress_token,
    num_changed,
    HAS_P: tl.constexpr,
    HAS_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    of_request, position = tl.load(request + row), tl.load(positions + row)
    heat = tl.load(temperature + of_request)
    line = logits + row.to(tl.int64) * vocab_size
    most_mass, most = 2.0, vocab_size
    if HAS_P:
        given = tl.load(top_p + of_request)
        most_mass = tl.where(given < 1.0, given, 2.0)
    if HAS_K:
        count = tl.load(top_k + of_request)
        most = tl.where(count > 0, tl.minimum(count, vocab_size), vocab_size)
    low = _ordered(tl.full([], float("-inf"), tl.float32)) - 1
    high = low + 1
    scale = 1.0 / tl.where(heat > 0, heat, 1.0)
    top = tl.full([], float("-inf"), tl.float32)
    whole = tl.full([], 0.0, tl.float32)
    if (heat > 0) & ((most_mass < 1.0) | (most < vocab_size)):
        # Of each place of a block on its own: one maximum and one sum at the end are enough.
        tops = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            logit = changed_logits(
                line + token,
                token,
                token < vocab_size,
                start,
                tl.minimum(start + BLOCK, vocab_size),
                suppress_token,
                of_request,
                position,
                changed_token,
                logit_bias,
                banned_before,
                num_changed,
            )
            tops = tl.maximum(tops, logit)
        top = tl.max(tops, axis=0)
        high = _ordered(top)
    # Above `high` there are few enough, above `low` there are not. The first pass is above every number.
    sums_whole = tl.full([], 1, tl.int1)
    while high - low > 1:
        middle = tl.where(sums_whole, low, low + (high - low) // 2)
        border = tl.where(sums_whole, float("-inf"), _number(middle))
        masses = tl.zeros([BLOCK], tl.float32)
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            logit = changed_logits(
                line + token,
                token,
                token < vocab_size,
                start,
                tl.minimum(start + BLOCK, vocab_size),
                suppress_token,
                of_request,
                position,
                changed_token,
                logit_bias,
                banned_before,
                num_changed,
            )
            above = logit > border
            masses += tl.where(above, tl.exp((logit - top) * scale), 0.0)
            counts += above.to(tl.int32)
        mass, count = tl.sum(masses, axis=0), tl.sum(counts, axis=0)
        if sums_whole:
            whole = mass
            sums_whole = tl.full([], 0, tl.int1)
        else:
            is_enough = (mass < most_mass * whole) & (count < most)
            high = tl.where(is_enough, middle, high)
            low = tl.where(is_enough, low, middle)
    tl.store(least + row, _number(high))


def least_logits(
    logits: Tensor, request: Tensor, positions: Tensor, rules: SamplingRules, suppress_token: int
) -> Tensor:
    """[rows] fp32 of rows with all of their logits, [rows, vocabulary], before they are changed."""
    least = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _least_kernel[(logits.shape[0],)](
        logits,
        request,
        positions,
        rules.temperature,
        rules.top_p,
        rules.top_k,
        rules.changed_token,
        rules.logit_bias,
        rules.banned_before,
        least,
        logits.shape[1],
        suppress_token,
        rules.changed_token.shape[0],
        HAS_P=rules.top_p is not None,
        HAS_K=rules.top_k is not None,
        BLOCK=tuning.TRITON_LM_HEAD.block,
        num_warps=2 * tuning.TRITON_LM_HEAD.num_warps,
    )
    return least
