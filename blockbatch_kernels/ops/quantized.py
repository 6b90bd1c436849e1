"""Products in 8 bits: rows of activations and weights in e4m3, each with a scale in fp32.

The format is that of arXiv 2209.05433; a scale for each token and for each row of a weight, as in
arXiv 2208.07339, makes a row's largest magnitude 448, the largest of e4m3. No scale depends on another row,
so that a token's result does not depend on the tokens beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.checks import checker
from blockbatch_kernels.ops import dispatch

_check_quantize_rows = checker("quantize_rows")
_check_rms_norm_fp8 = checker("rms_norm_fp8")
_check_swiglu_fp8 = checker("swiglu_fp8")
_check_linear_fp8 = checker("linear_fp8")
_check_linear_swiglu_fp8 = checker("linear_swiglu_fp8")

_module_for = dispatch.module_for_e4m3
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Each row in e4m3, with the scale that gives it back: `x` is about `values * scale[:, None]`.

    In fp32: `scale = amax(abs(x)) / 448`, `values = x * (448 / amax)` rounded to the nearest, ties to even.
    The largest magnitude counts as at least 1e-30. A row that holds NaN or infinity gives NaN behind a
    product.

    Args:
        x: [rows, dim], fp32, bf16 or fp16; at least one column.

    Returns:
        values [rows, dim] float8_e4m3fn, scale [rows] fp32.
    """
    _check_quantize_rows(x)
    _check_columns("x", x.shape[1])
    return _module_for(backend, "quantize_rows", x).quantize_rows(x)


def rms_norm_fp8(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows(rms_norm(...))` in one: the norm is rounded to the dtype of `x` before it is quantised.

    Args:
        x: [tokens, dim], fp32, bf16 or fp16; at least one column.
        weight: [dim], same dtype.
        eps: added to the mean square.
        residual: [tokens, dim], same dtype; *written*: the sum, which the next layer adds to.

    Returns:
        values [tokens, dim] float8_e4m3fn, scale [tokens] fp32.
    """
    _check_rms_norm_fp8(x, weight, eps, residual)
    _check_columns("x", x.shape[1])
    module = _module_for(backend, "rms_norm_fp8", x)
    return module.rms_norm_fp8(x, weight, eps=eps, residual=residual)


def swiglu_fp8(gate_up: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows(swiglu(gate_up))` in one: the activation is rounded to its dtype before it is quantised.

    Args:
        gate_up: [tokens, 2 * intermediate], gate first; fp32, bf16 or fp16; at least one column of each.

    Returns:
        values [tokens, intermediate] float8_e4m3fn, scale [tokens] fp32.
    """
    _check_swiglu_fp8(gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension (gate and up), got {gate_up.shape[1]}")
    _check_columns("gate_up", gate_up.shape[1])
    return _module_for(backend, "swiglu_fp8", gate_up).swiglu_fp8(gate_up)


def linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    static_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`(x @ weight.T) * x_scale[:, None] * weight_scale + bias` with sums in fp32, rounded once.

    Tensor cores add products of 8 bits with fewer bits than fp32 has; the kernels here add what they gave for
    128 or 256 columns in fp32. On a GPU the compiled versions need compute capability 8.9 or newer; older
    ones have the reference alone.

    Args:
        x: [tokens, in] float8_e4m3fn.
        x_scale: [tokens] fp32.
        weight: [out, in] float8_e4m3fn.
        weight_scale: [out] fp32.
        bias: [out], in `out_dtype`.
        out_dtype: float32, bfloat16 or float16.
        static_weight: see `linear`; it holds for `weight` and `weight_scale`.

    Returns:
        [tokens, out] in `out_dtype`.
    """
    _check_linear_fp8(x, x_scale, weight, weight_scale, bias, out_dtype, static_weight)
    check_out_dtype(out_dtype, bias)
    module = _module_for(backend, "linear_fp8", x)
    return module.linear_fp8(
        x, x_scale, weight, weight_scale, bias, out_dtype=out_dtype, static_weight=static_weight
    )


def linear_swiglu_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out_dtype: torch.dtype,
    static_weight: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`swiglu_fp8(linear_fp8(...))`, in one kernel and what quantises its rows where that is faster.

    Gates and ups are rounded to `out_dtype` before the activation, and the activation before it is quantised,
    wherever they are computed.

    Args:
        x: [tokens, in] float8_e4m3fn.
        x_scale: [tokens] fp32.
        weight: [2 * intermediate, in] float8_e4m3fn, gates over ups.
        weight_scale: [2 * intermediate] fp32.
        out_dtype: float32, bfloat16 or float16.
        static_weight: see `linear_fp8`.

    Returns:
        values [tokens, intermediate] float8_e4m3fn, scale [tokens] fp32.
    """
    _check_linear_swiglu_fp8(x, x_scale, weight, weight_scale, out_dtype, static_weight)
    check_out_dtype(out_dtype)
    if weight.shape[0] % 2:
        raise ValueError(f"weight: expected an even number of rows (gate and up), got {weight.shape[0]}")
    _check_columns("intermediate", weight.shape[0] // 2)
    module = _module_for(backend, "linear_swiglu_fp8", x)
    return module.linear_swiglu_fp8(
        x, x_scale, weight, weight_scale, out_dtype=out_dtype, static_weight=static_weight
    )


def check_out_dtype(out_dtype: torch.dtype, bias: Tensor | None = None) -> None:
    """A dtype that results may have, and a bias in it."""
    if out_dtype not in _OUT_DTYPES:
        expected = " or ".join(str(dtype) for dtype in _OUT_DTYPES)
        raise TypeError(f"out_dtype: expected {expected}, got {out_dtype}")
    if bias is not None and bias.dtype != out_dtype:
        raise TypeError(f"bias: expected {out_dtype}, the dtype of the result, got {bias.dtype}")


def _check_columns(name: str, columns: int) -> None:
    if columns < 1:
        raise ValueError(f"{name}: expected at least one column, got none")
