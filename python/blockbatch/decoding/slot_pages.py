"""The K/V pages of all slots: one page table and one list of free pages for requests of any layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.kv_cache import PAGE_SIZE


class PagesView(NamedTuple):
    """The cache as `Model.predict` takes it, for some consecutive rows of the page table."""

    kv: Tensor
    page_table: Tensor
    distinct_rows: int
    num_branches: int
    page_size: int


class SlotPages:
    """
    Which pages are free follows from the table (see `bbk.PagePool`): those that stand nowhere in it. Every
    running request has reserved what it may come to hold, so none is ever missing.

    Attributes:
        kv: [layers, 2, pages, page_size, num_kv_heads, head_dim]; another tensor once it grew.
        page_table: [rows, columns] int32, -1 where a row has no page; another tensor once it grew.
        pool: all pages.
    """

    def __init__(self, model, num_pages: int, page_size: int = PAGE_SIZE) -> None:
        spec = model.spec
        self.page_size, self.device, self.backend = page_size, model.device, model.backend
        shape = (spec.num_layers, 2, num_pages, page_size, spec.num_kv_heads, spec.head_dim)
        self.kv = torch.zeros(shape, dtype=model.kv_dtype, device=self.device)
        self.page_table = self._table(0, 0)
        self.pool = self._pool()

    @property
    def num_pages(self) -> int:
        return self.kv.shape[2]

    def grow_pages(self, num_pages: int) -> None:
        """Makes room for so many pages; those in use keep their numbers."""
        shape = (*self.kv.shape[:2], num_pages, *self.kv.shape[3:])
        larger = torch.zeros(shape, dtype=self.kv.dtype, device=self.device)
        larger[:, :, : self.num_pages] = self.kv
        self.kv = larger
        self.pool = self._pool()

    def lay_out(self, moves: list[tuple[Tensor, Tensor]], num_rows: int, columns: int) -> None:
        """A new table, in which the rows `moves[...][1]` hold what the rows `moves[...][0]` held.

        Args:
            moves: pairs of int64 row numbers.
            columns: at least as many as there are.
        """
        table = self._table(num_rows, columns)
        for old, new in moves:
            table[new, : self.page_table.shape[1]] = self.page_table[old]
        self.page_table = table

    def make_private(
        self, rows: slice, write_start: Tensor, write_end: Tensor, write_positions: Tensor | None = None
    ) -> None:
        """Gives each of the rows pages of its own where it is about to write, see `bbk.copy_pages`."""
        if self.page_table.shape[0] != rows.stop - rows.start:
            write_start, write_end = (self._everywhere(rows, x) for x in (write_start, write_end))
            if write_positions is not None:
                write_positions = self._everywhere(rows, write_positions)
        bbk.copy_pages(
            self.kv,
            self.page_table,
            write_start,
            write_end,
            num_branches=1,
            write_positions=write_positions,
            pool=self.pool,
            backend=self.backend,
        )

    def share(self, rows: slice, source_row: Tensor) -> None:
        """Points rows at the pages of their source rows, numbered from the first of `rows`."""
        bbk.share_pages(self.page_table[rows], source_row, backend=self.backend)

    def forget(self, rows: slice, which: Tensor) -> None:
        """Takes their pages from those of the rows that `which` [rows] marks."""
        self.page_table[rows].masked_fill_(which.unsqueeze(1), -1)

    def clear(self, rows: slice) -> None:
        """Zeroes the pages that the rows hold: NaN there would reach whoever gets them. The host waits."""
        pages = self.page_table[rows]
        self.kv[:, :, pages[pages >= 0].unique().long()] = 0

    def usage(self) -> Tensor:
        """[2] int32: entries of the table that have a page, and pages that stand in it."""
        held = self.page_table.flatten()
        seen = torch.zeros(self.num_pages + 1, dtype=torch.int32, device=self.device)
        seen.scatter_(0, torch.where(held < 0, self.num_pages, held).long(), 1)
        return torch.stack(((held >= 0).sum(), seen[:-1].sum())).int()

    def view(self, rows: slice, distinct_rows: int, num_branches: int) -> PagesView:
        return PagesView(self.kv, self.page_table[rows], distinct_rows, num_branches, self.page_size)

    def _everywhere(self, rows: slice, values: Tensor) -> Tensor:
        out = values.new_zeros(self.page_table.shape[0], *values.shape[1:])
        out[rows] = values
        return out

    def _table(self, rows: int, columns: int) -> Tensor:
        return torch.full((rows, columns), -1, dtype=torch.int32, device=self.device)

    def _pool(self) -> bbk.PagePool:
        return bbk.PagePool.of(torch.arange(self.num_pages, dtype=torch.int32, device=self.device))
