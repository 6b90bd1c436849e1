"""What a kernel brings into L2 for the one that runs after it."""

import torch

from blockbatch_kernels import tuning


def arguments(tensor: torch.Tensor | None) -> dict[str, int]:
    """The first `tuning.PREFETCH_BYTES` of a tensor, as `csrc/prefetch.h` takes them.

    None, and a tensor that is not dense in memory or not aligned to 16 bytes: nothing.
    """
    if tensor is None or not tensor.is_contiguous() or tensor.data_ptr() % 16:
        return dict(prefetch=0, prefetch_bytes=0)
    size = min(tensor.numel() * tensor.element_size(), tuning.PREFETCH_BYTES)
    return dict(prefetch=tensor.data_ptr(), prefetch_bytes=size // 16 * 16)
