"""Rows quantised to e4m3: as they are, behind an RMSNorm, behind the gated activation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.shapes import E4M3, E4M3_MAX, LEAST_AMAX
from blockbatch_kernels.triton import interpreted
from blockbatch_kernels.triton.launch import on_device_of_first, programmatic_launch

_MAX = tl.constexpr(E4M3_MAX)
_LEAST = tl.constexpr(LEAST_AMAX)
# Triton's interpreter rounds to e4m3 wrongly.
_ROUNDS = tl.constexpr(interpreted())


@triton.jit
def _to_e4m3(value, element_type: tl.constexpr):
    """fp32 of at most 448 (a rounding above it counts as such) to e4m3, ties to even; NaN stays NaN."""
    if _ROUNDS:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        normal = rounded.to(tl.float32, bitcast=True)
        small = (value + 24576.0) - 24576.0  # to multiples of 2^-9, below 2^-6
        exact = tl.where(tl.abs(value) < 0.015625, small, normal)
        # The interpreter turns neither subnormal numbers nor NaN into those of e4m3.
        magnitude = tl.abs(exact)
        code = (magnitude.to(tl.int32, bitcast=True) >> 20) - ((127 - 7) << 3)
        code = tl.where(magnitude < 0.015625, (magnitude * 512.0).to(tl.int32), code)
        code = tl.where(value == value, code, 0x7F) | ((bits >> 24) & 0x80)
        return code.to(tl.uint8).to(element_type, bitcast=True)
    else:
        return value.to(element_type)


@triton.jit
def _quantize(value, out, scale, token, column, inside, dim):
    """Stores a row of fp32 values, 0 where not `inside`, and its scale."""
    # As integers, magnitudes are ordered in the same way, with NaN above all.
    bits = tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=0)
    bits = tl.maximum(bits, tl.full([], _LEAST, tl.float32).to(tl.int32, bitcast=True))
    amax = bits.to(tl.float32, bitcast=True)
    largest = tl.full([], _MAX, tl.float32)
    quantised = value * tl.div_rn(largest, amax)
    tl.store(out + token * dim + column, _to_e4m3(quantised, out.dtype.element_ty), mask=inside)
    tl.store(scale + token, tl.div_rn(amax, largest))


@triton.jit
def _quantize_rows_kernel(
    x,  # [tokens, dim]
    out,  # [tokens, dim] e4m3, contiguous
    scale,  # [tokens]
    dim,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    value = tl.load(x + token * row_stride + column * column_stride, mask=inside, other=0.0)
    _quantize(value.to(tl.float32), out, scale, token, column, inside, dim)


@triton.jit
def _rms_norm_fp8_kernel(
    x,  # [tokens, dim]
    weight,  # [dim]
    residual,  # [tokens, dim]; written if HAS_RESIDUAL
    out,  # [tokens, dim] e4m3, contiguous
    scale,  # [tokens]
    eps,
    dim,
    x_row_stride,
    x_column_stride,
    weight_stride,
    residual_row_stride,
    residual_column_stride,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    value = tl.load(x + token * x_row_stride + column * x_column_stride, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        summed = residual + token * residual_row_stride + column * residual_column_stride
        before = tl.load(summed, mask=inside, other=0.0)
        value = (value.to(tl.float32) + before.to(tl.float32)).to(value.dtype)
        tl.store(summed, value, mask=inside)
    exact = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(exact * exact, axis=0) / dim + eps)
    normed = (exact * inverse).to(value.dtype).to(tl.float32)
    factor = tl.load(weight + column * weight_stride, mask=inside, other=0.0).to(tl.float32)
    # The norm is rounded, as it is where it is not quantised.
    rounded = (normed * factor).to(value.dtype).to(tl.float32)
    _quantize(rounded, out, scale, token, column, inside, dim)


@triton.jit
def _swiglu_fp8_kernel(
    gate_up,  # [tokens, 2 * intermediate]
    out,  # [tokens, intermediate] e4m3, contiguous
    scale,  # [tokens]
    intermediate,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < intermediate
    row = gate_up + token * row_stride
    gate = tl.load(row + column * column_stride, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + (column + intermediate) * column_stride, mask=inside, other=0.0).to(tl.float32)
    value = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty).to(tl.float32)
    _quantize(value, out, scale, token, column, inside, intermediate)


def _outputs(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    values = torch.empty(len(x), dim, dtype=E4M3, device=x.device)
    return values, torch.empty(len(x), dtype=torch.float32, device=x.device)


def _options(x: Tensor, dim: int) -> dict:
    block = triton.next_power_of_2(dim)
    return dict(BLOCK=block, num_warps=tuning.triton_row_warps(block), **programmatic_launch(x.device))


@on_device_of_first
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    tokens, dim = x.shape
    values, scale = _outputs(x, dim)
    if tokens:
        _quantize_rows_kernel[(tokens,)](x, values, scale, dim, *x.stride(), **_options(x, dim))
    return values, scale


@on_device_of_first
def rms_norm_fp8(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    tokens, dim = x.shape
    values, scale = _outputs(x, dim)
    summed = x if residual is None else residual
    if tokens:
        _rms_norm_fp8_kernel[(tokens,)](
            x,
            weight,
            summed,
            values,
            scale,
            eps,
            dim,
            *x.stride(),
            weight.stride(0),
            *summed.stride(),
            HAS_RESIDUAL=residual is not None,
            **_options(x, dim),
        )
    return values, scale


@on_device_of_first
def swiglu_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    values, scale = _outputs(gate_up, intermediate)
    if tokens:
        _swiglu_fp8_kernel[(tokens,)](
            gate_up, values, scale, intermediate, *gate_up.stride(), **_options(gate_up, intermediate)
        )
    return values, scale
