"""The gated activation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.triton.launch import on_device_of_first


@triton.jit
def _swiglu_kernel(
    gate_up,  # [tokens, 2 * intermediate]
    out,  # [tokens, intermediate], contiguous
    intermediate,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < intermediate
    row = gate_up + token * row_stride
    gate = tl.load(row + column * column_stride, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + (column + intermediate) * column_stride, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + token * intermediate + column, value.to(out.dtype.element_ty), mask=inside)


@on_device_of_first
def swiglu(gate_up: Tensor) -> Tensor:
    tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(intermediate), tuning.TRITON_ELEMENTWISE.block)
    _swiglu_kernel[(tokens, triton.cdiv(intermediate, block))](
        gate_up,
        out,
        intermediate,
        gate_up.stride(0),
        gate_up.stride(1),
        BLOCK=block,
        num_warps=tuning.TRITON_ELEMENTWISE.num_warps,
    )
    return out
