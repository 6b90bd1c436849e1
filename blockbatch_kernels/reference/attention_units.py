"""The units of an attention plan: for each tile of queries the keys its rows read, 128 at a time.

A tile holds two blocks of up to `block_tokens` tokens each (64 rows of the matrix product). A row of the
batch goes into the block in front of it where all of the row fits and the row in front of it reads the same
first segment of pages, and starts a new block otherwise; if it shares nothing and fills several blocks, the
first one of a tile, so that its keys come up once for two blocks. For every segment of keys a tile has the
units of one group of its rows after another, where a group reads the same pages in that segment. So pages
that rows share come up once a tile, all keys of a token in one tile, and where rows share nothing the two
blocks of a tile take turns. Keys of one tile alone need not stay in L2, so a unit says whether they are.

All units of a kv head form a line, of which every processor takes a stretch (`_stretches`). A tile that is
cut costs its processors partial results, and a stretch over two tiles costs its processor the rows of both.
So the stretches keep to the tiles where the longest is hardly longer for it, and else are equal.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from blockbatch_kernels.shapes import STRETCH_INTEGERS, UNIT_INTEGERS, UNIT_KEYS
from blockbatch_kernels.tuning import MIN_STRETCH_UNITS, AttentionShape


def attention_units(
    table: list[list[int]],
    lengths: list[int],
    queries: dict[int, range],
    *,
    page_size: int,
    num_tokens: int,
    shape: AttentionShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """`units`, `stretches` and `arrivals` of an `AttentionPlan`, on the CPU.

    Args:
        table, lengths: pages and keys of every row.
        queries: packed tokens of the rows that have queries and keys.
    """
    units = torch.zeros(
        shape.max_units(num_tokens, len(table), page_size), UNIT_INTEGERS, dtype=torch.int32, device="cpu"
    )
    stretches = torch.zeros(shape.processors, STRETCH_INTEGERS, dtype=torch.int32, device="cpu")
    arrivals = torch.zeros(2 * shape.processors, dtype=torch.int32, device="cpu")
    if not shape.block_tokens:
        return units, stretches, arrivals
    records: list[list[int]] = []
    sizes: list[int] = []
    first_keys = {
        row: (shape.request_of(row), *_first_keys(table[row], lengths[row], page_size, shape))
        for row in queries
    }
    blocks = _blocks(queries, first_keys, shape.block_tokens)
    tiles = [[*blocks[index : index + 2], range(0)][:2] for index in range(0, len(blocks), 2)]
    groups = [_groups(tile, table, lengths, queries, page_size, shape) for tile in tiles]
    readers = Counter((request, start, keys) for found in groups for request, start, keys, _ in found)
    for tile, found in zip(tiles, groups):
        begin = len(records)
        for request, start, keys, masks in found:
            words = [mask >> shift & 0xFFFFFFFF for mask in masks for shift in (0, 32)]
            for num_keys, first_slot, pages in _units(start, keys, page_size):
                record = [block.start for block in tile] + [len(block) for block in tile]
                record += [num_keys, first_slot]
                record += [word - 2**32 if word >= 2**31 else word for word in words]
                record += pages + [0] * (8 - len(pages))
                records.append([*record, int(readers[request, start, keys] == 1), 0])
        sizes.append(len(records) - begin)
        records[begin:] = [[begin, len(records), *record] for record in records[begin:]]
    units[0, 0] = len(records)
    if records:
        units[1 : 1 + len(records)] = torch.tensor(records, dtype=torch.int32, device="cpu")
        cut = torch.tensor(_stretches(sizes, shape), dtype=torch.int32, device="cpu")
        stretches[: len(cut), :3] = cut
    return units, stretches, arrivals


def _stretches(sizes: list[int], shape: AttentionShape) -> list[tuple[int, int, int]]:
    """(first unit, unit behind the last, first processor of the first unit's tile) of each processor.

    Every kv head's line is cut alike; with fewer processors than heads all lines together are.

    Args:
        sizes: units of each tile.
    """
    heads = shape.num_kv_heads
    lines = heads if shape.processors >= heads else 1
    units, processors = sum(sizes) * heads // lines, shape.processors // lines
    starts = [
        head * sum(sizes) + sum(sizes[:tile]) for head in range(heads // lines) for tile in range(len(sizes))
    ]
    cuts = _whole_tiles(sizes, processors, shape.max_slack) if lines == heads else []
    if not cuts:
        number = min(processors, -(-units // MIN_STRETCH_UNITS))
        cuts = [units * part // number for part in range(number + 1)]
    stretches = []
    for line in range(lines):
        for begin, end in zip(cuts, cuts[1:]):
            tile = max(start for start in starts if start <= begin)
            first = sum(cut <= tile for cut in cuts) - 1
            stretches.append((line * units + begin, line * units + end, line * (len(cuts) - 1) + first))
    return stretches


def _whole_tiles(sizes: list[int], processors: int, max_slack: int) -> list[int]:
    """Cuts such that no stretch holds units of two tiles; none if one would be too long."""
    least = max(-(-sum(sizes) // processors), MIN_STRETCH_UNITS)
    for longest in range(least, least + max_slack + 1):
        parts = [-(-size // longest) for size in sizes]
        if sum(parts) <= processors:
            cuts, start = [0], 0
            for size, number in zip(sizes, parts):
                cuts += [start + size * (part + 1) // number for part in range(number)]
                start += size
            return cuts
    return []


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


def _groups(
    tile: list[range],
    table: list[list[int]],
    lengths: list[int],
    queries: dict[int, range],
    page_size: int,
    shape: AttentionShape,
) -> list[tuple[int, int, tuple[int, ...], list[int]]]:
    """(request, first key, where the keys end and their pages, bits of the tokens of both blocks) of each
    group."""
    # Rows follow each other by their tokens: only those that reach into the tile are looked at.
    every = list(queries)
    first = bisect_right(every, tile[0].start, key=lambda row: queries[row].stop)
    rows = list(itertools.takewhile(lambda row: queries[row].start < _end(tile), every[first:]))
    masks = {row: [_mask(block, queries[row]) for block in tile] for row in rows}
    rows = [row for row in rows if any(masks[row])]
    segment_keys = shape.segment_pages * page_size
    found = []
    for start in range(0, max(lengths[row] for row in rows), segment_keys):
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for row in rows:
            end = min(lengths[row], start + segment_keys)
            if end > start:
                pages = table[row][start // page_size : -(-end // page_size)]
                groups.setdefault((shape.request_of(row), (end, *pages)), []).append(row)
        for (request, keys), group in groups.items():
            bits = [sum(masks[row][block] for row in group) for block in (0, 1)]
            found.append((request, start, keys, bits))
    return found


def _end(tile: list[range]) -> int:
    """The token behind the last one of a tile, whose second block may be empty."""
    return max(block.stop for block in tile)


def _units(start: int, keys: tuple[int, ...], page_size: int) -> Iterator[tuple[int, int, list[int]]]:
    """(keys, first slot in the first page, page of each copy) of the units of a group's keys."""
    end, *pages = keys
    for first in range(start, end, UNIT_KEYS):
        num_keys = min(UNIT_KEYS, end - first)
        step = _copy_keys(page_size)
        copied = [pages[(key - start) // page_size] for key in range(first, first + num_keys, step)]
        yield num_keys, first % page_size, copied
