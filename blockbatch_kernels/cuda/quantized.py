"""Rows quantised to e4m3: as they are, behind an RMSNorm, behind the gated activation."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.shapes import E4M3


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [tokens, dim] in e4m3 and its scales [tokens] fp32, on the current stream.

    Rows may have any stride and alignment; whole 16-byte vectors are fastest.
    """
    x = _contiguous_rows(x)
    out, scale = _outputs(x, x.shape[1])
    extension.load().quantize_rows(x=x, out=_bytes(out), scale=scale, **_launch(x))
    return out, scale


def rms_norm_fp8(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of what `rms_norm` gives, bit for bit; `residual` *written*.

    Raises ValueError where `residual`'s elements are not next to each other or its rows overlap.
    """
    tokens, dim = x.shape
    x = _contiguous_rows(x)
    if residual is not None and dim > 1 and residual.stride(1) != 1:
        raise ValueError(f"residual: expected last stride 1, got strides {residual.stride()}")
    if residual is not None and tokens > 1 and residual.stride(0) < dim:
        raise ValueError(f"residual: expected rows that do not overlap, got strides {residual.stride()}")
    out, scale = _outputs(x, dim)
    extension.load().rms_norm_fp8(
        x=x,
        weight=weight.contiguous(),
        residual=residual,
        out=_bytes(out),
        scale=scale,
        eps=eps,
        **_launch(x),
    )
    return out, scale


def swiglu_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of what `swiglu` gives, bit for bit."""
    gate_up = _contiguous_rows(gate_up)
    out, scale = _outputs(gate_up, gate_up.shape[1] // 2)
    extension.load().swiglu_fp8(gate_up=gate_up, out=_bytes(out), scale=scale, **_launch(gate_up))
    return out, scale


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _outputs(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    out = torch.empty(len(x), dim, dtype=E4M3, device=x.device)
    return out, torch.empty(len(x), dtype=torch.float32, device=x.device)


def _bytes(values: Tensor) -> Tensor:
    """As the extension takes e4m3."""
    return values.view(torch.uint8)


def _launch(x: Tensor) -> dict:
    return dict(programmatic=tuning.PROGRAMMATIC_LAUNCH, stream=extension.stream_of(x))
