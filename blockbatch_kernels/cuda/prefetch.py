"""What a kernel brings into L2 for the one that runs after it."""

import torch

from blockbatch_kernels import tuning


def arguments(weight: torch.Tensor | None) -> dict[str, int]:
    """The beginning of every row of a weight [rows, columns], `tuning.PREFETCH_BYTES` in all.

    None, and a weight that is not dense in memory or not aligned to 16 bytes: nothing.
    """
    nothing = dict(prefetch=0, prefetch_rows=0, prefetch_row_stride=0, prefetch_row_bytes=0)
    if weight is None or weight.dim() != 2 or weight.numel() == 0:
        return nothing
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        return nothing
    row_stride = weight.stride(0) * weight.element_size()
    row_bytes = min(row_stride, tuning.PREFETCH_BYTES // weight.shape[0]) // 128 * 128
    return dict(
        prefetch=weight.data_ptr(),
        prefetch_rows=weight.shape[0] if row_bytes else 0,
        prefetch_row_stride=row_stride,
        prefetch_row_bytes=row_bytes,
    )
