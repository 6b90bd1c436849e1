"""Keys and values in e4m3, with a scale for each kv head: the cache write, and attention over them."""

import torch
from torch import Tensor

from blockbatch_kernels.reference.attention import attend, write_heads
from blockbatch_kernels.shapes import E4M3, E4M3_MAX
from blockbatch_kernels.structs import AttentionPlan


def _stored(heads: Tensor, scale: Tensor) -> Tensor:
    """[tokens, num_kv_heads, head_dim] in e4m3; infinity becomes NaN, so that it is noticed later."""
    exact = heads.float() / scale[:, None]
    limited = exact.clamp(-E4M3_MAX, E4M3_MAX).masked_fill(exact.isinf(), float("nan"))
    return limited.to(E4M3)


def _values(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # By a scale that is a power of two nothing is rounded here.
    return (stored.float() * scale[:, None]).to(dtype)


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
) -> None:
    scales = k_scale, v_scale
    write_heads(
        q,
        k,
        v,
        positions,
        slot_mapping,
        cos,
        sin,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        norm_eps,
        lambda heads, side: _stored(heads, scales[side]),
    )


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
    plan: AttentionPlan | None = None,
) -> Tensor:
    """`plan` has no influence here."""
    scales = k_scale, v_scale
    where = (page_table, cu_seqlens_q, seqlens_k)
    return attend(
        q,
        k_cache,
        v_cache,
        *where,
        softmax_scale,
        lambda stored, side: _values(stored, scales[side], q.dtype),
    )
