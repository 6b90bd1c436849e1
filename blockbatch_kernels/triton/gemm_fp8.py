"""Products in e4m3: few tokens on a kernel of Triton's, many by the matrix library."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.triton import interpreted
from blockbatch_kernels.triton.launch import on_device_of_first, programmatic_launch, shared_bytes
from blockbatch_kernels.triton.quantized import swiglu_fp8


# The number of tokens is no reason to compile another version.
@triton.jit(do_not_specialize=["num_tokens"])
def _linear_fp8_kernel(
    x,  # [tokens, in_features] e4m3
    x_scale,  # [tokens]
    weight,  # [out_features, in_features] e4m3
    weight_scale,  # [out_features]
    bias,  # [out_features]; read if HAS_BIAS
    out,  # [tokens, out_features], contiguous
    num_tokens,
    out_features,
    in_features,
    x_row_stride,
    weight_row_stride,
    x_scale_stride,
    weight_scale_stride,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MOST_IMPRECISE: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Rows of the weight are the rows of the tile, tokens its columns: few tokens waste no arithmetic."""
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
    # Programs that share rows of the weight run side by side, so that one read of them serves all.
    token_tiles = tl.cdiv(num_tokens, BLOCK_TOKENS)
    row_tile, token_tile = tl.program_id(0) // token_tiles, tl.program_id(0) % token_tiles
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    # What lies outside is read from the last row and never written.
    read_row = tl.minimum(row, out_features - 1).to(tl.int64)
    read_token = tl.minimum(token, num_tokens - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    weights = weight + read_row[:, None] * weight_row_stride + k[None, :]
    activations = x + read_token[None, :] * x_row_stride + k[:, None]
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        if WHOLE_K:
            a = tl.load(weights + start)
            b = tl.load(activations + start)
        else:
            a = tl.load(weights + start, mask=start + k[None, :] < in_features, other=0.0)
            b = tl.load(activations + start, mask=start + k[:, None] < in_features, other=0.0)
        # What the tensor cores add up of so many columns is added in fp32.
        total = tl.dot(a, b, total, max_num_imprecise_acc=MOST_IMPRECISE)
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_launch_dependents()
    scale_of_row = tl.load(weight_scale + read_row * weight_scale_stride)
    scale_of_token = tl.load(x_scale + read_token * x_scale_stride)
    total = total * scale_of_token[None, :] * scale_of_row[:, None]
    if HAS_BIAS:
        total += tl.load(bias + read_row * bias_stride).to(tl.float32)[:, None]
    place = out + token.to(tl.int64)[None, :] * out_features + row[:, None]
    inside = (row[:, None] < out_features) & (token[None, :] < num_tokens)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@on_device_of_first
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
    """Beyond `tuning.TRITON_FP8_TOKENS` tokens the library computes, where it takes the sizes."""
    out = torch.empty(len(x), len(weight), dtype=out_dtype, device=x.device)
    return product_into(out, x, x_scale, weight, weight_scale, bias)


def product_into(
    out: Tensor, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`linear_fp8` into `out` [tokens, out], contiguous; *written*. On the device of a caller's first."""
    x, weight = _contiguous_rows(x), _contiguous_rows(weight)
    (num_tokens, in_features), out_features = x.shape, len(weight)
    if num_tokens > tuning.TRITON_FP8_TOKENS and library_takes(x, weight, out.dtype):
        scales = x_scale[:, None], weight_scale[None, :]
        return torch._scaled_mm(x, weight.t(), *scales, bias=bias, out_dtype=out.dtype, out=out)
    if out.numel() == 0:
        return out
    tile = tuning.triton_linear_fp8(num_tokens, shared_bytes(x.device))
    grid = triton.cdiv(out_features, tile.block_rows) * triton.cdiv(num_tokens, tile.block_tokens)
    _linear_fp8_kernel[(grid,)](
        x,
        x_scale,
        weight,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        x_scale.stride(0),
        weight_scale.stride(0),
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        WHOLE_K=in_features % tile.block_k == 0,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_TOKENS=tile.block_tokens,
        BLOCK_K=tile.block_k,
        # Results in fp32 show what 16 bits round away: one instruction at a time.
        MOST_IMPRECISE=32 if out.dtype == torch.float32 else tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **programmatic_launch(x.device),
    )
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
    """One kernel behind the other."""
    return swiglu_fp8(linear_fp8(x, x_scale, weight, weight_scale, out_dtype=out_dtype))


def library_takes(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` has a product with a scale for each row: bf16 results, whole 16 bytes."""
    return (
        not interpreted()
        and out_dtype == torch.bfloat16
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % 16 == 0
        and all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in (x, weight))
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def _contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
