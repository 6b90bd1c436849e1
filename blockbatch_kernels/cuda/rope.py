"""Rotary embedding with the cache write."""

import torch

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension


def last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rope_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """Norms each head of q and k where asked, rotates `q` in place and `k` on its way into the cache.

    `q` [num_tokens, num_heads, head_dim] (*written*), `k` and `v` [num_tokens, num_kv_heads, head_dim] and
    the caches [num_pages, page_size, num_kv_heads, head_dim] (*written*) may be views with any strides but
    the last, which is 1 for what is written. Accesses move 16 bytes where all addresses and strides allow it
    and half a head is whole such vectors. A position without a row in `cos` and `sin` gives NaN, a slot
    outside of the cache is not stored: neither can be reported without waiting for the device.

    Raises ValueError for an odd head_dim, a `q` or cache whose last stride is not 1, or 2^31 slots and more.
    """
    norms = q_norm, k_norm, norm_eps
    _rotate_and_write(q, k, v, positions, slot_mapping, cos, sin, k_cache, v_cache, None, None, *norms)


def rope_kv_write_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """As `rope_kv_write`, into caches in e4m3 by the scales [num_kv_heads] fp32."""
    caches = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    scales = k_scale.contiguous(), v_scale.contiguous()
    norms = q_norm, k_norm, norm_eps
    _rotate_and_write(q, k, v, positions, slot_mapping, cos, sin, *caches, *scales, *norms)


def _rotate_and_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
) -> None:
    if q.shape[2] % 2:
        raise ValueError(f"q: expected an even head_dim, got {q.shape[2]}")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected last stride 1, got strides {tensor.stride()}")
    k, v, cos, sin = (last_contiguous(tensor) for tensor in (k, v, cos, sin))
    extension.load().rope_kv_write(
        q=q,
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=k_scale,
        v_scale=v_scale,
        positions=positions.contiguous(),
        slot_mapping=slot_mapping.contiguous(),
        cos=cos,
        sin=sin,
        q_norm=q_norm if q_norm is None else q_norm.contiguous(),
        k_norm=k_norm if k_norm is None else k_norm.contiguous(),
        norm_eps=norm_eps,
        programmatic=tuning.PROGRAMMATIC_LAUNCH,
        stream=extension.stream_of(q),
    )
