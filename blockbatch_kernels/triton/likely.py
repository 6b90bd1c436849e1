"""Top token, confidence, and every token of a probability above 0.2, as `lm_head`: a part of the vocabulary
at a time. A block of it gives its four highest logits, among which all likely tokens of that block are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.shapes import LEAST_LIKELY, NUM_LIKELY
from blockbatch_kernels.triton.launch import on_device_of_first
from blockbatch_kernels.triton.lm_head import highest_of, parts_of_logits

LEAST = tl.constexpr(LEAST_LIKELY)
PLACES = tl.constexpr(NUM_LIKELY)


@triton.jit(do_not_specialize=["first_token", "first_block", "suppress_token"])
def _reduce_kernel(
    logits,  # [predictions, num_columns], contiguous: of the tokens from first_token on
    highest,  # [blocks, predictions] fp32, without the suppressed token; this and the next two: written
    total,  # [blocks, predictions] fp32, sum of exp(logit - highest)
    top_token,  # [blocks, predictions] int32
    likely_logit,  # [blocks, 4, predictions] fp32, falling; this and the next: written
    likely_token,  # [blocks, 4, predictions] int32
    suppressed_logit,  # [predictions] fp32; written where the suppressed token is in this part
    num_columns,
    first_token,
    first_block,
    suppress_token,
    BLOCK: tl.constexpr,
):
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = first_token + column
    inside = column < num_columns
    pointer = logits + row.to(tl.int64) * num_columns + column
    logit = tl.load(pointer, mask=inside, other=float("-inf")).to(tl.float32)
    is_suppressed = inside & (token == suppress_token)
    tl.store(suppressed_logit + row + tl.zeros([BLOCK], tl.int32), logit, mask=is_suppressed)
    result = (first_block + tl.program_id(1)) * num_rows + row

    left = logit
    for place in tl.static_range(PLACES):
        value, token_id = highest_of(left, token)
        of_place = ((first_block + tl.program_id(1)) * PLACES + place) * num_rows + row
        tl.store(likely_logit + of_place, value)
        tl.store(likely_token + of_place, token_id)
        left = tl.where(token == token_id, float("-inf"), left)

    logit = tl.where(is_suppressed, float("-inf"), logit)
    top, top_id = highest_of(logit, token)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(highest + result, top)
    tl.store(total + result, tl.sum(tl.exp(logit - base), axis=0))
    tl.store(top_token + result, top_id)


@triton.jit
def _combine_kernel(
    highest,  # [blocks, predictions]
    total,
    top_token,
    likely_logit,
    likely_token,
    suppressed_logit,
    token_out,  # [predictions]; this and the next three: written
    confidence_out,
    likely_token_out,  # [predictions, 4]
    likely_probability_out,
    num_blocks,
    SUPPRESSES: tl.constexpr,
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

    whole, base = denominator, top
    if SUPPRESSES:
        suppressed = tl.load(suppressed_logit + row)
        base = tl.where(suppressed > top, suppressed, top)
        # Nothing but the suppressed token has no softmax without it, but one with it.
        others = tl.where(top == float("-inf"), 0.0, denominator * tl.exp(top - base))
        whole = others + tl.exp(suppressed - base)
    place = tl.arange(0, BLOCK * PLACES)
    is_there = place < num_blocks * PLACES
    left = tl.load(likely_logit + place * num_rows + row, mask=is_there, other=float("-inf"))
    token = tl.load(likely_token + place * num_rows + row, mask=is_there, other=2147483647)
    for rank in tl.static_range(PLACES):
        value, token_id = highest_of(left, token)
        probability = tl.exp(value - base) / whole
        is_likely = probability > LEAST
        tl.store(likely_token_out + row * PLACES + rank, tl.where(is_likely, token_id, -1))
        tl.store(likely_probability_out + row * PLACES + rank, tl.where(is_likely, probability, 0.0))
        left = tl.where(token == token_id, float("-inf"), left)


@on_device_of_first
def lm_head_likely(
    hidden: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    suppress_token: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach(), weight.detach()  # products into a given tensor know no gradient
    num_rows, vocab_size, device = hidden.shape[0], weight.shape[0], hidden.device
    top_token = torch.empty(num_rows, dtype=torch.int32, device=device)
    confidence = torch.empty(num_rows, dtype=torch.float32, device=device)
    likely_token = torch.empty(num_rows, NUM_LIKELY, dtype=torch.int32, device=device)
    likely_probability = torch.empty(num_rows, NUM_LIKELY, dtype=torch.float32, device=device)
    if num_rows == 0:
        return top_token, confidence, likely_token, likely_probability

    block = tuning.TRITON_LM_HEAD.block
    num_blocks = triton.cdiv(vocab_size, block)
    highest, total = torch.empty(2, num_blocks, num_rows, dtype=torch.float32, device=device)
    top_of = torch.empty(num_blocks, num_rows, dtype=torch.int32, device=device)
    logit_of = torch.empty(num_blocks, NUM_LIKELY, num_rows, dtype=torch.float32, device=device)
    token_of = torch.empty_like(logit_of, dtype=torch.int32)
    suppressed = torch.empty_like(confidence)
    partials = (highest, total, top_of, logit_of, token_of, suppressed)
    for first, chunk in parts_of_logits(hidden, weight, weight_scale):
        columns = chunk.shape[1]
        _reduce_kernel[(num_rows, triton.cdiv(columns, block))](
            chunk,
            *partials,
            columns,
            first,
            first // block,
            -1 if suppress_token is None else suppress_token,
            BLOCK=block,
            num_warps=tuning.TRITON_LM_HEAD.num_warps,
        )
    results = top_token, confidence, likely_token, likely_probability
    _combine_kernel[(num_rows,)](
        *partials,
        *results,
        num_blocks,
        SUPPRESSES=suppress_token is not None,
        BLOCK=triton.next_power_of_2(num_blocks),
        num_warps=1,
    )
    return results
