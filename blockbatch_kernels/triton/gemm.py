"""Products with the weights: the matrix library's, which Triton's do not beat, and what comes behind them."""

import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.shapes import split_heads
from blockbatch_kernels.triton.activation import swiglu
from blockbatch_kernels.triton.rope import rope_kv_write


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, static_weight: bool = False) -> Tensor:
    return F.linear(x, weight, bias)


def linear_swiglu(x: Tensor, weight: Tensor, *, static_weight: bool = False) -> Tensor:
    return swiglu(linear(x, weight))


def linear_rope_kv_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *where: Tensor,
    num_heads: int,
    static_weight: bool = False,
) -> Tensor:
    """`where`: what `rope_kv_write` takes behind q, k and v, the caches last."""
    q, k, v = split_heads(linear(x, weight, bias), num_heads, where[-1])
    rope_kv_write(q, k, v, *where)
    return q
