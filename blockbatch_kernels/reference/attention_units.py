"""The units of an attention plan: for each tile of queries the keys its rows read, 128 at a time.

A tile holds two blocks of up to `block_tokens` tokens each (64 rows of the matrix product). A row of the
batch goes into the block in front of it where all of the row fits and the row in front of it reads the same
first segment of pages, and starts a new block otherwise; if it shares nothing and fills several blocks, the
first one of a tile, so that its keys come up once for two blocks. For every segment of keys a tile has the
units of one group of its rows after another, where a group reads the same pages in that segment. So pages
that rows share come up once a tile, all keys of a token in one tile, and where rows share nothing the two
blocks of a tile take turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blockbatch_kernels.tuning import UNIT_INTEGERS, UNIT_KEYS, AttentionShape


def attention_units(
    table: list[list[int]],
    lengths: list[int],
    queries: dict[int, range],
    *,
    page_size: int,
    num_tokens: int,
    shape: AttentionShape,
) -> tuple[Tensor, Tensor]:
    """`units` and `arrivals` of an `AttentionPlan`, on the CPU.

    Args:
        table, lengths: pages and keys of every row.
        queries: packed tokens of the rows that have queries and keys.
    """
    units = torch.zeros(shape.max_units(num_tokens, len(table), page_size), UNIT_INTEGERS, dtype=torch.int32)
    arrivals = torch.zeros(2 * shape.processors, dtype=torch.int32)
    if not shape.block_tokens:
        return units, arrivals
    records: list[list[int]] = []
    first_keys = {row: _first_keys(table[row], lengths[row], page_size, shape) for row in queries}
    blocks = _blocks(queries, first_keys, shape.block_tokens)
    for index in range(0, len(blocks), 2):
        tile = [*blocks[index : index + 2], range(0)][:2]
        found = list(_units(tile, table, lengths, queries, page_size, shape))
        begin = len(records)
        for num_keys, first_slot, masks, pages in found:
            words = [mask >> shift & 0xFFFFFFFF for mask in masks for shift in (0, 32)]
            record = [begin, begin + len(found)]
            record += [block.start for block in tile] + [len(block) for block in tile]
            record += [num_keys, first_slot]
            record += [word - 2**32 if word >= 2**31 else word for word in words]
            record += pages
            records.append(record + [0] * (UNIT_INTEGERS - len(record)))
    units[0, 0] = len(records)
    if records:
        units[1 : 1 + len(records)] = torch.tensor(records, dtype=torch.int32)
    return units, arrivals


def _copy_keys(page_size: int) -> int:
    """Keys that one copy moves: the largest power of two that divides a page, up to 64."""
    keys = 1
    while keys < 64 and page_size % (2 * keys) == 0:
        keys *= 2
    return keys


def _first_keys(pages: list[int], length: int, page_size: int, shape: AttentionShape) -> tuple[int, ...]:
    """Where a row's keys of the first segment end, and their pages."""
    end = min(length, shape.segment_pages * page_size)
    return end, *pages[: -(-end // page_size)]


def _blocks(
    queries: dict[int, range], first_keys: dict[int, tuple[int, ...]], block_tokens: int
) -> list[range]:
    blocks: list[range] = []
    previous = None
    for row, tokens in queries.items():
        shares = previous is not None and first_keys[row] == first_keys[previous]
        previous = row
        last = blocks[-1] if blocks else range(0)
        if shares and last.stop == tokens.start and tokens.stop - last.start <= block_tokens:
            blocks[-1] = range(last.start, tokens.stop)
            continue
        if not shares and len(tokens) > block_tokens and len(blocks) % 2:
            blocks.append(range(tokens.start, tokens.start))
        for first in range(tokens.start, tokens.stop, block_tokens):
            blocks.append(range(first, min(first + block_tokens, tokens.stop)))
    return blocks


def _mask(block: range, tokens: range) -> int:
    """A bit for each token of the block that is one of `tokens`."""
    first, last = max(block.start, tokens.start), min(block.stop, tokens.stop)
    return ((1 << (last - first)) - 1) << (first - block.start) if last > first else 0


def _units(
    tile: list[range],
    table: list[list[int]],
    lengths: list[int],
    queries: dict[int, range],
    page_size: int,
    shape: AttentionShape,
) -> Iterator[tuple[int, int, list[int], list[int]]]:
    """(keys, first slot in the first page, bits of the tokens, page of each copy) of the units of a tile."""
    masks = {row: [_mask(block, tokens) for block in tile] for row, tokens in queries.items()}
    rows = [row for row in queries if any(masks[row])]
    segment_keys, step = shape.segment_pages * page_size, _copy_keys(page_size)
    for start in range(0, max(lengths[row] for row in rows), segment_keys):
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            end = min(lengths[row], start + segment_keys)
            if end > start:
                pages = table[row][start // page_size : -(-end // page_size)]
                groups.setdefault((end, *pages), []).append(row)
        for (end, *_), group in groups.items():
            bits = [sum(masks[row][block] for row in group) for block in (0, 1)]
            for first in range(start, end, UNIT_KEYS):
                num_keys = min(UNIT_KEYS, end - first)
                pages = [table[group[0]][key // page_size] for key in range(first, first + num_keys, step)]
                yield num_keys, first % page_size, bits, pages
