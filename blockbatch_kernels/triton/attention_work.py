"""`attention_plan` in three launches: groups of each segment of keys, pieces, then their queries and tiles.

`reference/attention_plan.py` defines the result and its terms. Rows of a request are compared in all pairs, a
block of columns at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels.shapes import STRETCH_INTEGERS, UNIT_INTEGERS
from blockbatch_kernels.structs import AttentionPlan
from blockbatch_kernels.triton.attention_rows import (
    num_keys_of,
    num_queries_of,
    num_tiles_of,
    others_of,
    owner_in,
    row_of,
)
from blockbatch_kernels.triton.launch import on_device_of_first
from blockbatch_kernels.tuning import AttentionShape

# Pairs of rows that are compared at a time, at most: they are held in registers.
_MOST_COLUMNS, _MOST_PAIRS = 16, 2048
_BLOCK_TOKENS = 256


# Compiled once for all shapes: the integers are no reason for another version.
@triton.jit(
    do_not_specialize=["num_rows", "page_size", "segment_pages", "tile_tokens", "most", "num_branches"]
)
def _segments_kernel(
    page_table,
    table_strides,
    cu_seqlens_q,
    seqlens_k,
    owners,  # [max_segments + 1, rows]; the last row is left to _pieces_kernel
    segments,  # [2, max_segments]: whether the groups differ from the segment's before, number of tiles
    num_rows,
    page_size,
    segment_pages,
    tile_tokens,
    most,  # keys that the pages of a row hold
    num_branches,  # rows of a request
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    segment, row = tl.program_id(0), tl.arange(0, BLOCK_ROWS)
    owner = owner_in(
        segment,
        page_table,
        table_strides,
        cu_seqlens_q,
        seqlens_k,
        num_rows,
        page_size,
        segment_pages,
        most,
        num_branches,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )
    # Computed twice rather than read from another program.
    previous = owner_in(
        tl.maximum(segment - 1, 0),
        page_table,
        table_strides,
        cu_seqlens_q,
        seqlens_k,
        num_rows,
        page_size,
        segment_pages,
        most,
        num_branches,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )
    differs = tl.max(((owner != previous) & (row < num_rows)).to(tl.int32), axis=0)
    tl.store(owners + segment * num_rows + row, owner, mask=row < num_rows)
    tl.store(segments + segment, tl.where(segment == 0, 1, differs))
    number = num_tiles_of(
        owners + segment * num_rows,
        cu_seqlens_q,
        seqlens_k,
        num_rows,
        tile_tokens,
        num_branches,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )
    tl.store(segments + tl.num_programs(0) + segment, number)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit(
    do_not_specialize=["num_rows", "max_segments", "segment_keys", "tile_tokens", "max_pieces"]
    + ["target_tiles", "min_segments", "most", "num_branches"]
)
def _pieces_kernel(
    cu_seqlens_q,
    seqlens_k,
    owners,  # [max_segments + 1, rows]; the last row: written if there are too many runs
    segments,  # [2, max_segments]
    pieces,  # [max_pieces, 2]; written
    work,  # [max_pieces, 2]: row of `owners` that holds the piece's groups, number of its first tile; written
    counts,  # [2]; written
    num_rows,
    max_segments,
    segment_keys,
    tile_tokens,
    max_pieces,
    target_tiles,
    min_segments,
    most,
    num_branches,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row, segment = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_SEGMENTS)
    num_keys = num_keys_of(cu_seqlens_q, seqlens_k, row, num_rows, most)
    num_segments = (tl.max(num_keys, axis=0) + segment_keys - 1) // segment_keys
    starts_run = tl.load(segments + segment, mask=segment < num_segments, other=0)
    num_tiles = tl.load(segments + max_segments + segment, mask=segment < num_segments, other=0)
    next_starts = tl.load(segments + segment + 1, mask=segment + 1 < num_segments, other=0)
    next_start = tl.where(next_starts != 0, segment + 1, num_segments)
    length = tl.associative_scan(next_start, 0, _smaller, reverse=True) - segment
    group_row = segment
    if tl.sum(starts_run, axis=0) > max_pieces:
        # One run, whose groups are the rows that are together in every segment.
        owner = tl.full([BLOCK_ROWS], BLOCK_ROWS, tl.int32)
        for first in range(0, num_branches, BLOCK_COLUMNS):
            other = others_of(row, first, num_branches, num_rows, BLOCK_COLUMNS)
            differ = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.int32)
            for index in range(num_segments):
                mine = tl.load(owners + index * num_rows + row, mask=row < num_rows, other=-1)
                others = tl.load(owners + index * num_rows + other, mask=other < num_rows, other=-2)
                differ |= (mine[:, None] != others).to(tl.int32)
            owner = tl.minimum(owner, tl.min(tl.where(differ == 0, other, BLOCK_ROWS), axis=1))
        owner = tl.where(num_keys > 0, owner, -1)
        tl.store(owners + max_segments * num_rows + row, owner, mask=row < num_rows)
        number = num_tiles_of(
            owners + max_segments * num_rows,
            cu_seqlens_q,
            seqlens_k,
            num_rows,
            tile_tokens,
            num_branches,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
        starts_run = (segment == 0).to(tl.int32)
        length = tl.zeros([BLOCK_SEGMENTS], tl.int32) + num_segments
        num_tiles = tl.zeros([BLOCK_SEGMENTS], tl.int32) + number
        group_row = tl.zeros([BLOCK_SEGMENTS], tl.int32) + max_segments

    number = tl.zeros([BLOCK_SEGMENTS], tl.int32)  # of pieces that each run is cut into
    parts = 1
    going = num_segments > 0
    while going:
        longest = tl.maximum((num_segments + parts - 1) // parts, min_segments)
        finer = tl.where(starts_run != 0, (length + longest - 1) // longest, 0)
        fits = tl.sum(finer, axis=0) <= max_pieces
        number = tl.where(fits, finer, number)
        enough = tl.sum(finer * num_tiles, axis=0) >= target_tiles
        going = fits & (enough == 0) & (longest != min_segments) & (parts < num_segments)
        parts += 1

    first_piece = tl.cumsum(number, 0) - number
    first_tile = tl.cumsum(number * num_tiles, 0) - number * num_tiles
    divisor = tl.maximum(number, 1)
    for part in range(tl.max(number, axis=0)):
        piece, is_piece = first_piece + part, part < number
        start = segment + length * part // divisor
        end = segment + length * (part + 1) // divisor
        tl.store(pieces + 2 * piece, start * segment_keys, mask=is_piece)
        tl.store(pieces + 2 * piece + 1, end * segment_keys, mask=is_piece)
        tl.store(work + 2 * piece, group_row, mask=is_piece)
        tl.store(work + 2 * piece + 1, first_tile + part * num_tiles, mask=is_piece)
    num_pieces = tl.sum(number, axis=0)
    piece = tl.arange(0, BLOCK_PIECES)
    unused = (piece >= num_pieces) & (piece < max_pieces)
    tl.store(pieces + 2 * piece, tl.zeros([BLOCK_PIECES], tl.int32), mask=unused)
    tl.store(pieces + 2 * piece + 1, tl.zeros([BLOCK_PIECES], tl.int32), mask=unused)
    tl.store(counts, tl.sum(number * num_tiles, axis=0))
    tl.store(counts + 1, num_pieces)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "max_tiles", "tile_tokens", "num_branches"])
def _tiles_kernel(
    cu_seqlens_q,
    seqlens_k,
    owners,
    work,
    counts,
    tiles,  # [max_tiles, 4]; written
    query_order,  # [max_pieces, tokens]; written
    token_row,  # [tokens]; written
    begins,  # [max_pieces, rows]: places of the rows' first queries in `query_order`; written
    num_rows,
    num_tokens,
    max_tiles,
    tile_tokens,
    num_branches,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    piece, row, index = tl.program_id(0), tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_TOKENS)
    # No row reads a piece that is not in use, whose `work` is not written either.
    num_readers = tl.where(piece < tl.load(counts + 1), num_rows, 0)
    owner_of = owners + tl.load(work + 2 * piece) * num_rows
    owner = tl.load(owner_of + row, mask=row < num_readers, other=-1)
    num_queries = num_queries_of(cu_seqlens_q, seqlens_k, row, num_rows)
    num_read = tl.where(owner >= 0, num_queries, 0)
    # Rows by (owner, row): where each begins, and how many queries its group has if it is the first. In front
    # of a request are those before it in either order.
    begin, size = tl.cumsum(num_read, 0) - num_read, tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(0, num_branches, BLOCK_COLUMNS):
        other = others_of(row, first, num_branches, num_rows, BLOCK_COLUMNS)
        other_queries = num_queries_of(cu_seqlens_q, seqlens_k, other, num_rows)
        other_owner = tl.load(owner_of + other, mask=other < num_readers, other=-1)
        other_queries = tl.where(other_owner >= 0, other_queries, 0)
        later, is_row_before = other_owner - owner[:, None], other < row[:, None]
        before = (later < 0) | ((later == 0) & is_row_before)
        begin += tl.sum(
            tl.where(before, other_queries, 0) - tl.where(is_row_before, other_queries, 0), axis=1
        )
        size += tl.sum(tl.where(other_owner == row[:, None], other_queries, 0), axis=1)
    tl.store(begins + piece * num_rows + row, begin, mask=row < num_rows)
    tl.debug_barrier()

    number = tl.where(owner == row, (size + tile_tokens - 1) // tile_tokens, 0)
    first_tile = tl.load(work + 2 * piece + 1) + tl.cumsum(number, 0) - number
    for part in range(tl.max(number, axis=0)):
        tile, is_tile, first = tiles + 4 * (first_tile + part), part < number, part * tile_tokens
        tl.store(tile, tl.zeros([BLOCK_ROWS], tl.int32) + piece, mask=is_tile)
        tl.store(tile + 1, begin + first, mask=is_tile)
        tl.store(tile + 2, tl.minimum(tile_tokens, size - first), mask=is_tile)
        tl.store(tile + 3, row, mask=is_tile)
    behind = tl.load(counts) * 4
    for first in range(behind + piece * BLOCK_TOKENS, max_tiles * 4, tl.num_programs(0) * BLOCK_TOKENS):
        nothing = tl.zeros([BLOCK_TOKENS], tl.int32)
        tl.store(tiles + first + index, nothing, mask=first + index < max_tiles * 4)

    order = query_order + piece.to(tl.int64) * num_tokens
    for first in range(0, num_tokens, BLOCK_TOKENS):
        token = first + index
        of = row_of(token, cu_seqlens_q, num_rows, BLOCK_ROWS)
        is_read = (of >= 0) & (of < num_readers) & (token < num_tokens)
        is_read &= tl.load(owner_of + of, mask=is_read, other=-1) >= 0
        to = tl.load(begins + piece * num_rows + of, mask=is_read, other=0)
        to += token - tl.load(cu_seqlens_q + of, mask=is_read, other=0)
        tl.store(order + to, token, mask=is_read)
    num_ordered = tl.sum(num_read, axis=0)
    for first in range(num_ordered, num_tokens, BLOCK_TOKENS):
        token = first + index
        tl.store(order + token, tl.full([BLOCK_TOKENS], -1, tl.int32), mask=token < num_tokens)

    for first in range(piece * BLOCK_TOKENS, num_tokens, tl.num_programs(0) * BLOCK_TOKENS):
        token = first + index
        name = row_of(token, cu_seqlens_q, num_rows, BLOCK_ROWS)
        name = tl.where(tl.load(seqlens_k + name, mask=name >= 0, other=0) > 0, name, -1)
        tl.store(token_row + token, name, mask=token < num_tokens)


@on_device_of_first
def attention_plan(
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    page_size: int,
    num_tokens: int,
    shape: AttentionShape,
) -> AttentionPlan:
    num_rows, device = page_table.shape[0], page_table.device
    cu_seqlens_q, seqlens_k = cu_seqlens_q.contiguous(), seqlens_k.contiguous()
    max_segments, max_pieces = max(1, shape.max_segments), shape.max_pieces

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    plan = AttentionPlan(
        tiles=empty(shape.max_tiles + max_pieces * num_rows, 4),
        query_order=empty(max_pieces, num_tokens),
        pieces=empty(max_pieces, 2),
        token_row=empty(num_tokens),
        counts=empty(2),
        units=empty(0, UNIT_INTEGERS),  # the CUDA backend's alone
        stretches=empty(0, STRETCH_INTEGERS),
        arrivals=empty(0),
        tile_tokens=shape.tile_tokens,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
    )
    owners, segments, work = empty(max_segments + 1, num_rows), empty(2, max_segments), empty(max_pieces, 2)
    begins, num_branches = empty(max_pieces, num_rows), shape.num_branches or max(1, num_rows)
    most = page_table.shape[1] * page_size
    # Blocks are seldom smaller than these, and every other size would be compiled.
    block_rows = max(16, triton.next_power_of_2(num_rows))
    columns = min(_MOST_COLUMNS, max(1, _MOST_PAIRS // block_rows), triton.next_power_of_2(num_branches))
    rows = dict(num_branches=num_branches, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=columns)
    _segments_kernel[(max_segments,)](
        page_table,
        page_table.stride(),
        cu_seqlens_q,
        seqlens_k,
        owners,
        segments,
        num_rows,
        page_size=page_size,
        segment_pages=shape.segment_pages,
        tile_tokens=shape.tile_tokens,
        most=most,
        **rows,
    )
    _pieces_kernel[(1,)](
        cu_seqlens_q,
        seqlens_k,
        owners,
        segments,
        plan.pieces,
        work,
        plan.counts,
        num_rows,
        max_segments,
        segment_keys=shape.segment_pages * page_size,
        tile_tokens=shape.tile_tokens,
        max_pieces=max_pieces,
        target_tiles=shape.target_tiles,
        min_segments=shape.min_segments,
        most=most,
        BLOCK_PIECES=max(32, triton.next_power_of_2(max_pieces)),
        BLOCK_SEGMENTS=max(64, triton.next_power_of_2(max_segments)),
        **rows,
    )
    _tiles_kernel[(max_pieces,)](
        cu_seqlens_q,
        seqlens_k,
        owners,
        work,
        plan.counts,
        plan.tiles,
        plan.query_order,
        plan.token_row,
        begins,
        num_rows,
        num_tokens,
        plan.tiles.shape[0],
        tile_tokens=shape.tile_tokens,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        **rows,
    )
    return plan
