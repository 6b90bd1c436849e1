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
    q, k, v = split_heads(linear(x, weight, bias), num_heads, k_cache)
    rope_kv_write(q, k, v, positions, slot_mapping, cos, sin, k_cache, v_cache)
    return q
