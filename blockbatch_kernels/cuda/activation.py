"""The gated activation."""

import torch

from blockbatch_kernels.cuda import extension


def swiglu(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`out[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i]`, computed in fp32, on the current stream.

    `gate_up` [num_tokens, 2 I] and `out` [num_tokens, I] (*written*; allocated if None) are CUDA tensors of
    one dtype (fp32, fp16 or bf16) and one device, with any row stride. The last stride of `out` is 1; a
    `gate_up` with another is copied first. Returns `out`.
    """
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    if out is None:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    extension.load().swiglu(gate_up=gate_up, out=out, stream=extension.stream_of(gate_up))
    return out
