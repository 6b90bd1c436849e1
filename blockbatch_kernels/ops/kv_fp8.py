"""Keys and values in 8 bits: the cache in e4m3, with a scale for K and one for V of each kv head.

What is stored stands for `stored * scale`. Scales are fixed before the first write, so that neither tokens
beside a token nor tokens before it change what is stored of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.checks import checker
from blockbatch_kernels.ops import dispatch, values
from blockbatch_kernels.ops.attention import ready
from blockbatch_kernels.ops.layer import check_norms
from blockbatch_kernels.structs import AttentionPlan

_check_rope_kv_write_fp8 = checker("rope_kv_write_fp8")
_check_varlen_attention_fp8 = checker("varlen_attention_fp8")


def rope_kv_write_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """`rope_kv_write` into caches in e4m3.

    K after rotation and V are rounded to the dtype of q, as there, then divided by their head's scale in
    fp32, limited to 448, the largest number of e4m3, and rounded to the nearest, ties to even. Infinity and
    NaN become NaN.

    Args:
        q: [tokens, num_heads, head_dim], fp32, bf16 or fp16; *written*: rotated.
        k, v: [tokens, num_kv_heads, head_dim], same dtype.
        positions: [tokens] int32.
        slot_mapping: [tokens] int64, page * page_size + offset; -1: not stored.
        cos, sin: [max positions, head_dim / 2] fp32.
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim] float8_e4m3fn; *written* at the slots, k
            after rotation.
        k_scale, v_scale: [num_kv_heads] fp32, above 0.
        q_norm, k_norm, norm_eps: see `rope_kv_write`.
    """
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache, k_scale, v_scale)
    _check_rope_kv_write_fp8(q, k, v, *where, q_norm, k_norm, norm_eps)
    check_norms(q_norm, k_norm)
    if values.ENABLED:
        values.check_rope(positions, slot_mapping, cos, k_cache)
    module = dispatch.module_for_e4m3(backend, "rope_kv_write_fp8", q)
    module.rope_kv_write_fp8(q, k, v, *where, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps)


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
    softmax_scale: float | None = None,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """`varlen_attention` over caches in e4m3: keys and values are `stored * scale`.

    Queries and weights keep the dtype of q, to which e4m3 is turned without rounding; but CUDA C++ computes
    in halves whatever q is: with three bits more than bf16, and NaN where a query is above 65504. The scale
    of K joins `softmax_scale`, that of V is multiplied in behind the sums, in fp32.

    Args:
        q: [tokens, num_heads, head_dim], fp32, bf16 or fp16; tokens may exceed cu_seqlens_q[-1] (padding).
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim] float8_e4m3fn; num_kv_heads divides
            num_heads.
        k_scale, v_scale: [num_kv_heads] fp32, above 0.
        page_table, cu_seqlens_q, seqlens_k, softmax_scale, plan: see `varlen_attention`.

    Returns:
        [tokens, num_heads, head_dim] in the dtype of q; padding tokens and rows without keys are zero.
    """
    _check_varlen_attention_fp8(
        q, k_cache, v_cache, k_scale, v_scale, page_table, cu_seqlens_q, seqlens_k, softmax_scale, plan
    )
    where = (page_table, cu_seqlens_q, seqlens_k)
    module, options = ready(
        "varlen_attention_fp8",
        q,
        k_cache,
        v_cache,
        *where,
        softmax_scale=softmax_scale,
        plan=plan,
        backend=backend,
        module_for=dispatch.module_for_e4m3,
        excluded=() if _on_tensor_cores(q) else ("cuda",),
    )
    return module.varlen_attention_fp8(q, k_cache, v_cache, k_scale, v_scale, *where, **options)


def _on_tensor_cores(q: Tensor) -> bool:
    """Whether the CUDA version is more than its plain kernel where it could be."""
    if not q.is_cuda or q.dtype == torch.float32:
        return True
    return tuning.device_kind(q.device).capability == (9, 0)
