"""Products with the weights: the matrix library's, which Triton's do not beat, and what comes behind them."""

from torch import Tensor

from blockbatch_kernels.reference.gemm import linear, split_heads
from blockbatch_kernels.triton.activation import swiglu
from blockbatch_kernels.triton.rope import rope_kv_write

__all__ = ["linear", "linear_rope_kv_write", "linear_swiglu"]


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
