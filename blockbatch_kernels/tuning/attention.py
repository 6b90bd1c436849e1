"""How attention is cut into work, and which kernel is the fastest for it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from blockbatch_kernels.shapes import UNIT_KEYS
from blockbatch_kernels.tuning.devices import device_kind

# Of either compiled backend.
MAX_HEAD_DIM = 256


class AttentionShape(NamedTuple):
    """How `attention_plan` may cut the work."""

    tile_tokens: int  # queries a tile; times the query heads of a kv head: rows of the matrix product
    segment_pages: int  # pages that are compared between rows and cut as one
    max_segments: int  # segments a row
    max_pieces: int  # bounds the memory of partial results
    max_tiles: int
    target_tiles: int  # keys are cut finer until there are as many tiles
    min_segments: int  # but no piece gets shorter than this for it
    num_heads: int = 0  # of the queries and of the keys that the plan is for
    num_kv_heads: int = 0
    block_tokens: int = 0  # tokens of a block of a unit's tile; 0: no units are planned
    processors: int = 0  # that share the units
    max_slack: int = 0  # units beyond an equal share that a processor takes if this keeps tiles apart
    num_branches: int = 0  # rows of a request, which alone are compared; 0: all rows with each other

    def request_of(self, row: int) -> int:
        return row // self.num_branches if self.num_branches else 0

    def max_units(self, num_tokens: int, num_rows: int, page_size: int) -> int:
        """Records of a plan's units; 0: none are planned."""
        if not self.block_tokens:
            return 0
        # A row adds at most one block that is not full to its full ones.
        units = self.max_segments * -(-self.segment_pages * page_size // UNIT_KEYS)
        return 1 + (num_tokens // self.block_tokens + num_rows) * units


# A stretch of units gets no shorter than this for the sake of another processor.
MIN_STRETCH_UNITS = 2
# With 0 the tiles of a few kv heads are cut more often than they gain by it; with 2 private windows behind a
# shared prompt would be kept whole.
_MAX_SLACK = 1
_BLOCK_ROWS = 64

_SEGMENT_KEYS = 128
_MIN_PIECE_KEYS = 256
# Partial results: at most this many packed queries over all pieces (32 heads x 128 x 4 bytes: 16 KiB each).
MAX_PARTIALS = 2048
_MAX_PIECES = 32


# Keys and values of different rows that stay in L2 together, in keys times kv heads: 48 MiB in 16 bits and
# 128 elements a head.
_KEYS_IN_L2 = (48 << 20) // 512
# Rows with pages of their own for which units are the fastest whatever their length.
_FEW_ROWS = 3
# Packs up to here are windows, not whole rows: reading the keys decides.
_FEW_TOKENS = 1024


def _runs_units(device: torch.device) -> bool:
    return device_kind(device).capability == (9, 0)


def plans_units(
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    pages_per_row: int,
    distinct_rows: int,
    device: torch.device,
    *,
    num_tokens: int,
    e4m3: bool = False,
) -> bool:
    """Whether the kernel that takes its work in units is the fastest for attention on `device`.

    It reads keys once for 128 rows of the product, so pages that rows share or that stay in L2 cost little.
    What it loses to are tiles of long packs over many rows of their own pages, whose products decide. A rule
    with bounds and no look-up, since sizes may be symbols here; `rows_attention.ATTENTION` holds what was
    measured, and tests hold the rule to it.

    Args:
        page_size: keys a page.
        pages_per_row: pages that a row may have.
        distinct_rows: rows that read pages of their own; see `attention_plan`.
        num_tokens: packed queries.
        e4m3: whether the caches hold e4m3. Then tiles of 64 rows are ahead as soon as several rows have pages
            of their own, in windows too (attention_fp8.json).
    """
    if num_heads // num_kv_heads > _BLOCK_ROWS or page_size % 16 or not _runs_units(device):
        return False
    if e4m3:
        return distinct_rows <= _FEW_ROWS
    keys = distinct_rows * pages_per_row * page_size * num_kv_heads
    return num_tokens <= _FEW_TOKENS or distinct_rows <= _FEW_ROWS or keys <= _KEYS_IN_L2


@functools.cache
def attention_shape(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    pages_per_row: int,
    processors: int,
    *,
    units: bool = False,
    fixed_cut: bool = False,
) -> AttentionShape:
    """The cut for a step of `num_tokens` packed queries.

    Args:
        units: whether to plan them too.
        fixed_cut: see `attention_plan`.
    """
    # 64 rows are one warpgroup's product; long packs come from whole rows, where a tile of 128 reads K half
    # as often.
    tile_rows = 128 if num_tokens > _FEW_TOKENS and not fixed_cut else 64
    tile_tokens = max(1, tile_rows // (num_heads // num_kv_heads))
    segment_pages = max(1, _SEGMENT_KEYS // page_size)
    max_pieces = 1 if fixed_cut else max(1, min(_MAX_PIECES, MAX_PARTIALS // max(1, num_tokens)))
    group = num_heads // num_kv_heads
    return AttentionShape(
        tile_tokens=tile_tokens,
        segment_pages=segment_pages,
        max_segments=-(-pages_per_row // segment_pages),
        max_pieces=max_pieces,
        # Every group may end with a tile that is not full: `attention_plan` adds the rows.
        max_tiles=max_pieces * -(-num_tokens // tile_tokens),
        # With fewer, some processors get one tile and others two. More only add partial results.
        target_tiles=processors // num_kv_heads + 1,
        min_segments=max(1, _MIN_PIECE_KEYS // (segment_pages * page_size)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_tokens=_BLOCK_ROWS // group if units else 0,
        processors=processors if units else 0,
        max_slack=_MAX_SLACK if units else 0,
    )


def cuda_attention_is_faster(
    *,
    num_tokens: int = 0,
    num_keys: int = 0,
    head_dim: int = 0,
    element_size: int = 2,
    units: int = 0,
    e4m3: bool = False,
) -> bool:
    """Whether CUDA C++ wins on a pack of `num_tokens` over at most `num_keys` keys a row.

    Where the plan has units it does, see `plans_units`; without, for packs of whole rows
    (`rows_attention.ATTENTION`), and over caches in e4m3 for all.
    """
    if element_size != 2 or head_dim not in (64, 128):
        return False  # not on the tensor cores
    return e4m3 or units > 0 or num_tokens > 1024
