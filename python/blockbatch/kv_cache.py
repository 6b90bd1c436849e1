"""The unified paged K/V cache of all branches: one page table per row, shared pages, copy on write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import blockbatch_kernels as bbk

# Windows start at multiples of 4 or more, so small pages waste little; the first figure to revisit on a GPU.
PAGE_SIZE = 16


def pages_per_row(canvas_length: int, page_size: int = PAGE_SIZE) -> int:
    return -(-canvas_length // page_size)


def cache_bytes(
    num_rows: int,
    canvas_length: int,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_size: int = PAGE_SIZE,
) -> int:
    """Bytes of a cache in which every row may come to own all its pages."""
    positions = num_rows * pages_per_row(canvas_length, page_size) * page_size
    return 2 * num_layers * positions * num_kv_heads * head_dim * dtype.itemsize


def layer_bytes(spec: Any, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens of so many rows in one layer."""
    positions = tokens + rows * PAGE_SIZE
    return 2 * positions * spec.num_kv_heads * spec.head_dim * dtype.itemsize


class KVCache:
    """K and V of all rows, allocated once.

    Attributes:
        kv: [layers, 2, pages, page_size, num_kv_heads, head_dim].
        scales: of K and V in e4m3, what `kv` is to be multiplied with; None: it holds the numbers.
        page_table: [rows, pages_per_row] int32, -1 before the first forward.
        distinct_rows: what the host knows of the rows of the next forward, see `bbk.attention_plan`.
    """

    def __init__(
        self,
        num_requests: int,
        num_branches: int,
        canvas_length: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE_SIZE,
        backend: str | None = None,
        scales: Any = None,
    ) -> None:
        self.num_branches, self.page_size, self.backend = num_branches, page_size, backend
        self.scales = scales
        columns, num_rows = pages_per_row(canvas_length, page_size), num_requests * num_branches
        shape = (num_layers, 2, num_rows * columns, page_size, num_kv_heads, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.page_table = torch.full((num_rows, columns), -1, dtype=torch.int32, device=device)
        self.distinct_rows = num_rows

    def reset(self) -> None:
        """Back to no pages at all; what they hold is never read before it is written anew."""
        self.page_table.fill_(-1)

    def make_private(
        self, write_start: Tensor, write_end: Tensor, write_positions: Tensor | None = None
    ) -> None:
        """Gives each row pages of its own where it is about to write positions [write_start, write_end)."""
        bbk.copy_pages(
            self.kv,
            self.page_table,
            write_start,
            write_end,
            num_branches=self.num_branches,
            write_positions=write_positions,
            backend=self.backend,
        )

    def prepare(self, plan: bbk.StepPlan) -> None:
        """Makes every page that the planned forward writes private to its row.

        Rows that will take over another row's result give up their pages first, so that the row they copy
        does not leave a page only because of them.
        """
        rows = torch.arange(self.page_table.shape[0], device=self.page_table.device)
        follows = (plan.source_row >= 0) & (plan.source_row != rows)
        self.page_table.masked_fill_(follows.unsqueeze(1), -1)
        self.make_private(plan.query_start, plan.query_end)

    def share(self, source_row: Tensor) -> None:
        """Points rows at the pages of their source rows (-1 or itself: stays). No K or V moves."""
        bbk.share_pages(self.page_table, source_row, backend=self.backend)
