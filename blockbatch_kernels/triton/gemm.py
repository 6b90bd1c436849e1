"""Products with the weights: the matrix library's, which Triton's do not beat, and the activation behind."""

from torch import Tensor

from blockbatch_kernels.reference.gemm import linear
from blockbatch_kernels.triton.activation import swiglu

__all__ = ["linear", "linear_swiglu"]


def linear_swiglu(x: Tensor, weight: Tensor, *, static_weight: bool = False) -> Tensor:
    return swiglu(linear(x, weight))
