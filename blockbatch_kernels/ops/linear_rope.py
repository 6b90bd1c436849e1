"""The product of q, k and v in 8 bits with rotary embedding and cache write behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.checks import checker
from blockbatch_kernels.ops import dispatch, values
from blockbatch_kernels.ops.layer import check_cache_dtype, check_heads
from blockbatch_kernels.ops.quantized import check_out_dtype

_check_linear_rope_kv_write_fp8 = checker("linear_rope_kv_write_fp8")


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
    backend: str | None = None,
) -> Tensor:
    """`linear_rope_kv_write` of rows in e4m3: `linear_fp8`, then `rope_kv_write`; returns q.

    With `k_scale` and `v_scale` it is `rope_kv_write_fp8`, into caches in e4m3: weights and caches are
    quantised independently of each other. The results are those of the two operators bit for bit: the product
    is rounded to `out_dtype` before the rotation. Where the kernel of our own serves the sizes (see
    `linear_fp8`; heads of a multiple of 64 elements), all happens in one launch; elsewhere it is the two
    operators.

    Args:
        x: [tokens, in] float8_e4m3fn.
        x_scale: [tokens] fp32.
        weight: [(num_heads + 2 * num_kv_heads) * head_dim, in] float8_e4m3fn, the rows of q first, then of k,
            then of v.
        weight_scale: [(num_heads + 2 * num_kv_heads) * head_dim] fp32.
        bias: [(num_heads + 2 * num_kv_heads) * head_dim], in `out_dtype`; None: none.
        positions: [tokens] int32.
        slot_mapping: [tokens] int64, page * page_size + offset; -1: not stored.
        cos, sin: [max positions, head_dim / 2] fp32.
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim], in `out_dtype`, with scales
            float8_e4m3fn; *written* at the slots, k after rotation.
        k_scale, v_scale: [num_kv_heads] fp32, above 0, or both None.
        num_heads: of q.
        out_dtype: of q: float32, bfloat16 or float16.
        static_weight: see `linear_fp8`.

    Returns:
        [tokens, num_heads, head_dim] in `out_dtype`, q after rotation; may be a view of the whole product.
    """
    product = (x, x_scale, weight, weight_scale, bias)
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache, k_scale, v_scale)
    _check_linear_rope_kv_write_fp8(*product, *where, num_heads, out_dtype, static_weight)
    check_out_dtype(out_dtype, bias)
    check_heads(weight, num_heads, k_cache)
    check_cache_dtype(out_dtype, k_cache, k_scale, v_scale)
    if values.ENABLED:
        values.check_rope(positions, slot_mapping, cos, k_cache)
    module = dispatch.module_for_e4m3(backend, "linear_rope_kv_write_fp8", x)
    return module.linear_rope_kv_write_fp8(
        *product, *where, num_heads=num_heads, out_dtype=out_dtype, static_weight=static_weight
    )
