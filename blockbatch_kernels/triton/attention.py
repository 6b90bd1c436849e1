"""Attention of packed queries over paged keys, cut into work by an `AttentionPlan`.

One kernel computes a tile of queries over a piece of the keys at a time; a second one combines the pieces'
partial results in the order of the pieces, and zeroes what has no keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.structs import AttentionPlan
from blockbatch_kernels.triton.e4m3 import from_e4m3
from blockbatch_kernels.triton.launch import on_device_of_first, programmatic_launch, shared_bytes

_LOG2_E = math.log2(math.e)


@triton.jit
def _halves(x):
    """[n, d] as two of [n, d / 2]."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _scores(q, k):
    """[m, n]: each query by each key; q is [m, d], k [n, d]."""
    if q.dtype == tl.float32 and q.shape[1] > 128:
        # In two sums, since a single one rounds too often; fma, since a plain sum would be made one again.
        q_first, q_second = _halves(q)
        k_first, k_second = _halves(k)
        first = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
        second = tl.dot(q_second, tl.trans(k_second), input_precision="ieee")
        return tl.math.fma(first, tl.full(first.shape, 1.0, tl.float32), second)
    else:
        return tl.dot(q, tl.trans(k), input_precision="ieee")


# The number of tokens is no reason to compile another version.
@triton.jit(do_not_specialize=["num_tokens"])
def _attention_kernel(
    q,  # [tokens, num_heads, head_dim]
    k_cache,  # [pages, page_size, num_kv_heads, head_dim]
    v_cache,
    out,  # [tokens, num_heads, head_dim], contiguous; written if there is one piece
    partial_out,  # [max_pieces, tokens, num_heads, head_dim] fp32; written if there are several
    partial_lse,  # [max_pieces, tokens, num_heads] fp32, base 2; likewise
    page_table,  # [rows, pages_per_row]
    seqlens_k,  # [rows]
    tiles,  # the plan's tensors, contiguous
    query_order,
    pieces,
    counts,
    softmax_scale,  # times log2(e), not negative
    k_scale,  # [num_kv_heads], where IN_E4M3
    v_scale,
    num_tokens,
    most_keys,  # that the pages of a row hold
    q_strides,
    k_strides,
    v_strides,
    table_strides,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SUBTILES: tl.constexpr,  # products of BLOCK_M rows that make up a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OFFSET: tl.constexpr,  # integer type that holds the offset of any key or value in its cache
    SAME_STRIDES: tl.constexpr,  # of k_cache and v_cache
    IN_E4M3: tl.constexpr,  # the caches
    PROGRAMMATIC: tl.constexpr,  # launched before the kernel in front has ended
):
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_items = tl.load(counts) * (NUM_KV_HEADS * SUBTILES)
    num_pieces = tl.load(counts + 1)
    column = tl.arange(0, BLOCK_D)
    in_head = column < HEAD_DIM
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        tile = tiles + item // (NUM_KV_HEADS * SUBTILES) * 4
        kv_head = item % NUM_KV_HEADS
        scale = softmax_scale
        if IN_E4M3:
            scale = softmax_scale * tl.load(k_scale + kv_head)
        piece, first_query = tl.load(tile), tl.load(tile + 1)
        num_queries, row = tl.load(tile + 2), tl.load(tile + 3)
        start = tl.load(pieces + 2 * piece)
        end = tl.minimum(tl.load(pieces + 2 * piece + 1), tl.minimum(tl.load(seqlens_k + row), most_keys))

        tile_row = item // NUM_KV_HEADS % SUBTILES * BLOCK_M + tl.arange(0, BLOCK_M)
        query = tile_row // GROUP
        head = kv_head * GROUP + tile_row % GROUP
        is_query = query < num_queries
        order = query_order + piece.to(tl.int64) * num_tokens + first_query
        token = tl.load(order + query, mask=is_query, other=0).to(tl.int64)
        element = is_query[:, None] & in_head[None, :]
        q_tile = tl.load(
            q + (token * q_strides[0] + head * q_strides[1])[:, None] + (column * q_strides[2])[None, :],
            mask=element,
            other=0.0,
        )

        table = page_table + row.to(tl.int64) * table_strides[0]
        k_head = k_cache + kv_head * k_strides[2] + (column * k_strides[3])[None, :]
        v_head = v_cache + kv_head * v_strides[2] + (column * v_strides[3])[None, :]
        # Behind the end the last key is loaded once more, and weighs nothing: the cache may hold anything
        # there. Unsigned, so that a division by PAGE_SIZE is a shift.
        last = (end - 1).to(tl.uint32)
        index = tl.arange(0, BLOCK_N)
        key = tl.minimum((start + index).to(tl.uint32), last)
        page = tl.load(table + key // PAGE_SIZE * table_strides[1])
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first_key in range(start, end, BLOCK_N):
            key = tl.minimum((first_key + index).to(tl.uint32), last)
            slot = (key % PAGE_SIZE).to(OFFSET)
            page = page.to(OFFSET)
            k_offset = page * k_strides[0] + slot * k_strides[1]
            v_offset = k_offset if SAME_STRIDES else page * v_strides[0] + slot * v_strides[1]
            if BLOCK_D == HEAD_DIM:
                k = tl.load(k_head + k_offset[:, None])
                v = tl.load(v_head + v_offset[:, None])
            else:
                k = tl.load(k_head + k_offset[:, None], mask=in_head[None, :], other=0.0)
                v = tl.load(v_head + v_offset[:, None], mask=in_head[None, :], other=0.0)
            if IN_E4M3:
                k, v = from_e4m3(k, q.dtype.element_ty), from_e4m3(v, q.dtype.element_ty)
            # One step ahead, so that the addresses above wait for nothing.
            key = tl.minimum((first_key + BLOCK_N + index).to(tl.uint32), last)
            page = tl.load(table + key // PAGE_SIZE * table_strides[1])

            scores = _scores(q_tile, k)
            if first_key + BLOCK_N > end:
                scores = tl.where((first_key + index < end)[None, :], scores, float("-inf"))
            before = highest
            highest = tl.maximum(before, tl.max(scores, axis=1) * scale)
            weights = tl.math.exp2(scores * scale - highest[:, None])
            decay = tl.math.exp2(before - highest)
            total = total * decay + tl.sum(weights, axis=1)
            if q.dtype.element_ty == tl.float32:
                # Added up by steps: one sum over all keys in turn would round several times as much.
                step = tl.dot(weights, v, input_precision="ieee")
                acc = tl.math.fma(acc, tl.broadcast_to(decay[:, None], [BLOCK_M, BLOCK_D]), step)
            else:
                acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])

        acc = acc / total[:, None]
        if IN_E4M3:
            acc = acc * tl.load(v_scale + kv_head)
        result = (token * (NUM_KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + column[None, :]
        if num_pieces == 1:
            tl.store(out + result, acc.to(out.dtype.element_ty), mask=element)
        else:
            skipped = piece.to(tl.int64) * num_tokens * (NUM_KV_HEADS * GROUP)
            tl.store(partial_out + skipped * HEAD_DIM + result, acc, mask=element)
            lse = highest + tl.math.log2(total)
            tl.store(partial_lse + skipped + token * (NUM_KV_HEADS * GROUP) + head, lse, mask=is_query)


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    out,  # [tokens, num_heads, head_dim], contiguous
    partial_out,
    partial_lse,
    seqlens_k,
    token_row,
    pieces,
    counts,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = NUM_HEADS * HEAD_DIM
    inside = element < width
    row, num_pieces = tl.load(token_row + token), tl.load(counts + 1)
    piece = tl.arange(0, MAX_PIECES)
    begin = tl.load(pieces + 2 * piece, mask=piece < num_pieces, other=2147483647)
    num_keys = tl.load(seqlens_k + row, mask=row >= 0, other=0)
    num_reached = tl.sum((begin < num_keys).to(tl.int32), axis=0)
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if row < 0:
        tl.store(out + token * width + element, tl.zeros([BLOCK], out.dtype.element_ty), mask=inside)
    elif num_pieces > 1:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK], tl.float32)
        for first in range(0, num_reached, BLOCK_PIECES):
            for index in tl.static_range(BLOCK_PIECES):  # whose loads wait for each other in no way
                read = element < tl.where(first + index < num_reached, width, 0)
                source = (first + index) * num_tokens + token
                lse = tl.load(
                    partial_lse + source * NUM_HEADS + element // HEAD_DIM, mask=read, other=float("-inf")
                )
                value = tl.load(partial_out + source * width + element, mask=read, other=0.0)
                before = highest
                highest = tl.maximum(before, tl.where(inside, lse, 0.0))
                weight, decay = tl.math.exp2(lse - highest), tl.math.exp2(before - highest)
                total = total * decay + weight
                acc = acc * decay + value * weight
        result = acc / tl.where(inside, total, 1.0)
        tl.store(out + token * width + element, result.to(out.dtype.element_ty), mask=inside)


