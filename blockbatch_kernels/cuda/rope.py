"""Rotary embedding with the cache write."""

import torch

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension


def last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def heads_view(tensor: torch.Tensor) -> tuple[int, int, int]:
    """What the extension takes for [tokens, heads, head_dim]."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def cache_view(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """What the extension takes for [pages, page_size, num_kv_heads, head_dim]."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)


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
) -> None:
    """Rotates `q` in place and `k` on its way into the cache, on the current stream.

    `q` [num_tokens, num_heads, head_dim] (*written*), `k` and `v` [num_tokens, num_kv_heads, head_dim] and
    the caches [num_pages, page_size, num_kv_heads, head_dim] (*written*) may be views with any strides but
    the last, which is 1 for what is written. Accesses move 16 bytes where all addresses and strides allow it
    and half a head is whole such vectors. A position without a row in `cos` and `sin` gives NaN, a slot
    outside of the cache is not stored: neither can be reported without waiting for the device.

    Raises ValueError for an odd head_dim, a `q` or cache whose last stride is not 1, or 2^31 slots and more.
    """
    num_tokens, num_heads, head_dim = q.shape
    if head_dim % 2:
        raise ValueError(f"q: expected an even head_dim, got {head_dim}")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected last stride 1, got strides {tensor.stride()}")
    k, v, cos, sin = (last_contiguous(tensor) for tensor in (k, v, cos, sin))
    positions, slot_mapping = positions.contiguous(), slot_mapping.contiguous()
    extension.load().rope_kv_write(
        q=heads_view(q),
        k=heads_view(k),
        v=heads_view(v),
        k_cache=cache_view(k_cache),
        v_cache=cache_view(v_cache),
        positions=positions.data_ptr(),
        slots=slot_mapping.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        cos_row_stride=cos.stride(0),
        sin_row_stride=sin.stride(0),
        num_tokens=num_tokens,
        num_positions=cos.shape[0],
        num_pages=k_cache.shape[0],
        page_size=k_cache.shape[1],
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        head_dim=head_dim,
        dtype=extension.DTYPE_CODES[q.dtype],
        programmatic=tuning.PROGRAMMATIC_LAUNCH,
        device=q.device.index,
        stream=extension.stream_of(q),
    )
