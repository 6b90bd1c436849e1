"""Products with the weights, for packs of few tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels import reference, tuning
from blockbatch_kernels.cuda import extension


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, static_weight: bool = False) -> Tensor:
    """`x @ weight.T + bias` with sums in fp32, rounded once, on the current stream.

    `x` [tokens, in], `weight` [out, in] and `bias` [out] are CUDA tensors of one dtype and one device. Packs and
    weights that `tuning.linear_tile` has a tile for go through the extension's kernel, whose result for a token
    does not depend on the other tokens; all others, and other GPUs than sm_90, through torch. With
    `static_weight` nobody writes `weight` in work that may still run: its first tiles are then read before the
    kernels in front are done.
    """
    tile = _tile(x, weight, weight.shape[0], gated=False)
    if tile is None:
        return F.linear(x, weight, bias)
    return _gemm(x, weight, bias, tile, static_weight)


def linear_swiglu(x: Tensor, weight: Tensor, *, static_weight: bool = False) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)` for `weight` [2 * out, in], gate over up; rounded once. See `linear`."""
    tile = _tile(x, weight, weight.shape[0] // 2, gated=True)
    if tile is None:
        return reference.linear_swiglu(x, weight)
    return _gemm(x, weight, None, tile, static_weight)
