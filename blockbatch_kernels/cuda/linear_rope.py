"""The product of q, k and v with rotary embedding and cache write behind it."""

from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.gemm import aligned, linear, parts_of
from blockbatch_kernels.cuda.rope import last_contiguous, rope_kv_write
from blockbatch_kernels.shapes import split_heads


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
    *,
    num_heads: int,
    static_weight: bool = False,
) -> Tensor:
    """`linear`, then `rope_kv_write` on the heads of its product: q first, then those of k and of v.

    The caches are *written*. One launch, with the same bits and without reading the product back, where that
    has one by a tile of `tuning.ROTATED_TILES`, heads have a multiple of 64 elements, and caches, cos and sin
    are aligned to 16 bytes. Elsewhere the two, and q [tokens, num_heads, head_dim] is a view of the product.
    """
    parts = parts_of(x, weight, weight.shape[0], gated=False)
    cos, sin = last_contiguous(cos), last_contiguous(sin)
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache)
    if (
        len(parts) == 1
        and parts[0].tile in tuning.ROTATED_TILES
        and k_cache.shape[3] % 64 == 0
        and all(_is_aligned(tensor) for tensor in (k_cache, v_cache, cos, sin))
    ):
        return _launch(
            x, weight, bias, *where, num_heads=num_heads, tile=parts[0].tile, static_weight=static_weight
        )
    q, k, v = split_heads(linear(x, weight, bias, static_weight=static_weight), num_heads, k_cache)
    rope_kv_write(q, k, v, *where)
    return q


def _is_aligned(tensor: Tensor) -> bool:
    """Whether vectors of 16 bytes lie at whole multiples of 16 bytes; the last stride must be 1."""
    vector = 16 // tensor.element_size()
    strides = tensor.stride()
    return tensor.data_ptr() % 16 == 0 and strides[-1] == 1 and all(s % vector == 0 for s in strides[:-1])


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *where: Tensor,
    num_heads: int,
    tile: tuning.LinearTile,
    static_weight: bool,
) -> Tensor:
    positions, slot_mapping, cos, sin, k_cache, v_cache = where
    x = aligned(x)
    q = x.new_empty(x.shape[0], num_heads, k_cache.shape[3])
    extension.load().linear_rope_kv_write(
        x=x,
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
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
