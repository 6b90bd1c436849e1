"""Sharing of cache pages between the branches of a request.

Column j of a request's page tables holds the pages of positions [j * page_size, (j + 1) * page_size). Its N
rows draw on a pool of N pages per column, numbered (request * N + k) * pages_per_row + j, so a row that must
leave a shared page always finds a free one: no allocator, no host, and memory that is known beforehand.

With a `PagePool` the ids are those of another allocator, and all rows of the table draw on one list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.structs import PagePool


def share_pages(page_table: Tensor, source_row: Tensor) -> None:
    rows = torch.arange(page_table.shape[0], device=page_table.device)
    source = torch.where(source_row < 0, rows, source_row.long())
    page_table.copy_(page_table[source])


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
    written = _written(page_table, write_start, write_end, write_positions, kv_cache.shape[3])
    if pool is None:
        _copy_in_fixed_pool(kv_cache, page_table, *written, num_branches)
    else:
        _copy_in_pool(kv_cache, page_table, *written, pool)


def _written(
    page_table: Tensor,
    write_start: Tensor,
    write_end: Tensor,
    write_positions: Tensor | None,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """Of each row and column [rows, columns]: whether the page is written, and whether whole."""
    num_rows, pages_per_row = page_table.shape
    column_start = torch.arange(pages_per_row, device=page_table.device) * page_size
    first, last = write_start.unsqueeze(1), write_end.unsqueeze(1)
    touched = (first < last) & (first < column_start + page_size) & (last > column_start)  # [rows, columns]
    covered = (first <= column_start) & (last >= column_start + page_size)
    if write_positions is not None:
        place = torch.arange(write_positions.shape[1], device=page_table.device)
        column = torch.where((place >= first) & (place < last), write_positions // page_size, pages_per_row)
        written = torch.zeros(num_rows, pages_per_row + 1, dtype=torch.int32, device=page_table.device)
        written.scatter_add_(1, column.long(), torch.ones_like(column, dtype=torch.int32))
        touched, covered = written[:, :-1] > 0, written[:, :-1] == page_size
    return touched, covered


def _copy_in_fixed_pool(
    kv_cache: Tensor, page_table: Tensor, touched: Tensor, covered: Tensor, num_branches: int
) -> None:
    num_rows, pages_per_row = page_table.shape

    def by_request(x: Tensor) -> Tensor:
        return x.view(-1, num_branches, pages_per_row)

    # Which of its column's N pages each row uses; -1 if none.
    requests = torch.arange(num_rows // num_branches, device=page_table.device).view(-1, 1, 1)
    old = by_request(torch.where(page_table < 0, -1, page_table // pages_per_row).long())
    old = torch.where(old < 0, -1, old - requests * num_branches)
    new = old.clone()
    pool = torch.arange(num_branches, device=page_table.device).view(1, -1, 1, 1)
    for branch in range(num_branches):
        users = pool == new.unsqueeze(1)  # [requests, pool, branches, columns]
        own = new[:, branch]
        shared = (new == own.unsqueeze(1)).sum(1) > 1
        must_leave = by_request(touched)[:, branch] & (shared | (own < 0))
        free = users.any(2).int().argmin(1)  # the first page of the column that nobody uses
        new[:, branch] = torch.where(must_leave, free, own)

    columns = torch.arange(pages_per_row, device=page_table.device)

    def page_ids(choice: Tensor) -> Tensor:
        return (requests * num_branches + choice) * pages_per_row + columns

    # A page that the write covers whole needs no copy. Every target was unused and every source is still in
    # use, so the order of the copies does not matter.
    moved = (new != old) & (old >= 0) & ~by_request(covered)
    kv_cache[:, :, page_ids(new)[moved]] = kv_cache[:, :, page_ids(old)[moved]]
    page_table.copy_(torch.where(new == old, by_request(page_table), page_ids(new)).view_as(page_table))


def _copy_in_pool(
    kv_cache: Tensor, page_table: Tensor, touched: Tensor, covered: Tensor, pool: PagePool
) -> None:
    num_rows, num_pages, device = page_table.shape[0], kv_cache.shape[2], page_table.device
    held = page_table.long()
    exists = (held >= 0) & (held < num_pages)
    ids = pool.free_pages.long()
    place = torch.where((ids >= 0) & (ids < num_pages), ids, num_pages)
    # Of each page its first place in the list, of pages that are not in it the length of the list.
    first = torch.full((num_pages + 1,), len(ids), device=device)
    first.scatter_reduce_(0, place, torch.arange(len(ids), device=device), "amin")
    in_pool = exists & (first[torch.where(exists, held, num_pages)] < len(ids))
    in_use = torch.zeros(num_pages + 1, dtype=torch.bool, device=device)
    in_use[torch.where(exists, held, num_pages)] = True
    free = (place < num_pages) & (first[place] == torch.arange(len(ids), device=device)) & ~in_use[place]

    # Row after row: one that has left a page no longer shares it. So where all users of a page write it, the
    # last one stays.
    page = torch.where(exists, held, num_pages)
    count = torch.zeros(num_pages + 1, dtype=torch.int64, device=device)
    users = count.scatter_add(0, page.flatten(), torch.ones_like(page).flatten())[page]
    writers = count.scatter_add(0, page.flatten(), touched.long().flatten())[page]
    rows = torch.arange(num_rows, device=device).unsqueeze(1).expand_as(page)
    written_by = torch.where(touched, rows, -1).flatten()
    last = (count - 1).scatter_reduce(0, page.flatten(), written_by, "amax")[page]
    leaves = touched & (~in_pool | (users > writers) | (rows != last))

    # The free pages in the order of the list, to the rows one after the other.
    order = torch.where(free, free.cumsum(0) - 1, len(ids))
    given = torch.full((len(ids) + 1,), -1, device=device).scatter_(0, order, ids)
    given[-1] = -1
    turn = (leaves.flatten().cumsum(0) - 1).view_as(held)
    new = given[torch.where(leaves, turn, len(ids)).clamp(max=len(ids))]
    moved = new >= 0
    copied = moved & exists & ~covered
    kv_cache[:, :, new[copied]] = kv_cache[:, :, held[copied]]
    page_table.copy_(torch.where(moved, new, held))
    pool.counts[0] = free.sum() - moved.sum()
    pool.counts[1] += (leaves & ~moved).sum()