def _extent(tensor: Tensor) -> int:
    """Elements from the first to behind the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


@on_device_of_first
def varlen_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    softmax_scale: float,
    plan: AttentionPlan,
) -> Tensor:
    return _attend(q, k_cache, v_cache, None, None, page_table, seqlens_k, softmax_scale, plan)


@on_device_of_first
def varlen_attention_fp8(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    softmax_scale: float,
    plan: AttentionPlan,
) -> Tensor:
    scales = k_scale.contiguous(), v_scale.contiguous()
    return _attend(q, k_cache, v_cache, *scales, page_table, seqlens_k, softmax_scale, plan)


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    page_table: Tensor,
    seqlens_k: Tensor,
    softmax_scale: float,
    plan: AttentionPlan,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    if head_dim > tuning.MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head_dim of at most {tuning.MAX_HEAD_DIM}, got {head_dim}")
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if softmax_scale <= 0:  # the kernel scales what it took the maximum of, and minus infinity
        q, softmax_scale = q * (-1 if softmax_scale < 0 else 0), -softmax_scale or 1.0
    seqlens_k = seqlens_k.contiguous()
    tiles, query_order, pieces, token_row, counts = (tensor.contiguous() for tensor in plan[:5])
    max_pieces = pieces.shape[0]
    # A plan of one piece at most writes no partial results.
    partial_pieces = max_pieces if max_pieces > 1 else 0
    partial_out = torch.empty(
        partial_pieces, num_tokens, num_heads, head_dim, dtype=torch.float32, device=q.device
    )
    partial_lse = torch.empty(partial_pieces, num_tokens, num_heads, dtype=torch.float32, device=q.device)

    group, block_d = num_heads // num_kv_heads, max(16, triton.next_power_of_2(head_dim))
    tile_rows = plan.tile_tokens * group
    config = tuning.triton_attention(tile_rows, block_d, q.element_size(), shared_bytes(q.device))
    subtiles = triton.cdiv(tile_rows, config.block_m)
    launch = programmatic_launch(q.device)
    programs = tuning.num_processors(q.device) * tuning.TRITON_ATTENTION_PROGRAMS
    _attention_kernel[(min(tiles.shape[0] * num_kv_heads * subtiles, programs),)](
        q,
        k_cache,
        v_cache,
        out,
        partial_out,
        partial_lse,
        page_table,
        seqlens_k,
        tiles,
        query_order,
        pieces,
        counts,
        softmax_scale * _LOG2_E,
        partial_lse if k_scale is None else k_scale,
        partial_lse if v_scale is None else v_scale,
        num_tokens,
        page_table.shape[1] * page_size,
        q.stride(),
        k_cache.stride(),
        v_cache.stride(),
        page_table.stride(),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        SUBTILES=subtiles,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        OFFSET=tl.int64 if max(_extent(k_cache), _extent(v_cache)) >= 2**31 else tl.int32,
        SAME_STRIDES=k_cache.stride() == v_cache.stride(),
        IN_E4M3=k_scale is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch,
    )
    combine = tuning.TRITON_COMBINE
    _combine_kernel[(num_tokens, triton.cdiv(num_heads * head_dim, combine.block))](
        out,
        partial_out,
        partial_lse,
        seqlens_k,
        token_row,
        pieces,
        counts,
        num_tokens,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        MAX_PIECES=max(32, triton.next_power_of_2(max_pieces)),
        BLOCK_PIECES=combine.block_pieces,
        BLOCK=combine.block,
        num_warps=combine.num_warps,
        **launch,
    )
    return out
