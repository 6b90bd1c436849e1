"""The product of q, k and v with rotary embedding and cache write behind it."""

import torch
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension, gemm_fp8
from blockbatch_kernels.cuda.gemm import aligned, linear, parts_of
from blockbatch_kernels.cuda.rope import last_contiguous, rope_kv_write, rope_kv_write_fp8
from blockbatch_kernels.shapes import rotate_heads


def linear_rope_kv_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    num_heads: int,
    static_weight: bool = False,
) -> Tensor:
    """`linear`, then `rope_kv_write` on the heads of its product: q first, then those of k and of v.

    The caches are *written*; with scales they are in e4m3, by `rope_kv_write_fp8`. One launch, with the same
    bits and without reading the product back, where that has one by a tile of `tuning.ROTATED_TILES`, heads
    have a multiple of 64 elements, and caches, cos and sin are aligned to 16 bytes. Elsewhere the two, and q
    [tokens, num_heads, head_dim] is a view of the product.
    """
    parts = parts_of(x, weight, weight.shape[0], gated=False)
    cos, sin = last_contiguous(cos), last_contiguous(sin)
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache, k_scale, v_scale)
    if (
        len(parts) == 1
        and parts[0].tile in tuning.ROTATED_TILES
        and _writes_vectors(cos, sin, k_cache, v_cache)
    ):
        return _launch(
            x, weight, bias, *where, num_heads=num_heads, tile=parts[0].tile, static_weight=static_weight
        )
    product = linear(x, weight, bias, static_weight=static_weight)
    return rotate_heads(product, num_heads, where, rope_kv_write, rope_kv_write_fp8)


def linear_rope_kv_write_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    num_heads: int,
    out_dtype: torch.dtype,
    static_weight: bool = False,
) -> Tensor:
    """The same of `linear_fp8`, in one launch where `tuning.rotated_fp8_tile` has one for its tile."""
    product = (x, x_scale, weight, weight_scale, bias)
    tile = gemm_fp8.tile_of(x, weight, out_dtype)
    if tile is not None:
        kind = tuning.device_kind(x.device)
        tile = tuning.rotated_fp8_tile(tile, len(x), len(weight), device_kind=kind)
    cos, sin = last_contiguous(cos), last_contiguous(sin)
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache, k_scale, v_scale)
    if tile is not None and _writes_vectors(cos, sin, k_cache, v_cache):
        options = dict(out_dtype=out_dtype, static_weight=static_weight)
        return _launch_fp8(*product, *where, num_heads=num_heads, tile=tile, **options)
    product = gemm_fp8.linear_fp8(*product, out_dtype=out_dtype, static_weight=static_weight)
    return rotate_heads(product, num_heads, where, rope_kv_write, rope_kv_write_fp8)


def _writes_vectors(cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernels that write behind a product can: heads of whole tiles, vectors of 16 bytes."""
    if k_cache.shape[3] % 64:
        return False
    return _is_aligned(k_cache) and _is_aligned(v_cache) and _is_aligned(cos) and _is_aligned(sin)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether vectors of 16 bytes lie at whole multiples of 16 bytes; the last stride must be 1."""
    *outer, last = tensor.stride()
    if last != 1 or tensor.data_ptr() % 16:
        return False
    vector = 16 // tensor.element_size()
    for stride in outer:  # no comprehension: every layer asks
        if stride % vector:
            return False
    return True


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    num_heads: int,
    tile: tuning.LinearTile,
    static_weight: bool,
) -> Tensor:
    x = aligned(x)
    q = x.new_empty(x.shape[0], num_heads, k_cache.shape[3])
    if k_scale is not None:
        k_cache, v_cache, k_scale, v_scale = _in_bytes(k_cache, v_cache, k_scale, v_scale)
    extension.load().linear_rope_kv_write(
        x=x,
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=k_scale,
        v_scale=v_scale,
        positions=positions.contiguous(),
        slot_mapping=slot_mapping.contiguous(),
        cos=cos,
        sin=sin,
        tile=tile,
        static_weight=static_weight,
        programmatic=tuning.PROGRAMMATIC_LAUNCH,
        stream=extension.stream_of(x),
    )
    return q


def _launch_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    num_heads: int,
    out_dtype: torch.dtype,
    tile: tuning.Fp8Tile,
    static_weight: bool,
) -> Tensor:
    x = gemm_fp8.aligned(x)
    q = torch.empty(len(x), num_heads, k_cache.shape[3], dtype=out_dtype, device=x.device)
    if k_scale is not None:
        k_cache, v_cache, k_scale, v_scale = _in_bytes(k_cache, v_cache, k_scale, v_scale)
    extension.load().linear_rope_kv_write_fp8(
        x=x.view(torch.uint8),
        x_scale=x_scale.contiguous(),
        weight=weight.view(torch.uint8),
        weight_scale=weight_scale.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=k_scale,
        v_scale=v_scale,
        positions=positions.contiguous(),
        slot_mapping=slot_mapping.contiguous(),
        cos=cos,
        sin=sin,
        tile=tile,
        static_weight=static_weight,
        programmatic=tuning.PROGRAMMATIC_LAUNCH,
        stream=extension.stream_of(x),
    )
    return q


def _in_bytes(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Caches in e4m3 and their scales as the extension takes them."""
    return k_cache.view(torch.uint8), v_cache.view(torch.uint8), k_scale.contiguous(), v_scale.contiguous()
