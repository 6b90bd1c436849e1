"""RMSNorm and SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor:
    if residual is not None:
        x = residual.add_(x)
    normed = x.float()
    normed = normed * torch.rsqrt(normed.square().mean(dim=-1, keepdim=True) + eps)
    # LLaDA and Dream round before they multiply with the weight.
    return weight * normed.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)
