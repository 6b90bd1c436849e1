"""A token for every hidden state, drawn with noise that kernels make where they need it.

As `lm_head`: the library's product, a part of the vocabulary at a time. With `top_p` or `top_k` the parts are
some rows with all of their logits, since what stays of a row depends on all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.structs import SamplingRules
from blockbatch_kernels.triton.launch import on_device_of_first
from blockbatch_kernels.triton.lm_head import highest_of, parts_of_logits, product_of
from blockbatch_kernels.triton.sampling_filter import least_logits
from blockbatch_kernels.triton.sampling_math import changed_logits, gumbel, noise_key


@triton.jit(do_not_specialize=["first_token", "first_block", "suppress_token", "num_changed", "probe_stride"])
def _reduce_kernel(
    logits,  # [rows, num_columns], contiguous: of the tokens from first_token on
    request,  # [rows]
    positions,  # [rows]
    temperature,  # [requests], as the next two
    seed,
    forward,
    changed_token,
    logit_bias,
    banned_before,
    least,  # [rows] fp32, what stays is not below
    probe_tokens,  # [rows]
    score,  # [blocks, predictions] fp32, the highest; this and the next five: written
    drawn_token,  # its token
    drawn_logit,  # and the logit of that
    highest,  # [blocks, predictions] fp32, of all logits
    total,  # sum of exp(logit - highest)
    second,  # the second highest logit, or sum of exp(logit - highest) * (logit - highest)
    probe_logit,  # [predictions] fp32; written where the probe token is in this part
    num_columns,
    first_token,
    first_block,
    first_row,
    num_predictions,
    suppress_token,
    num_changed,
    probe_stride,
    CONFIDENCE: tl.constexpr,
    FILTERS: tl.constexpr,
    HAS_PROBE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, inside = first_token + column, column < num_columns
    of_request, position = tl.load(request + row), tl.load(positions + row)
    begin = first_token + tl.program_id(1) * BLOCK
    logit = changed_logits(
        logits + row.to(tl.int64) * num_columns + column,
        token,
        inside,
        begin,
        tl.minimum(begin + BLOCK, first_token + num_columns),
        suppress_token,
        of_request,
        position,
        changed_token,
        logit_bias,
        banned_before,
        num_changed,
    )
    result = (first_block + tl.program_id(1)) * num_predictions + first_row + row
    top, top_id = highest_of(logit, token)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(logit - base)
    tl.store(highest + result, top)
    tl.store(total + result, tl.sum(weight, axis=0))
    if CONFIDENCE == "entropy":
        tl.store(second + result, tl.sum(tl.where(weight > 0, weight * (logit - base), 0.0), axis=0))
    if CONFIDENCE == "margin":
        others = tl.where(token == top_id, float("-inf"), logit)
        tl.store(second + result, tl.max(others, axis=0))
    if HAS_PROBE:
        is_probe = inside & (token == tl.load(probe_tokens + row * probe_stride))
        probe_at = probe_logit + first_row + row + tl.zeros([BLOCK], tl.int32)
        tl.store(probe_at, logit, mask=is_probe)

    heat = tl.load(temperature + of_request)
    scores = logit
    if heat > 0:
        one, two = noise_key(tl.load(seed + of_request), position, tl.load(forward + of_request))
        scores = logit * (1.0 / heat) + gumbel(one, two, token)
    if FILTERS:
        scores = tl.where(logit < tl.load(least + row), float("-inf"), scores)
    best, best_id = highest_of(scores, token)
    tl.store(score + result, best)
    tl.store(drawn_token + result, best_id)
    tl.store(drawn_logit + result, tl.sum(tl.where(token == best_id, logit, 0.0), axis=0))


@triton.jit
def _combine_kernel(
    score,  # [blocks, predictions]
    drawn_token,
    drawn_logit,
    highest,
    total,
    second,
    probe_tokens,
    probe_logit,
    token_out,  # [predictions]; this and the next two: written
    confidence_out,
    probe_out,
    num_blocks,
    vocab_size,
    probe_stride,
    CONFIDENCE: tl.constexpr,
    HAS_PROBE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    block = tl.arange(0, BLOCK)
    source, is_block = block * num_rows + row, block < num_blocks
    scores = tl.load(score + source, mask=is_block, other=float("-inf"))
    tokens = tl.load(drawn_token + source, mask=is_block, other=2147483647)
    _, token = highest_of(scores, tokens)
    tl.store(token_out + row, token)

    top_of = tl.load(highest + source, mask=is_block, other=float("-inf"))
    top, first_block = highest_of(top_of, block)
    scale = tl.exp(top_of - top)
    denominator = tl.sum(tl.load(total + source, mask=is_block, other=0.0) * scale, axis=0)
    if CONFIDENCE == "probability":
        logits = tl.load(drawn_logit + source, mask=is_block, other=0.0)
        drawn = tl.sum(tl.where(tokens == token, logits, 0.0), axis=0)
        sure = tl.exp(drawn - top) / denominator
    elif CONFIDENCE == "entropy":
        # The sums refer to the highest logit of their block.
        sums = tl.load(second + source, mask=is_block, other=0.0)
        totals = tl.load(total + source, mask=is_block, other=0.0)
        terms = tl.where(scale > 0, scale * (sums + totals * (top_of - top)), 0.0)
        sure = tl.exp(tl.sum(terms, axis=0) / denominator) / denominator
    else:
        seconds = tl.load(second + source, mask=is_block, other=float("-inf"))
        others = tl.where(block == first_block, float("-inf"), top_of)
        next_one = tl.maximum(tl.max(others, axis=0), tl.max(seconds, axis=0))
        sure = (1.0 - tl.exp(next_one - top)) / denominator
    tl.store(confidence_out + row, tl.where(sure > 1.0, 1.0, sure))
    if HAS_PROBE:
        probe = tl.load(probe_tokens + row * probe_stride)
        logit = tl.load(probe_logit + row, mask=(probe >= 0) & (probe < vocab_size), other=float("-inf"))
        tl.store(probe_out + row, tl.exp(logit - top) / denominator)


def whole_rows(
    hidden: Tensor, weight: Tensor, weight_scale: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The first of some rows, and all of their logits; the next ones overwrite them."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    part = max(1, tuning.TRITON_LM_HEAD.part_bytes // (vocab_size * hidden.element_size()))
    logits = torch.empty(min(part, num_rows) * vocab_size, dtype=hidden.dtype, device=hidden.device)
    for first in range(0, num_rows, part):
        rows = hidden[first : first + part]
        chunk = logits[: rows.shape[0] * vocab_size].view(rows.shape[0], vocab_size)
        product_of(rows, weight, weight_scale, chunk)
        yield first, chunk


@on_device_of_first
def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    weight_scale: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, weight = hidden.detach(), weight.detach()  # products into a given tensor know no gradient
    logits_of = whole_rows if _filters(rules) else parts_of_logits
    parts = logits_of(hidden, weight, weight_scale)
    return _sampled(parts, hidden, weight.shape[0], rules, request, positions, **options)


@on_device_of_first
def sample_logits(
    logits: Tensor, rules: SamplingRules, request: Tensor, positions: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `blockbatch_kernels.reference.sampling.sample_logits`."""
    logits = logits.detach().contiguous()
    return _sampled([(0, logits)], logits, logits.shape[1], rules, request, positions, **options)


