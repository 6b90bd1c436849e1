"""Sharing and copy on write of cache pages."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.cuda import extension
from blockbatch_kernels.structs import PagePool

# Rows whose column of the table has room in the shared memory of every GPU.
_FEW_ROWS = 8192


def share_pages(page_table: Tensor, source_row: Tensor) -> None:
    """See `blockbatch_kernels.ops.share_pages`. One launch."""
    workspace = None
    if page_table.shape[0] > _FEW_ROWS:
        workspace = torch.empty(page_table.numel(), dtype=torch.int32, device=page_table.device)
    extension.load().share_pages(
        page_table=page_table,
        source_row=source_row.contiguous(),
        workspace=workspace,
        stream=extension.stream_of(page_table),
    )


def copy_pages(
    kv_cache: Tensor,
    page_table: Tensor,
    write_start: Tensor,
    write_end: Tensor,
    *,
    num_branches: int,
    write_positions: Tensor | None = None,
    pool: PagePool | None = None,
) -> None:
    """See `blockbatch_kernels.ops.copy_pages`. Two launches; without `pool` at most 32 branches.

    `kv_cache` may have any strides for which a page of one layer and side is dense, in any order of its
    positions, heads and head dimension.
    """
    _require_dense_pages(kv_cache)
    compiled = extension.load()
    # Every row might move every page.
    moves = torch.empty(2 * page_table.numel(), dtype=torch.int32, device=page_table.device)
    num_moves = torch.empty(compiled.MAX_MOVE_LISTS, dtype=torch.int32, device=page_table.device)
    workspace = counts = None
    if pool is not None:
        counts = pool.counts.contiguous()
        # Two places for each page, one for each entry of the table and each page of the list.
        size = 2 * kv_cache.shape[2] + page_table.numel() + pool.free_pages.shape[0]
        workspace = torch.empty(size, dtype=torch.int32, device=page_table.device)
    compiled.copy_pages(
        kv_cache=kv_cache,
        page_table=page_table,
        write_start=write_start.contiguous(),
        write_end=write_end.contiguous(),
        num_moves=num_moves,
        moves=moves,
        write_positions=None if write_positions is None else write_positions.contiguous(),
        free_pages=None if pool is None else pool.free_pages.contiguous(),
        counts=counts,
        workspace=workspace,
        num_branches=num_branches,
        stream=extension.stream_of(page_table),
    )
    if pool is not None and counts is not pool.counts:
        pool.counts.copy_(counts)


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
