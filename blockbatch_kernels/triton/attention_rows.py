"""What rows read and whom they share it with: the parts of `attention_plan`."""

import triton
import triton.language as tl


@triton.jit
def num_queries_of(cu_seqlens_q, seqlens_k, row, num_rows):
    """Queries of each row, none in a row without keys."""
    is_row = row < num_rows
    first = tl.load(cu_seqlens_q + row, mask=is_row, other=0)
    behind = tl.load(cu_seqlens_q + row + 1, mask=is_row, other=0)
    return tl.where(tl.load(seqlens_k + row, mask=is_row, other=0) > 0, behind - first, 0)


@triton.jit
def num_keys_of(cu_seqlens_q, seqlens_k, row, num_rows, most):
    """Keys of each row, no more than its pages hold, and none in a row without queries."""
    is_row = row < num_rows
    first = tl.load(cu_seqlens_q + row, mask=is_row, other=0)
    behind = tl.load(cu_seqlens_q + row + 1, mask=is_row, other=0)
    return tl.where(behind > first, tl.minimum(tl.load(seqlens_k + row, mask=is_row, other=0), most), 0)


@triton.jit
def others_of(row, first, num_branches, num_rows, BLOCK_COLUMNS: tl.constexpr):
    """[rows, BLOCK_COLUMNS]: rows of each row's request from its `first` on; `num_rows` where none is."""
    place = first + tl.arange(0, BLOCK_COLUMNS)
    other = (row // num_branches * num_branches)[:, None] + place[None, :]
    return tl.where((place < num_branches)[None, :] & (other < num_rows), other, num_rows)


@triton.jit
def owner_in(
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """[BLOCK_ROWS]: the first row of its request with the same pages in the segment; -1: it ends before."""
    row = tl.arange(0, BLOCK_ROWS)
    start = segment * segment_pages * page_size
    num_keys = num_keys_of(cu_seqlens_q, seqlens_k, row, num_rows, most)
    end = tl.minimum(num_keys, start + segment_pages * page_size)
    owner = tl.full([BLOCK_ROWS], BLOCK_ROWS, tl.int32)
    for first in range(0, num_branches, BLOCK_COLUMNS):
        other = others_of(row, first, num_branches, num_rows, BLOCK_COLUMNS)
        other_keys = num_keys_of(cu_seqlens_q, seqlens_k, other, num_rows, most)
        other_end = tl.minimum(other_keys, start + segment_pages * page_size)
        differ = (end[:, None] != other_end).to(tl.int32)
        for index in tl.range(0, segment_pages, loop_unroll_factor=8):
            page = segment * segment_pages + index
            reads, other_reads = page * page_size < end, page * page_size < other_end
            column = page * table_strides[1]
            mine = tl.load(page_table + row * table_strides[0] + column, mask=reads, other=-1)
            others = tl.load(page_table + other * table_strides[0] + column, mask=other_reads, other=-1)
            differ |= (reads[:, None] & (mine[:, None] != others)).to(tl.int32)
        owner = tl.minimum(owner, tl.min(tl.where(differ == 0, other, BLOCK_ROWS), axis=1))
    return tl.where(end > start, owner, -1)


@triton.jit
def num_tiles_of(
    owner_of,  # [rows]: written by this program
    cu_seqlens_q,
    seqlens_k,
    num_rows,
    tile_tokens,
    num_branches,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Tiles of all groups together."""
    tl.debug_barrier()
    row, size = tl.arange(0, BLOCK_ROWS), tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(0, num_branches, BLOCK_COLUMNS):
        other = others_of(row, first, num_branches, num_rows, BLOCK_COLUMNS)
        num_queries = num_queries_of(cu_seqlens_q, seqlens_k, other, num_rows)
        owner = tl.load(owner_of + other, mask=other < num_rows, other=-1)
        size += tl.sum(tl.where(owner == row[:, None], num_queries, 0), axis=1)
    return tl.sum((size + tile_tokens - 1) // tile_tokens, axis=0)


@triton.jit
def row_of(token, cu_seqlens_q, num_rows, BLOCK_ROWS: tl.constexpr):
    """The row of each packed token: the last one that begins there or before; -1 behind all of them."""
    row = tl.zeros_like(token)
    step = BLOCK_ROWS // 2
    while step > 0:
        further = row + step
        begin = tl.load(cu_seqlens_q + further, mask=further < num_rows, other=2**31 - 1)
        row = tl.where(begin <= token, further, row)
        step = step // 2
    return tl.where(token < tl.load(cu_seqlens_q + num_rows), row, -1)