def _filters(rules: SamplingRules) -> bool:
    """Whether what stays of a row depends on all of it."""
    return rules.top_p is not None or rules.top_k is not None


def _sampled(
    parts: Iterable[tuple[int, Tensor]],
    rows_like: Tensor,
    vocab_size: int,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    confidence: str = "probability",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of logits that come in parts.

    Args:
        parts: with filters the first of some rows and all of their logits, else the first token of a part of
            the vocabulary and the logits of all rows.
        rows_like: has a row for each prediction.
    """
    num_rows, device = rows_like.shape[0], rows_like.device
    has_probe, block = probe_tokens is not None, tuning.TRITON_LM_HEAD.block
    token = torch.empty(num_rows, dtype=torch.int32, device=device)
    sureness = torch.empty(num_rows, dtype=torch.float32, device=device)
    probe_probability = torch.empty_like(sureness) if has_probe else None
    if num_rows == 0:
        return token, sureness, probe_probability

    filters = _filters(rules)
    request, positions = request.contiguous(), positions.contiguous()
    rules = SamplingRules(*(None if value is None else value.contiguous() for value in rules))
    changes = rules.changed_token, rules.logit_bias, rules.banned_before
    suppress_token = -1 if suppress_token is None else suppress_token
    num_blocks, num_changed = triton.cdiv(vocab_size, block), rules.changed_token.shape[0]
    score, drawn_logit, highest, total, second = torch.empty(
        5, num_blocks, num_rows, dtype=torch.float32, device=device
    )
    drawn_token = torch.empty(num_blocks, num_rows, dtype=torch.int32, device=device)
    partials = score, drawn_token, drawn_logit, highest, total, second
    probe_logit = torch.empty_like(sureness)
    probe_stride = probe_tokens.stride(0) if has_probe else 0
    least = sureness
    for first, chunk in parts:
        first_row, first_token = (first, 0) if filters else (0, first)
        rows, columns = chunk.shape
        mine = slice(first_row, first_row + rows)
        of_rows = request[mine], positions[mine]
        if filters:
            least = least_logits(chunk, *of_rows, rules, suppress_token)
        _reduce_kernel[(rows, triton.cdiv(columns, block))](
            chunk,
            *of_rows,
            rules.temperature,
            rules.seed,
            rules.forward,
            *changes,
            least,
            probe_tokens[mine] if has_probe else None,
            *partials,
            probe_logit,
            columns,
            first_token,
            first_token // block,
            first_row,
            num_rows,
            suppress_token,
            num_changed,
            probe_stride,
            CONFIDENCE=confidence,
            FILTERS=filters,
            HAS_PROBE=has_probe,
            BLOCK=block,
            num_warps=tuning.TRITON_LM_HEAD.num_warps,
        )
    _combine_kernel[(num_rows,)](
        *partials,
        probe_tokens,
        probe_logit,
        token,
        sureness,
        probe_probability,
        num_blocks,
        vocab_size,
        probe_stride,
        CONFIDENCE=confidence,
        HAS_PROBE=has_probe,
        BLOCK=triton.next_power_of_2(num_blocks),
        num_warps=1,
    )
    return token, sureness, probe_probability
