"""Which page each row writes to, with pages of any allocator: `PagePool` in `structs`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels.structs import PagePool

# Listed positions that a program looks through at a time.
_PLACES = tl.constexpr(16)
# Rows and columns of a program that asks which pages are about to be written.
_ROWS, _COLUMNS = 32, 16
# Entries that the programs which go through whole lists take at a time.
_BLOCK = 1024
_NOT_IN_POOL = tl.constexpr(2**31 - 1)
_IN_USE = tl.constexpr(-1)
# Of a page that some row only reads; else the last row that writes it may keep it.
_NOBODY = tl.constexpr(2**31 - 1)


def choose_from_pool(
    page_table: Tensor,
    writes: tuple,
    moves: Tensor,
    num_moves: Tensor,
    pool: PagePool,
    num_pages: int,
    page_size: int,
) -> None:
    """Writes the table, the list of pages to copy and its length, and writes `pool.counts`.

    writes: write_start, write_end and write_positions, with their strides.
    """
    (num_rows, num_columns), num_free = page_table.shape, pool.free_pages.shape[0]
    entries = num_rows * num_columns

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=page_table.device)

    # Of each page: its first place in the list, or one of the two marks above; and who may keep it.
    place, keeper, written, free = empty(num_pages), empty(num_pages), empty(entries), empty(num_free)
    _places_kernel[(1,)](
        pool.free_pages,
        pool.free_pages.stride(0),
        page_table,
        *page_table.stride(),
        place,
        keeper,
        num_free,
        num_pages,
        entries,
        num_columns,
        BLOCK=_BLOCK,
    )
    _written_kernel[triton.cdiv(num_rows, _ROWS), triton.cdiv(num_columns, _COLUMNS)](
        page_table,
        *page_table.stride(),
        *writes,
        keeper,
        written,
        num_rows,
        num_columns,
        num_pages,
        page_size,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    _give_kernel[(1,)](
        pool.free_pages,
        pool.free_pages.stride(0),
        page_table,
        *page_table.stride(),
        place,
        keeper,
        written,
        free,
        moves,
        num_moves,
        pool.counts,
        pool.counts.stride(0),
        num_free,
        num_pages,
        entries,
        num_columns,
        BLOCK=_BLOCK,
    )


@triton.jit
def _places_kernel(
    free_pages,
    free_stride,
    page_table,
    row_stride,
    column_stride,
    place,
    keeper,
    num_free,
    num_pages,
    entries,
    num_columns,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    for first in range(0, num_pages, BLOCK):
        page = first + lane
        tl.store(keeper + page, tl.full([BLOCK], -1, tl.int32), mask=page < num_pages)
        tl.store(place + page, tl.full([BLOCK], _NOT_IN_POOL, tl.int32), mask=page < num_pages)
    tl.debug_barrier()
    for first in range(0, num_free, BLOCK):
        index = first + lane
        page = tl.load(free_pages + index * free_stride, mask=index < num_free, other=-1)
        tl.atomic_min(place + page, index, mask=(page >= 0) & (page < num_pages))
    tl.debug_barrier()
    for first in range(0, entries, BLOCK):
        index = (first + lane).to(tl.int64)
        entry = index // num_columns * row_stride + index % num_columns * column_stride
        page = tl.load(page_table + entry, mask=index < entries, other=-1)
        exists = (page >= 0) & (page < num_pages)
        found = tl.load(place + page, mask=exists, other=_NOT_IN_POOL)
        tl.store(place + page, tl.full([BLOCK], _IN_USE, tl.int32), mask=exists & (found != _NOT_IN_POOL))


@triton.jit
def _written_kernel(
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
    keeper,
    written,
    num_rows,
    num_columns,
    num_pages,
    page_size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """written [rows, columns]: 0 not at all, 1 whole, or where there is no page, 2 in part."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = row < num_rows
    inside = exists[:, None] & (column < num_columns)[None, :]
    entry = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    page = tl.load(page_table + entry, mask=inside, other=-1)
    is_page = inside & (page >= 0) & (page < num_pages)

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

    kind = tl.where(touched, tl.where(is_page & ~covered, 2, 1), 0)
    tl.store(written + row[:, None] * num_columns + column[None, :], kind, mask=inside)
    tl.atomic_max(keeper + page, tl.where(touched, row[:, None], _NOBODY), mask=is_page)


@triton.jit
def _give_kernel(
    free_pages,
    free_stride,
    page_table,
    row_stride,
    column_stride,
    place,
    keeper,
    written,
    free,
    moves,
    num_moves,
    counts,
    counts_stride,
    num_free,
    num_pages,
    entries,
    num_columns,
    BLOCK: tl.constexpr,
):
    """The free pages in the order of the list, to the rows that must leave theirs, one after the other.

    Row after row, one that has left a page no longer shares it. So where all that hold a page write it the
    last of them stays, and where one only reads it all writers leave.
    """
    lane = tl.arange(0, BLOCK)
    there = 0
    for first in range(0, num_free, BLOCK):
        index = first + lane
        page = tl.load(free_pages + index * free_stride, mask=index < num_free, other=-1)
        exists = (page >= 0) & (page < num_pages)
        is_free = (exists & (tl.load(place + page, mask=exists, other=_IN_USE) == index)).to(tl.int32)
        tl.store(free + there + tl.cumsum(is_free, 0) - 1, page, mask=is_free > 0)
        there += tl.sum(is_free, 0)
    tl.debug_barrier()
    wanted, copied = 0, 0
    for first in range(0, entries, BLOCK):
        index = first + lane
        kind = tl.load(written + index, mask=index < entries, other=0)
        far = index.to(tl.int64)
        entry = page_table + far // num_columns * row_stride + far % num_columns * column_stride
        old = tl.load(entry, mask=kind > 0, other=-1)
        is_page = (old >= 0) & (old < num_pages)
        in_pool = tl.load(place + old, mask=is_page, other=_NOT_IN_POOL) != _NOT_IN_POOL
        keeps = in_pool & (tl.load(keeper + old, mask=is_page, other=_NOBODY) == index // num_columns)
        kind = tl.where(keeps, 0, kind)
        wants = (kind > 0).to(tl.int32)
        turn = wanted + tl.cumsum(wants, 0) - 1
        gets = (kind > 0) & (turn < there)
        new = tl.load(free + turn, mask=gets, other=-1)
        tl.store(entry, new, mask=gets)
        moved = (gets & (kind == 2)).to(tl.int32)
        at = copied + tl.cumsum(moved, 0) - 1
        tl.store(moves + at * 2, old, mask=moved > 0)
        tl.store(moves + at * 2 + 1, new, mask=moved > 0)
        wanted += tl.sum(wants, 0)
        copied += tl.sum(moved, 0)
    tl.store(num_moves, copied)
    given = tl.minimum(wanted, there)
    tl.store(counts, there - given)
    missing = counts + counts_stride
    tl.store(missing, tl.load(missing) + wanted - given)


@triton.jit
def listed_in(lines, place_stride, start, end, page_start, page_end):
    """[N, columns]: how many positions of a page a row lists at the places [start, end) of its line."""
    number = tl.zeros_like(start + page_start)
    for first in range(tl.min(tl.min(start, 1), 0), tl.max(tl.max(end, 1), 0), _PLACES):
        place = first + tl.arange(0, _PLACES)[None, :]
        listed = (place >= start) & (place < end)
        position = tl.load(lines[:, None] + place * place_stride, mask=listed, other=-1)[:, None, :]
        here = (position >= page_start[:, :, None]) & (position < page_end[:, :, None])
        number += tl.sum(here.to(tl.int32), 2)
    return number
