"""Where a call runs, for the operators whose one source serves the GPU and the host.

Their thin lines take tensors of either; the front door `blockbatch_kernels.ops` passes CUDA tensors alone.
"""

from __future__ import annotations

from torch import Tensor

from blockbatch_kernels.cuda import extension


def launch_on(tensor: Tensor) -> dict[str, int]:
    """The arguments `device` and `stream` of the extension: -1 is the calling thread."""
    if not tensor.is_cuda:
        return {"device": -1, "stream": 0}
    return {"device": tensor.device.index, "stream": extension.stream_of(tensor)}


def require_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
