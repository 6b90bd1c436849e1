"""Products in e4m3, for packs of few tokens."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.quantized import quantize_rows, swiglu_fp8


def linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    static_weight: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The product of e4m3 rows, on the current stream; see `ops.linear_fp8`.

    What `tuning.linear_fp8_tile` has a tile for runs on the extension's kernels where they exist (sm_90; fp16
    or bf16 results; rows aligned to 16 bytes). Everything else goes to `torch._scaled_mm`, which wants bf16
    results and whole 16 bytes, and what that refuses through fp32. With `static_weight` nobody writes the
    weight in work that may still run: its first tiles are read before the kernels in front are done. `out`
    [tokens, out], contiguous and from whole 16 bytes on, is *written* and returned; None: a new tensor.
    """
    tile = tile_of(x, weight, out_dtype)
    if tile is not None:
        return _on_tile(tile, x, x_scale, weight, weight_scale, bias, out_dtype, static_weight, out=out)
    if library_takes(x, weight, out_dtype):
        x, x_scale, weight_scale = (_at_16_bytes(given) for given in (x, x_scale, weight_scale))
        bias = None if bias is None else _at_16_bytes(bias)
        scales = x_scale[:, None], weight_scale[None, :]
        return torch._scaled_mm(x, weight.t(), *scales, bias=bias, out_dtype=out_dtype, out=out)
    return _through_fp32(x, x_scale, weight, weight_scale, bias, out_dtype, out)


def linear_swiglu_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out_dtype: torch.dtype,
    static_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """The product with the activation behind its sums, then its rows quantised; see `linear_fp8`.

    Where there is no such tile, the product, then `swiglu_fp8`. Either way with the same bits for the same
    sums.
    """
    tile = tile_of(x, weight, out_dtype, True)
    given = (x, x_scale, weight, weight_scale)
    if tile is None:
        return swiglu_fp8(linear_fp8(*given, out_dtype=out_dtype, static_weight=static_weight))
    return quantize_rows(_on_tile(tile, *given, None, out_dtype, static_weight, gated=True))


def tile_of(x: Tensor, weight: Tensor, out_dtype: torch.dtype, gated: bool = False) -> tuning.Fp8Tile | None:
    """How the extension's kernel cuts this product; None: another way computes it."""
    if out_dtype == torch.float32 or not kernel_is_used() or not _is_aligned(weight):
        return None
    kind = tuning.device_kind(x.device)
    out_features = len(weight) // 2 if gated else len(weight)
    tile = tuning.linear_fp8_tile(len(x), out_features, weight.shape[1], gated=gated, device_kind=kind)
    return tile if tile is not None and extension.code_for(x.device.index) == "sm90a" else None


def kernel_is_used() -> bool:
    """Whether the extension's product in e4m3 may run: not with BBK_FP8_KERNEL=0 in the environment."""
    return os.environ.get("BBK_FP8_KERNEL", "1") != "0"


def library_takes(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` has the product with a scale for each row."""
    return (
        out_dtype == torch.bfloat16
        and len(x) > 0
        and len(weight) > 0
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % 16 == 0
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def _on_tile(
    tile: tuning.Fp8Tile,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    static_weight: bool,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    x = aligned(x)
    features = len(weight) // 2 if gated else len(weight)
    out = torch.empty(len(x), features, dtype=out_dtype, device=x.device) if out is None else out
    extension.load().linear_fp8(
        x=x.view(torch.uint8),
        x_scale=x_scale.contiguous(),
        weight=weight.view(torch.uint8),
        weight_scale=weight_scale.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        out=out,
        tile=tile,
        gated=gated,
        static_weight=static_weight,
        programmatic=tuning.PROGRAMMATIC_LAUNCH,
        stream=extension.stream_of(x),
    )
    return out


def _at_16_bytes(x: Tensor) -> Tensor:
    """The same where the library reads it: without gaps, from whole 16 bytes on."""
    fits = x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> Tensor:
    """Rows of bytes, or a copy that the copy engine can read."""
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _is_aligned(matrix: Tensor) -> bool:
    """Whether the copy engine can read the rows of a matrix of bytes where they are."""
    row = matrix.stride(0)
    return matrix.stride(1) == 1 and row >= matrix.shape[1] and row % 16 == 0 and matrix.data_ptr() % 16 == 0


def _through_fp32(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    exact = x.float()
    out = torch.empty(len(x), len(weight), dtype=out_dtype, device=x.device) if out is None else out
    rows = max(1, tuning.FP8_PIECE // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        piece = slice(start, start + rows)
        total = F.linear(exact, weight[piece].float()) * x_scale[:, None] * weight_scale[piece]
        out[:, piece] = total if bias is None else total + bias[piece].float()
    return out
