"""RMSNorm with the residual add in front of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.triton.launch import on_device_of_first


@triton.jit
def _rms_norm_kernel(
    x,  # [tokens, dim]
    weight,  # [dim]
    residual,  # [tokens, dim]; written if HAS_RESIDUAL
    out,  # [tokens, dim], contiguous
    eps,
    dim,
    x_row_stride,
    x_column_stride,
    weight_stride,
    residual_row_stride,
    residual_column_stride,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    value = tl.load(x + token * x_row_stride + column * x_column_stride, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        summed = residual + token * residual_row_stride + column * residual_column_stride
        before = tl.load(summed, mask=inside, other=0.0)
        # Rounded here: the norm sees what the next layer adds to.
        value = (value.to(tl.float32) + before.to(tl.float32)).to(value.dtype)
        tl.store(summed, value, mask=inside)
    exact = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=0) / dim + eps)
    normed = (exact * scale).to(value.dtype).to(tl.float32)
    factor = tl.load(weight + column * weight_stride, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * dim + column, (normed * factor).to(value.dtype), mask=inside)


@on_device_of_first
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor:
    tokens, dim = x.shape
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    summed = x if residual is None else residual
    block = triton.next_power_of_2(dim)
    _rms_norm_kernel[(tokens,)](
        x,
        weight,
        summed,
        out,
        eps,
        dim,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        summed.stride(0),
        summed.stride(1),
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=tuning.triton_row_warps(block),
    )
    return out
