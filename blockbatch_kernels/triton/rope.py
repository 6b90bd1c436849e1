"""Rotary embedding of q and k, and the write of k and v into the cache."""

import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.triton.e4m3 import stored_in_e4m3
from blockbatch_kernels.triton.launch import on_device_of_first


@triton.jit
def _rotated(pointer, half_offset, cos, sin, inside, norm, column, half, eps, NORMED: tl.constexpr):
    """Both rotated halves of [heads, head_dim / 2] at `pointer`, in the dtype they are stored in."""
    first = tl.load(pointer, mask=inside, other=0.0)
    second = tl.load(pointer + half_offset, mask=inside, other=0.0)
    if NORMED:
        a, b = first.to(tl.float32), second.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / (2 * half) + eps)
        first_weight = tl.load(norm + column, mask=column < half, other=0.0).to(tl.float32)
        second_weight = tl.load(norm + half + column, mask=column < half, other=0.0).to(tl.float32)
        # Rounded before they meet the weight, as the published models do.
        first = ((a * scale).to(first.dtype).to(tl.float32) * first_weight).to(first.dtype)
        second = ((b * scale).to(second.dtype).to(tl.float32) * second_weight).to(second.dtype)
    first_exact, second_exact = first.to(tl.float32), second.to(tl.float32)
    return (
        (first_exact * cos - second_exact * sin).to(first.dtype),
        (second_exact * cos + first_exact * sin).to(first.dtype),
    )


@triton.jit
def _store_halves(cache, target, half_offset, first, second, scale, is_head, inside, IN_E4M3: tl.constexpr):
    """Both halves of [heads, head_dim / 2] into a cache."""
    if IN_E4M3:
        by = tl.load(scale, mask=is_head, other=1.0)
        tl.store(target, stored_in_e4m3(first, by, cache.dtype.element_ty), mask=inside)
        tl.store(target + half_offset, stored_in_e4m3(second, by, cache.dtype.element_ty), mask=inside)
    else:
        tl.store(target, first, mask=inside)
        tl.store(target + half_offset, second, mask=inside)


@triton.jit
def _rope_kv_write_kernel(
    q,  # [tokens, num_heads, head_dim]; written
    k,  # [tokens, num_kv_heads, head_dim]
    v,
    positions,  # [tokens]
    slot_mapping,  # [tokens]
    cos,  # [max positions, head_dim / 2]
    sin,
    k_cache,  # [pages, page_size, num_kv_heads, head_dim]; written
    v_cache,
    q_norm,  # [head_dim], where NORMED
    k_norm,
    norm_eps,
    num_heads,
    num_kv_heads,
    page_size,
    half,
    num_positions,
    num_slots,
    q_strides,
    k_strides,
    v_strides,
    cos_strides,
    sin_strides,
    k_cache_strides,
    v_cache_strides,
    position_stride,
    slot_stride,
    k_scale,  # [num_kv_heads], where IN_E4M3
    v_scale,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORMED: tl.constexpr,
    IN_E4M3: tl.constexpr,  # the caches
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    position = tl.load(positions + token * position_stride).to(tl.int64)
    slot = tl.load(slot_mapping + token * slot_stride)
    in_half = column < half
    # A position without angles gives NaN, a slot outside of the cache is not stored. NaN is no constant of
    # the module: Triton compares those with their value of before at each launch, and NaN is never equal.
    line = position + tl.zeros_like(column)
    in_row = in_half & (line >= 0) & (line < num_positions)
    cosine = tl.load(
        cos + position * cos_strides[0] + column * cos_strides[1], mask=in_row, other=float("nan")
    )
    sine = tl.load(sin + position * sin_strides[0] + column * sin_strides[1], mask=in_row, other=float("nan"))

    inside = (head < num_heads) & in_half
    pointer = q + token * q_strides[0] + head * q_strides[1] + column * q_strides[2]
    first, second = _rotated(
        pointer, half * q_strides[2], cosine, sine, inside, q_norm, column, half, norm_eps, NORMED
    )
    tl.store(pointer, first, mask=inside)
    tl.store(pointer + half * q_strides[2], second, mask=inside)

    if (slot >= 0) & (slot < num_slots):
        inside = (head < num_kv_heads) & in_half
        page, offset = slot // page_size, slot % page_size
        pointer = k + token * k_strides[0] + head * k_strides[1] + column * k_strides[2]
        first, second = _rotated(
            pointer, half * k_strides[2], cosine, sine, inside, k_norm, column, half, norm_eps, NORMED
        )
        target = k_cache + page * k_cache_strides[0] + offset * k_cache_strides[1]
        target += head * k_cache_strides[2] + column * k_cache_strides[3]
        _store_halves(
            k_cache,
            target,
            half * k_cache_strides[3],
            first,
            second,
            k_scale + head,
            head < num_kv_heads,
            inside,
            IN_E4M3,
        )

        pointer = v + token * v_strides[0] + head * v_strides[1] + column * v_strides[2]
        target = v_cache + page * v_cache_strides[0] + offset * v_cache_strides[1]
        target += head * v_cache_strides[2] + column * v_cache_strides[3]
        first = tl.load(pointer, mask=inside, other=0.0)
        second = tl.load(pointer + half * v_strides[2], mask=inside, other=0.0)
        _store_halves(
            v_cache,
            target,
            half * v_cache_strides[3],
            first,
            second,
            v_scale + head,
            head < num_kv_heads,
            inside,
            IN_E4M3,
        )


@on_device_of_first
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache)
    _launch(q, k, v, *where, None, None, q_norm, k_norm, norm_eps)


@on_device_of_first
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
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache)
    _launch(q, k, v, *where, k_scale.contiguous(), v_scale.contiguous(), q_norm, k_norm, norm_eps)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
) -> None:
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, half = k.shape[1], head_dim // 2
    if q.numel() == 0:
        return
    block_half = triton.next_power_of_2(half)
    block_heads = max(1, tuning.TRITON_ROPE.block // block_half)
    _rope_kv_write_kernel[(tokens, triton.cdiv(max(num_heads, num_kv_heads), block_heads))](
        q,
        k,
        v,
        positions,
        slot_mapping,
        cos,
        sin,
        k_cache,
        v_cache,
        q if q_norm is None else q_norm.contiguous(),
        q if k_norm is None else k_norm.contiguous(),
        norm_eps,
        num_heads,
        num_kv_heads,
        k_cache.shape[1],
        half,
        cos.shape[0],
        k_cache.shape[0] * k_cache.shape[1],
        q.stride(),
        k.stride(),
        v.stride(),
        cos.stride(),
        sin.stride(),
        k_cache.stride(),
        v_cache.stride(),
        positions.stride(0),
        slot_mapping.stride(0),
        cos if k_scale is None else k_scale,
        cos if v_scale is None else v_scale,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        NORMED=q_norm is not None,
        IN_E4M3=k_scale is not None,
        num_warps=tuning.TRITON_ROPE.num_warps,
    )
