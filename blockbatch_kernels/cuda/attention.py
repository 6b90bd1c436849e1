"""Attention of packed queries over paged keys, and the plan that cuts it into work."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.structs import AttentionPlan
from blockbatch_kernels.tuning import STRETCH_INTEGERS, UNIT_INTEGERS, AttentionShape


def _dense(x: Tensor) -> Tensor:
    """`x` with a last stride of 1."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def _packed(x: Tensor) -> Tensor:
    """`x` contiguous and aligned to 16 bytes."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def attention_plan(
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    page_size: int,
    num_tokens: int,
    shape: AttentionShape,
) -> AttentionPlan:
    """The plan of `reference.attention_plan`, bit for bit; CPU tensors are planned there by the same code."""
    rows, pages_per_row = page_table.shape
    page_table, cu_seqlens_q, seqlens_k = _dense(page_table), _dense(cu_seqlens_q), _dense(seqlens_k)
    max_tiles = shape.max_tiles + shape.max_pieces * rows
    max_units = shape.max_units(num_tokens, rows, page_size)
    compiled = extension.load()
    sizes = (
        4 * max_tiles,
        UNIT_INTEGERS * max_units,
        STRETCH_INTEGERS * shape.processors,
        shape.max_pieces * num_tokens,
        2 * shape.max_pieces,
        num_tokens,
        2,
        2 * shape.processors,
        compiled.attention_plan_workspace(
            rows, shape.max_segments, shape.max_pieces, num_tokens, shape.block_tokens
        ),
    )
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=page_table.device)
    tiles, units, stretches, query_order, pieces, token_row, counts, arrivals, workspace = buffer.split(sizes)
    on_gpu = page_table.is_cuda
    compiled.attention_plan(
        page_table=page_table.data_ptr(),
        cu_seqlens_q=cu_seqlens_q.data_ptr(),
        seqlens_k=seqlens_k.data_ptr(),
        tiles=tiles.data_ptr(),
        query_order=query_order.data_ptr(),
        pieces=pieces.data_ptr(),
        token_row=token_row.data_ptr(),
        counts=counts.data_ptr(),
        units=units.data_ptr(),
        stretches=stretches.data_ptr(),
        arrivals=arrivals.data_ptr(),
        workspace=workspace.data_ptr(),
        page_table_stride=page_table.stride(0),
        num_rows=rows,
        pages_per_row=pages_per_row,
        page_size=page_size,
        num_tokens=num_tokens,
        tile_tokens=shape.tile_tokens,
        segment_pages=shape.segment_pages,
        max_segments=shape.max_segments,
        max_pieces=shape.max_pieces,
        max_tiles=max_tiles,
        target_tiles=shape.target_tiles,
        min_segments=shape.min_segments,
        block_tokens=shape.block_tokens,
        processors=shape.processors,
        max_units=max_units,
        num_kv_heads=shape.num_kv_heads,
        max_slack=shape.max_slack,
        device=page_table.device.index if on_gpu else -1,
        stream=extension.stream_of(page_table) if on_gpu else 0,
    )
    return AttentionPlan(
        tiles.view(max_tiles, 4),
        query_order.view(shape.max_pieces, num_tokens),
        pieces.view(shape.max_pieces, 2),
        token_row,
        counts,
        units.view(max_units, UNIT_INTEGERS),
        stretches.view(shape.processors, STRETCH_INTEGERS),
        arrivals,
        shape.tile_tokens,
        shape.num_heads,
        shape.num_kv_heads,
    )


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
    """Attention on the current stream; the caches may have any strides but the last, which must be 1.

    bf16 and fp16 with a head_dim of 64 or 128 run on the tensor cores when q is aligned to 4 bytes and the
    caches to 16; everything else, up to a head_dim of 256, in fp32 arithmetic.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            raise ValueError(f"{name}: expected a last stride of 1, got {cache.stride(-1)}")
    num_tokens, num_heads, head_dim = q.shape
    if head_dim > tuning.MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head_dim of at most {tuning.MAX_HEAD_DIM}, got {head_dim}")
    page_size, num_kv_heads = k_cache.shape[1:3]
    q, page_table, seqlens_k = _dense(q), _dense(page_table), _dense(seqlens_k)
    tiles, units, stretches = _packed(plan.tiles), _packed(plan.units), _packed(plan.stretches)
    query_order, pieces, token_row, counts = (tensor.contiguous() for tensor in plan[1:5])
    arrivals = plan.arrivals.contiguous()
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    max_pieces = plan.pieces.shape[0]
    num_partials = max_pieces * num_tokens * num_heads if max_pieces > 1 else 0
    num_processors = stretches.shape[0]
    compiled, dtype = extension.load(), extension.DTYPE_CODES[q.dtype]
    # Which kernel runs is decided there.
    num_floats = max(
        num_partials * (head_dim + 1), compiled.attention_even_partials(num_processors, head_dim, dtype)
    )
    partials = torch.empty(num_floats, dtype=torch.float32, device=q.device)
    compiled.varlen_attention(
        q=q.data_ptr(),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        out=out.data_ptr(),
        partial_out=partials.data_ptr(),
        partial_lse=partials[num_partials * head_dim :].data_ptr(),
        page_table=page_table.data_ptr(),
        seqlens_k=seqlens_k.data_ptr(),
        tiles=tiles.data_ptr(),
        query_order=query_order.data_ptr(),
        pieces=pieces.data_ptr(),
        token_row=token_row.data_ptr(),
        counts=counts.data_ptr(),
        units=units.data_ptr(),
        stretches=stretches.data_ptr(),
        arrivals=arrivals.data_ptr(),
        page_table_stride=page_table.stride(0),
        q_strides=q.stride()[:2],
        k_strides=k_cache.stride()[:3],
        v_strides=v_cache.stride()[:3],
        num_rows=page_table.shape[0],
        num_pages=k_cache.shape[0],
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        pages_per_row=page_table.shape[1],
        tile_tokens=plan.tile_tokens,
        max_tiles=plan.tiles.shape[0],
        max_pieces=max_pieces,
        max_units=units.shape[0],
        num_processors=num_processors,
        softmax_scale=softmax_scale,
        dtype=dtype,
        programmatic=tuning.PROGRAMMATIC_LAUNCH,
        device=q.device.index,
        stream=extension.stream_of(q),
    )
    return out
