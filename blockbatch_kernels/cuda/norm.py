"""RMSNorm with the residual add."""

import torch

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual += x`, then the norm of the sum, or of `x` without a residual, on the current stream.

    `x` [num_tokens, dim], `weight` [dim], `residual` and `out` [num_tokens, dim] (both *written*; `out` is
    allocated if None) are CUDA tensors of one dtype (fp32, fp16 or bf16) and one device. Rows may have any
    stride and alignment; whole 16-byte vectors of up to 16384 elements a row are fastest.
    Returns `out`.

    Raises ValueError where `residual`'s elements are not next to each other or its rows overlap.
    """
    num_tokens, dim = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None and dim > 1 and residual.stride(1) != 1:
        raise ValueError(f"residual: expected last stride 1, got strides {residual.stride()}")
    if residual is not None and num_tokens > 1 and residual.stride(0) < dim:
        raise ValueError(f"residual: expected rows that do not overlap, got strides {residual.stride()}")
    if out is None:
        out = x.new_empty(num_tokens, dim)
    extension.load().rms_norm(
        x=x,
        weight=weight.contiguous(),
        residual=residual,
        out=out,
        eps=eps,
        programmatic=tuning.PROGRAMMATIC_LAUNCH,
        stream=extension.stream_of(x),
    )
    return out
