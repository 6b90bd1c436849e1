"""Products with the weights: the matrix library's, which Triton's do not beat, and what comes behind them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.shapes import split_heads
from blockbatch_kernels.triton.activation import swiglu
from blockbatch_kernels.triton.gemm_fp8 import linear_fp8
from blockbatch_kernels.triton.rope import rope_kv_write, rope_kv_write_fp8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, static_weight: bool = False) -> Tensor:
    return F.linear(x, weight, bias)


def linear_swiglu(x: Tensor, weight: Tensor, *, static_weight: bool = False) -> Tensor:
    return swiglu(linear(x, weight))


def linear_rope_kv_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *where: Tensor | None,
    num_heads: int,
    static_weight: bool = False,
) -> Tensor:
    return _write(linear(x, weight, bias), num_heads, *where)


def linear_rope_kv_write_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *where: Tensor | None,
    num_heads: int,
    out_dtype: torch.dtype,
    static_weight: bool = False,
) -> Tensor:
    product = linear_fp8(x, x_scale, weight, weight_scale, bias, out_dtype=out_dtype)
    return _write(product, num_heads, *where)


def _write(
    product: Tensor,
    num_heads: int,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Rotates and stores the heads of a product; those of q."""
    q, k, v = split_heads(product, num_heads, k_cache)
    where = (positions, slot_mapping, cos, sin, k_cache, v_cache)
    if k_scale is None:
        rope_kv_write(q, k, v, *where)
    else:
        rope_kv_write_fp8(q, k, v, *where, k_scale, v_scale)
    return q
