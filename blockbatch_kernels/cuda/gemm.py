"""Products with the weights, for packs of few tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.activation import swiglu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, static_weight: bool = False) -> Tensor:
    """`x @ weight.T + bias` with sums in fp32, rounded once, on the current stream.

    `x` [tokens, in], `weight` [out, in] and `bias` [out] are CUDA tensors of one dtype and one device. What
    `tuning.linear_parts` has tiles for runs on the extension's kernel where that exists (sm_90; fp16 or bf16;
    rows aligned to 16 bytes): there the result of a token does not depend on the others. Everything else goes
    to torch. With `static_weight` nobody writes `weight` in work that may still run: its first tiles are read
    before the kernels in front are done.
    """
    parts = parts_of(x, weight, weight.shape[0], gated=False)
    if not parts:
        return F.linear(x, weight, bias)
    return _gemm(x, weight, bias, parts, gated=False, static_weight=static_weight)


def linear_swiglu(x: Tensor, weight: Tensor, *, static_weight: bool = False) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)` in fp32, rounded once, for `weight` [2 * out, in], gate over up.

    Where it runs and what `static_weight` says: see `linear`. Through torch the product is rounded first.
    """
    parts = parts_of(x, weight, weight.shape[0] // 2, gated=True)
    if not parts:
        return swiglu(F.linear(x, weight))
    return _gemm(x, weight, None, parts, gated=True, static_weight=static_weight)


def kernel_exists(device_index: int) -> bool:
    """Whether the device and the extension's build have the products of sm_90."""
    return extension.code_for(device_index) == "sm90a"


def parts_of(x: Tensor, weight: Tensor, out_features: int, *, gated: bool) -> tuple[tuning.LinearPart, ...]:
    """The launches of the extension's kernel for this product; none: torch computes it."""
    kind = tuning.device_kind(x.device)
    parts = tuning.linear_parts(x.shape[0], out_features, x.shape[1], gated=gated, device_kind=kind)
    if not parts or x.dtype == torch.float32 or not is_aligned(weight) or not kernel_exists(x.device.index):
        return ()
    return parts


def is_aligned(tensor: Tensor) -> bool:
    """Whether the copy engine can read the rows of a matrix where they are."""
    row = tensor.stride(0)
    return tensor.stride(1) == 1 and row >= tensor.shape[1] and row % 8 == 0 and tensor.data_ptr() % 16 == 0


def aligned(x: Tensor) -> Tensor:
    """`x` [tokens, in], or a copy that the copy engine can read."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: tuple[tuning.LinearPart, ...],
    *,
    gated: bool,
    static_weight: bool,
) -> Tensor:
    x = aligned(x)
    if bias is not None:
        bias = bias.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])
    first = 0
    for features, tile in parts:
        extension.load().gemm(
            x=x,
            weight=weight,
            bias=bias,
            out=out,
            first=first,
            features=features,
            tile=tile,
            gated=gated,
            static_weight=static_weight,
            programmatic=tuning.PROGRAMMATIC_LAUNCH,
            stream=extension.stream_of(x),
        )
        first += features
    return out
