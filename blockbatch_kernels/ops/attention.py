"""Attention of packed queries over paged keys and values, and its plan."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.checks import checker
from blockbatch_kernels.ops import dispatch, values
from blockbatch_kernels.structs import AttentionPlan

_check_attention_plan = checker("attention_plan")
_check_varlen_attention = checker("varlen_attention")


def attention_plan(
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    page_size: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    distinct_rows: int | None = None,
    fixed_cut: bool = False,
    num_branches: int | None = None,
    e4m3: bool = False,
    backend: str | None = None,
) -> AttentionPlan:
    """Cuts the attention of a step into work, without a host wait; all layers of the step use the same plan.

    Rows whose pages are the same over a stretch of keys are computed together there. Keys are cut finer while
    there are too few tiles to fill the GPU. `reference/attention_plan.py` fixes the result bit for bit.
    A plan may be used on several streams at once; on the first it is fastest.

    Args:
        page_table: [rows, pages_per_row] int32.
        cu_seqlens_q: [rows + 1] int32.
        seqlens_k: [rows] int32.
        page_size: keys a page.
        num_tokens: packed queries including padding.
        num_heads, num_kv_heads: of the attention; they decide the size of a tile.
        distinct_rows: how many rows with queries are expected to read pages of their own, where those that
            share most of theirs count once; None: all rows. The result of the attention does not depend on
            it, its speed does.
        fixed_cut: no row's keys are cut, whatever else is in the batch. A row's result then has the same bits
            in any batch, where the same backend computes it. Slower for few queries over many keys.
        num_branches: consecutive rows that may share pages, the rows of a request; only they are compared, so
            that the plan takes time linear in the rows. Rows of different requests are attended apart even
            where they do share pages. None: any rows may share.
        e4m3: whether the caches hold e4m3. As with `distinct_rows` the result does not depend on it, its
            speed does.
    """
    tensors = (page_table, cu_seqlens_q, seqlens_k)
    heads = num_heads, num_kv_heads
    options = distinct_rows, fixed_cut, num_branches, e4m3
    _check_attention_plan(*tensors, page_size, num_tokens, *heads, *options)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of {num_heads}, got {num_kv_heads}")
    if values.ENABLED:
        values.check_attention(*tensors, page_size=page_size, num_tokens=num_tokens)
    module = dispatch.module_for(backend, "attention_plan", page_table)
    (rows, pages_per_row), device = page_table.shape, page_table.device
    if distinct_rows is None:
        distinct_rows = rows
    shape = tuning.attention_shape(
        num_tokens,
        *heads,
        page_size,
        pages_per_row,
        tuning.num_processors(device),
        fixed_cut=fixed_cut,
        units=dispatch.is_backend(module, "cuda")
        and not fixed_cut
        and tuning.plans_units(
            *heads, page_size, pages_per_row, distinct_rows, device, num_tokens=num_tokens, e4m3=e4m3
        ),
    )
    if num_branches is not None:
        shape = shape._replace(num_branches=num_branches)
    return module.attention_plan(*tensors, page_size=page_size, num_tokens=num_tokens, shape=shape)


def varlen_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """Non-causal attention of the packed queries of every row over all keys of that row's pages.

    Args:
        q: [tokens, num_heads, head_dim], fp32, bf16 or fp16; tokens may exceed cu_seqlens_q[-1] (padding).
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim]; num_kv_heads divides num_heads.
        page_table: [rows, pages_per_row] int32; page j of a row holds its positions from j * page_size on.
        cu_seqlens_q: [rows + 1] int32, first packed token of each row.
        seqlens_k: [rows] int32, keys of each row.
        softmax_scale: defaults to head_dim ** -0.5.
        plan: `attention_plan` of these very tensors, to be made once for all layers; None makes one here.

    Returns:
        [tokens, num_heads, head_dim]; padding tokens and rows without keys are zero.
    """
    _check_varlen_attention(q, k_cache, v_cache, page_table, cu_seqlens_q, seqlens_k, softmax_scale, plan)
    module, options = ready(
        "varlen_attention",
        q,
        k_cache,
        v_cache,
        page_table,
        cu_seqlens_q,
        seqlens_k,
        softmax_scale=softmax_scale,
        plan=plan,
        backend=backend,
    )
    return module.varlen_attention(q, k_cache, v_cache, page_table, cu_seqlens_q, seqlens_k, **options)


def ready(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    softmax_scale: float | None,
    plan: AttentionPlan | None,
    backend: str | None,
    module_for: Callable[..., ModuleType] | None = None,
    excluded: tuple[str, ...] = (),
) -> tuple[ModuleType, dict[str, Any]]:
    """The module that attends, with the scale and the plan that it takes: for both kinds of caches.

    module_for, excluded: `dispatch.module_for`, or what stands in its place, and its argument.
    """
    where = (page_table, cu_seqlens_q, seqlens_k)
    head_dim = q.shape[2]
    if k_cache.shape[2] < 1 or q.shape[1] % k_cache.shape[2]:
        raise ValueError(
            f"k_cache: expected a number of kv heads that divides {q.shape[1]}, got {k_cache.shape[2]}"
        )
    if plan is not None:
        _check_plan(plan, q, k_cache.shape[2])
    if values.ENABLED:
        values.check_attention(
            *where,
            page_size=k_cache.shape[1],
            num_tokens=q.shape[0],
            num_pages=k_cache.shape[0],
            plan=plan,
        )
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5
    if plan is None:
        rows, pages_per_row = page_table.shape
        heads, page_size = (q.shape[1], k_cache.shape[2]), k_cache.shape[1]
        units = tuning.plans_units(
            *heads,
            page_size,
            pages_per_row,
            rows,
            q.device,
            num_tokens=q.shape[0],
            e4m3=k_cache.dtype == torch.float8_e4m3fn,
        )
    else:
        units = plan.units.shape[0] > 0
    module = (module_for or dispatch.module_for)(
        backend,
        op,
        q,
        excluded=excluded if _cuda_takes(k_cache, v_cache, softmax_scale) else ("cuda",),
        units=int(units),
        num_tokens=q.shape[0],
        num_keys=page_table.shape[1] * k_cache.shape[1],
        head_dim=head_dim,
        element_size=q.element_size(),
    )
    if plan is None and not dispatch.is_backend(module, "reference"):
        plan = attention_plan(
            page_table,
            cu_seqlens_q,
            seqlens_k,
            page_size=k_cache.shape[1],
            num_tokens=q.shape[0],
            num_heads=q.shape[1],
            num_kv_heads=k_cache.shape[2],
            backend=backend,
        )
    return module, dict(softmax_scale=softmax_scale, plan=plan)


def _cuda_takes(k_cache: Tensor, v_cache: Tensor, softmax_scale: float) -> bool:
    """What only the CUDA attention refuses."""
    return k_cache.stride(-1) == 1 and v_cache.stride(-1) == 1 and 0 < softmax_scale < float("inf")


def _check_plan(plan: AttentionPlan, q: Tensor, num_kv_heads: int) -> None:
    heads = (q.shape[1], num_kv_heads)
    if (plan.num_heads, plan.num_kv_heads) != heads:
        raise ValueError(
            "plan: expected one for {} heads and {} kv heads, got one for {} and {}".format(
                *heads, plan.num_heads, plan.num_kv_heads
            )
        )
    if plan.units.shape[0] > 0 and plan.stretches.shape[0] == 0:
        raise ValueError(
            "plan.stretches: expected one for each processor, since the plan has units, got none"
        )
