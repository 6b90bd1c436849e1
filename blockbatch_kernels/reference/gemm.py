"""Products with the weights."""

import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.reference.norm import swiglu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, static_weight: bool = False) -> Tensor:
    return F.linear(x, weight, bias)


def linear_swiglu(x: Tensor, weight: Tensor, *, static_weight: bool = False) -> Tensor:
    return swiglu(F.linear(x, weight))
