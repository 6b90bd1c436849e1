"""The same operators by other packages; each function raises ImportError where its package is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k cache, v cache -> out

_PACKAGES = ("flashinfer-python", "tokenspeed-fa3", "liger-kernel")


def versions() -> dict[str, str | None]:
    """Of the packages compared with; None where one is not installed. FlashAttention 2 is torch's."""
    found = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def liger_add_rms_norm(eps: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Liger-Kernel: (x, residual, weight) -> normed, sum."""
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fused_add_rms_norm_forward(x, residual, weight, eps, 0.0, "llama")[:2]

    return run


def liger_swiglu() -> Callable[[Tensor], Tensor]:
    """Liger-Kernel on gate and up in one tensor."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    return lambda gate_up: swiglu_fused_gate_up_forward(gate_up)[1]


def flash_attention_2(gathered: Callable[[Tensor], Tensor], bounds: Tensor, lengths: list[int]) -> Attention:
    """FlashAttention-2 inside torch, which takes no pages: on keys that were gathered beforehand.

    Args:
        gathered: [pages, ...] cache -> [keys of all rows, kv_heads, head_dim], done once for each cache.
        bounds: [rows + 1] int32, first query of each row.
        lengths: keys of each row.
    """
    forward = torch.ops.aten._flash_attention_forward
    kept: dict[int, Tensor] = {}
    key_bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to(bounds.device)
    longest = int((bounds[1:] - bounds[:-1]).max())

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        for cache in (k_cache, v_cache):
            if cache.data_ptr() not in kept:
                kept[cache.data_ptr()] = gathered(cache)
        k, v = kept[k_cache.data_ptr()], kept[v_cache.data_ptr()]
        return forward(q, k, v, bounds, key_bounds, longest, max(lengths), 0.0, False, False)[0]

    return run


def flash_attention_3(page_table: Tensor, bounds: Tensor, lengths: list[int]) -> Attention:
    """FlashAttention-3 on the pages themselves (PyPI: tokenspeed-fa3)."""
    from flash_attn_interface import flash_attn_with_kvcache

    seqlens = torch.tensor(lengths, dtype=torch.int32, device=bounds.device)
    longest = int((bounds[1:] - bounds[:-1]).max())

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            cache_seqlens=seqlens,
            page_table=page_table,
            cu_seqlens_q=bounds,
            max_seqlen_q=longest,
        )

    return run


def flashinfer_attention(
    page_table: Tensor, bounds: Tensor, lengths: list[int], num_heads: int, k_cache: Tensor
) -> Attention:
    """FlashInfer on the pages themselves, planned once; it compiles its kernels at first use."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    page_size, num_kv_heads, head_dim = k_cache.shape[1:]
    pages = [-(-length // page_size) for length in lengths]
    indptr = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0).int()
    indices = torch.cat([row[:count] for row, count in zip(page_table, pages, strict=True)])
    last = torch.tensor([(length - 1) % page_size + 1 for length in lengths], dtype=torch.int32)
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=bounds.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        bounds.cpu(),
        indptr,
        indices,
        last,
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        causal=False,
        q_data_type=k_cache.dtype,
    )
    return lambda q, k_cache, v_cache: wrapper.run(q, (k_cache, v_cache))
