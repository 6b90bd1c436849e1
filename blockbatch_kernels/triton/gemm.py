"""Products with the weights: the matrix library's, which Triton's do not beat, and what comes behind them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.shapes import rotate_heads
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
    return rotate_heads(linear(x, weight, bias), num_heads, where, rope_kv_write, rope_kv_write_fp8)


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
    return rotate_heads(product, num_heads, where, rope_kv_write, rope_kv_write_fp8)
