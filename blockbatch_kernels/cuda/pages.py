"""Sharing and copy on write of cache pages."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.placement import launch_on

_MAX_MOVE_LISTS = 64  # kMaxMoveLists in csrc/decode/pages.h


def share_pages(page_table: Tensor, source_row: Tensor) -> None:
    """See `blockbatch_kernels.ops.share_pages`. One launch."""
    num_rows, pages_per_row = page_table.shape
    source_row = source_row.contiguous()
    extension.load().share_pages(
        page_table=page_table.data_ptr(),
        page_table_stride=_row_stride(page_table),
        source_row=source_row.data_ptr(),
        num_rows=num_rows,
        pages_per_row=pages_per_row,
        **launch_on(page_table),
    )


def copy_pages(
    kv_cache: Tensor, page_table: Tensor, write_start: Tensor, write_end: Tensor, *, num_branches: int
) -> None:
    """See `blockbatch_kernels.ops.copy_pages`. Two launches; at most 32 branches.

    `kv_cache` may have any strides for which a page of one layer and side is dense, in any order of its
    positions, heads and head dimension.
    """
    num_rows, pages_per_row = page_table.shape
    num_layers, _, _, page_size, num_kv_heads, head_dim = kv_cache.shape
    _require_dense_pages(kv_cache)
    write_start, write_end = write_start.contiguous(), write_end.contiguous()
    # Every row might move every page.
    moves = torch.empty(2 * num_rows * pages_per_row, dtype=torch.int32, device=page_table.device)
    num_moves = torch.empty(_MAX_MOVE_LISTS, dtype=torch.int32, device=page_table.device)
    size = kv_cache.element_size()
    extension.load().copy_pages(
        kv_cache=kv_cache.data_ptr(),
        layer_stride=kv_cache.stride(0) * size,
        side_stride=kv_cache.stride(1) * size,
        page_stride=kv_cache.stride(2) * size,
        chunk_bytes=page_size * num_kv_heads * head_dim * size,
        num_layers=num_layers,
        page_size=page_size,
        page_table=page_table.data_ptr(),
        page_table_stride=_row_stride(page_table),
        write_start=write_start.data_ptr(),
        write_end=write_end.data_ptr(),
        num_requests=num_rows // num_branches,
        num_branches=num_branches,
        pages_per_row=pages_per_row,
        num_moves=num_moves.data_ptr(),
        moves=moves.data_ptr(),
        **launch_on(page_table),
    )


def _row_stride(page_table: Tensor) -> int:
    if page_table.shape[1] > 1 and page_table.stride(1) != 1:
        raise ValueError(f"page_table: expected a last stride of 1, got {page_table.stride(1)}")
    return page_table.stride(0)


def _require_dense_pages(kv_cache: Tensor) -> None:
    expected = 1
    for stride, size in sorted(zip(kv_cache.stride()[3:], kv_cache.shape[3:])):
        if size == 1:
            continue
        if stride != expected:
            raise ValueError(
                "kv_cache: expected [page_size, num_kv_heads, head_dim] of a page to be dense in some "
                f"order, got strides {kv_cache.stride()[3:]} for sizes {list(kv_cache.shape[3:])}"
            )
        expected *= size
