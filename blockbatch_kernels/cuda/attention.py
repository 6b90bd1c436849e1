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


def _home_of(plan: AttentionPlan, stream: int) -> int:
    """The stream that the plan's `arrivals` serve: the first that attended with it."""
    # One step, so that two threads agree.
    return vars(plan.arrivals).setdefault("blockbatch_stream", stream)


def _arrivals_of(plan: AttentionPlan, stream: int) -> Tensor:
    """Where the processors of one call tell each other what is there: zeros, which the call leaves as zeros.

    Calls on one stream follow each other and share the plan's. On another stream a call may run at the same
    time: it gets its own, and keeps the plan's memory from being given away while it reads it.
    """
    if _home_of(plan, stream) == stream:
        return plan.arrivals.contiguous()
    current = torch.cuda.current_stream(plan.arrivals.device)
    for tensor in plan[:8]:
        tensor.record_stream(current)
    return torch.zeros_like(plan.arrivals, memory_format=torch.contiguous_format)


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
    # What kernels read in vectors of 16 bytes comes first: records of four integers, then the units.
    sizes = (
        4 * max_tiles,
        STRETCH_INTEGERS * shape.processors,
        UNIT_INTEGERS * max_units,
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
    tiles, stretches, units, query_order, pieces, token_row, counts, arrivals, workspace = buffer.split(sizes)
    plan = AttentionPlan(
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
    compiled.attention_plan(
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        seqlens_k=seqlens_k,
        plan=plan,
        workspace=workspace,
        shape=shape,
        page_size=page_size,
        num_tokens=num_tokens,
        stream=extension.stream_of(page_table),
    )
    return plan


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
    return _attend(q, k_cache, v_cache, None, None, page_table, seqlens_k, softmax_scale, plan)


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
    """As `varlen_attention`, on the same kernels, which turn e4m3 into the dtype of q on its way to them."""
    caches = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    scales = k_scale.contiguous(), v_scale.contiguous()
    return _attend(q, *caches, *scales, page_table, seqlens_k, softmax_scale, plan)


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
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            raise ValueError(f"{name}: expected a last stride of 1, got {cache.stride(-1)}")
    num_tokens, num_heads, head_dim = q.shape
    if head_dim > tuning.MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head_dim of at most {tuning.MAX_HEAD_DIM}, got {head_dim}")
    q, page_table, seqlens_k = _dense(q), _dense(page_table), _dense(seqlens_k)
    tiles, units, stretches = _packed(plan.tiles), _packed(plan.units), _packed(plan.stretches)
    query_order, pieces, token_row, counts = (tensor.contiguous() for tensor in plan[1:5])
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    stream = extension.stream_of(q)
    compiled = extension.load()
    num_partials = compiled.attention_partials(q=q, pieces=pieces, stretches=stretches)
    compiled.varlen_attention(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
        partials=torch.empty(num_partials, dtype=torch.float32, device=q.device),
        page_table=page_table,
        seqlens_k=seqlens_k,
        tiles=tiles,
        query_order=query_order,
        pieces=pieces,
        token_row=token_row,
        counts=counts,
        units=units,
        stretches=stretches,
        arrivals=_arrivals_of(plan, stream),
        tile_tokens=plan.tile_tokens,
        softmax_scale=softmax_scale,
        programmatic=tuning.PROGRAMMATIC_LAUNCH,
        stream=stream,
    )
    return out
