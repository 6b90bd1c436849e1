"""Rows quantised to e4m3, what produces them, and products of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.reference.norm import rms_norm, swiglu
from blockbatch_kernels.shapes import E4M3, E4M3_MAX, LEAST_AMAX


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    exact = x.float()
    amax = exact.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_AMAX)
    # A tensor: with a number torch multiplies by a reciprocal, which rounds twice.
    largest = torch.full_like(amax, E4M3_MAX)
    # One division a row: what is multiplied by its result is at most a rounding above the largest of e4m3.
    return (exact * (largest / amax)).to(E4M3), (amax / largest).squeeze(-1)


def rms_norm_fp8(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return quantize_rows(rms_norm(x, weight, eps=eps, residual=residual))


def swiglu_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(swiglu(gate_up))


def linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    static_weight: bool = False,
) -> Tensor:
    exact = x.float()
    out = x.new_empty(len(x), len(weight), dtype=out_dtype)
    rows = max(1, tuning.FP8_PIECE // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        piece = slice(start, start + rows)
        total = F.linear(exact, weight[piece].float()) * x_scale[:, None] * weight_scale[piece]
        out[:, piece] = total if bias is None else total + bias[piece].float()
    return out


def linear_swiglu_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out_dtype: torch.dtype,
    static_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    return swiglu_fp8(linear_fp8(x, x_scale, weight, weight_scale, out_dtype=out_dtype))
