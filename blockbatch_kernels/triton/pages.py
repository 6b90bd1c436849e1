"""Sharing of cache pages between the branches of a request; `reference/pages.py` describes their pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels.structs import PagePool
from blockbatch_kernels.triton.page_pool import choose_from_pool, listed_in
from blockbatch_kernels.triton.rows import device_of, pick

# Table entries of a program of share_pages, which holds some columns of all rows.
_SHARED_ENTRIES = 4096
# Columns of a program that chooses pages: small, so that even short tables occupy several processors.
_COLUMNS = 16
# Elements that a program copies of each moved page: 16 bytes a thread and load, several in flight.
_COPIED_ELEMENTS = 8192
# Programs that walk the list of moves for each of those pieces. A window moves few pages, at most one at
# either end of it for every row, and idle programs cost little less than busy ones.
_WALKERS = 4


def share_pages(page_table: Tensor, source_row: Tensor) -> None:
    num_rows, num_columns = page_table.shape
    rows = triton.next_power_of_2(num_rows)
    columns = max(1, min(triton.next_power_of_2(num_columns), _SHARED_ENTRIES // rows))
    with device_of(page_table):
        _share_kernel[(triton.cdiv(num_columns, columns),)](
            page_table,
            *page_table.stride(),
            source_row,
            source_row.stride(0),
            num_rows,
            num_columns,
            ROWS=rows,
            COLUMNS=columns,
        )


@triton.jit
def _share_kernel(
    page_table,
    row_stride,
    column_stride,
    source_row,
    source_stride,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    source = tl.load(source_row + row * source_stride, mask=row < num_rows, other=-1)
    repointed = ((source >= 0) & (source < num_rows))[:, None] & (column < num_columns)
    offset = column.to(tl.int64) * column_stride
    pages = tl.load(page_table + source.to(tl.int64)[:, None] * row_stride + offset, mask=repointed)
    tl.debug_barrier()  # all rows read the table as it was before
    tl.store(page_table + row.to(tl.int64)[:, None] * row_stride + offset, pages, mask=repointed)


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
    layers, sides, _, page_size, num_kv_heads, head_dim = kv_cache.shape
    layer_stride, side_stride, page_stride = kv_cache.stride()[:3]
    if not kv_cache[:1, :1, :1].is_contiguous():
        raise ValueError(
            "kv_cache: expected contiguous pages for the triton backend, got strides "
            f"{list(kv_cache.stride())}"
        )
    num_rows, num_columns = page_table.shape
    if page_table.numel() == 0:
        return
    # Every page moved, as (from, to); the order in which programs append does not change the result.
    moves = torch.empty(num_rows * num_columns, 2, dtype=torch.int32, device=page_table.device)
    num_moves = torch.zeros(1, dtype=torch.int32, device=page_table.device)
    writes = (
        write_start,
        write_start.stride(0),
        write_end,
        write_end.stride(0),
        write_positions,
        *(write_positions.stride() if write_positions is not None else (None, None)),
    )
    with device_of(page_table):
        if pool is not None:
            choose_from_pool(page_table, writes, moves, num_moves, pool, kv_cache.shape[2], page_size)
        else:
            _choose_kernel[(num_rows // num_branches, triton.cdiv(num_columns, _COLUMNS))](
                page_table,
                *page_table.stride(),
                *writes,
                moves,
                num_moves,
                num_columns,
                page_size,
                num_branches,
                ROWS=triton.next_power_of_2(num_branches),
                COLUMNS=_COLUMNS,
            )
        elements = page_size * num_kv_heads * head_dim
        if layers * elements == 0:
            return
        _copy_kernel[(triton.cdiv(elements, _COPIED_ELEMENTS), layers * sides, _WALKERS)](
            kv_cache,
            layer_stride,
            side_stride,
            page_stride,
            moves,
            num_moves,
            ELEMENTS=elements,
            BLOCK=min(_COPIED_ELEMENTS, triton.next_power_of_2(elements)),
            num_warps=4,
        )


@triton.jit
def _choose_kernel(
    page_table,
    row_stride,
    column_stride,
    write_start,
    start_stride,
    write_end,
    end_stride,
    write_positions,
    positions_stride,
    place_stride,
    moves,
    num_moves,
    num_columns,
    page_size,
    num_branches,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gives the rows of a request, one after the other, free pages where they must leave a shared one."""
    request = tl.program_id(0)
    branch = tl.arange(0, ROWS)
    row, exists = request * num_branches + branch, branch < num_branches
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = exists[:, None] & (column < num_columns)[None, :]
    entry = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    old_page = tl.load(page_table + entry, mask=inside, other=-1)

    start = tl.load(write_start + row * start_stride, mask=exists, other=0)[:, None]
    end = tl.load(write_end + row * end_stride, mask=exists, other=0)[:, None]
    page_start = (column * page_size)[None, :]
    page_end = page_start + page_size
    if write_positions is None:
        touched = inside & (start < end) & (start < page_end) & (end > page_start)
        covered = (start <= page_start) & (end >= page_end)
    else:
        lines = write_positions + row.to(tl.int64) * positions_stride
        number = listed_in(lines, place_stride, start, end, page_start, page_end)
        touched = inside & (number > 0)
        covered = number == page_size

    # Which of its column's N pages each row uses; -1 if none.
    old = tl.where(old_page < 0, -1, old_page // num_columns - request * num_branches)
    new = old
    member = branch[:, None]
    for leaving in range(num_branches):
        own = pick(member, leaving, new)
        users = tl.sum((inside & (new == own[None, :])).to(tl.int32), 0)
        must_leave = (pick(member, leaving, touched.to(tl.int32)) > 0) & ((users > 1) | (own < 0))
        free = tl.full(own.shape, -1, tl.int32)
        for page in range(num_branches):
            used = tl.sum((new == page).to(tl.int32), 0) > 0
            free = tl.where(used | (free >= 0), free, page)
        new = tl.where((member == leaving) & must_leave[None, :], free[None, :], new)

    new_page = tl.where(new < 0, -1, (request * num_branches + new) * num_columns + column[None, :])
    tl.store(page_table + entry, new_page, mask=inside & (new != old))
    # A page that the write covers whole needs no copy.
    moved = inside & (new != old) & (old >= 0) & ~covered
    count = tl.sum(tl.sum(moved.to(tl.int32), 1), 0)
    if count > 0:
        by_column = tl.cumsum(moved.to(tl.int32), 1)
        of_row = tl.sum(moved.to(tl.int32), 1)
        before_row = tl.cumsum(of_row, 0) - of_row
        index = tl.atomic_add(num_moves, count) + before_row[:, None] + by_column - 1
        tl.store(moves + index * 2, old_page, mask=moved)
        tl.store(moves + index * 2 + 1, new_page, mask=moved)


@triton.jit
def _copy_kernel(
    kv_cache,
    layer_stride,
    side_stride,
    page_stride,
    moves,
    num_moves,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies the contents: every target was unused and every source is still in use, so any order will do."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    layer, side = tl.program_id(1) // 2, tl.program_id(1) % 2
    base = kv_cache + layer.to(tl.int64) * layer_stride + side.to(tl.int64) * side_stride
    for index in range(tl.program_id(2), tl.load(num_moves), tl.num_programs(2)):
        source = base + tl.load(moves + index * 2).to(tl.int64) * page_stride
        target = base + tl.load(moves + index * 2 + 1).to(tl.int64) * page_stride
        values = tl.load(source + offset, mask=offset < ELEMENTS)
        tl.store(target + offset, values, mask=offset < ELEMENTS)
