"""How the attention of a step is cut into pieces of keys, groups of rows and tiles of queries.

Plain Python over small integers: the definition that compiled versions follow bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.reference.attention_units import attention_units
from blockbatch_kernels.structs import AttentionPlan
from blockbatch_kernels.tuning import AttentionShape


def attention_plan(
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    page_size: int,
    num_tokens: int,
    shape: AttentionShape,
) -> AttentionPlan:
    table, bounds = page_table.tolist(), cu_seqlens_q.tolist()
    # Lengths beyond the table are a caller's mistake: there is nothing to read.
    lengths = [min(length, page_table.shape[1] * page_size) for length in seqlens_k.tolist()]
    queries = {
        row: range(bounds[row], bounds[row + 1])
        for row, length in enumerate(lengths)
        if bounds[row + 1] > bounds[row] and length > 0
    }
    segment_keys = shape.segment_pages * page_size
    num_segments = max((-(-lengths[row] // segment_keys) for row in queries), default=0)
    owners = [_owners(table, lengths, queries, segment, page_size, shape) for segment in range(num_segments)]
    runs = _runs(owners, queries, shape)

    # Cut the runs finer while there are fewer tiles than wanted.
    pieces: list[tuple[int, int, dict[int, int]]] = []
    for parts in range(1, num_segments + 1):
        longest = max(-(-num_segments // parts), shape.min_segments)
        finer = [piece for run in runs for piece in _cut(run, longest)]
        if pieces and len(finer) > shape.max_pieces:
            break
        pieces = finer
        tiles = sum(len(_tiles(owner, queries, shape)) for _, _, owner in pieces)
        if tiles >= shape.target_tiles or longest == shape.min_segments:
            break
    sizes = dict(page_size=page_size, num_tokens=num_tokens, shape=shape)
    units = attention_units(table, lengths, queries, **sizes)
    return _as_tensors(pieces, queries, num_tokens, segment_keys, shape, page_table, units)


def _owners(
    table: list[list[int]],
    lengths: list[int],
    queries: dict[int, range],
    segment: int,
    page_size: int,
    shape: AttentionShape,
) -> dict[int, int]:
    """For each row that reaches into the segment, the first row of its request that reads the same pages."""
    start = segment * shape.segment_pages * page_size
    first: dict[tuple, int] = {}
    owner = {}
    for row in queries:
        end = min(lengths[row], start + shape.segment_pages * page_size)
        if end > start:
            pages = table[row][start // page_size : -(-end // page_size)]
            owner[row] = first.setdefault((shape.request_of(row), end, *pages), row)
    return owner


def _runs(
    owners: list[dict[int, int]], queries: dict[int, range], shape: AttentionShape
) -> list[tuple[int, int, dict[int, int]]]:
    """Stretches [start, end) of segments with the same groups; one stretch if there would be too many."""
    runs: list[tuple[int, int, dict[int, int]]] = []
    for segment, owner in enumerate(owners):
        if runs and runs[-1][2] == owner:
            runs[-1] = (runs[-1][0], segment + 1, owner)
        else:
            runs.append((segment, segment + 1, owner))
    if len(runs) <= shape.max_pieces:
        return runs
    first: dict[tuple, int] = {}
    same = {
        row: first.setdefault((shape.request_of(row), *(owner.get(row) for owner in owners)), row)
        for row in queries
    }
    return [(0, len(owners), same)]


def _cut(run: tuple[int, int, dict[int, int]], longest: int) -> list[tuple[int, int, dict[int, int]]]:
    start, end, owner = run
    number = -(-(end - start) // longest)
    cuts = [start + (end - start) * part // number for part in range(number + 1)]
    return [(first, last, owner) for first, last in zip(cuts, cuts[1:])]


def _tiles(
    owner: dict[int, int], queries: dict[int, range], shape: AttentionShape
) -> list[tuple[int, int, int]]:
    """(first, number, row) of every tile: groups by their first row, each from a new tile on."""
    tiles, position = [], 0
    for row in sorted(set(owner.values())):
        size = sum(len(queries[member]) for member in owner if owner[member] == row)
        for first in range(0, size, shape.tile_tokens):
            tiles.append((position + first, min(shape.tile_tokens, size - first), row))
        position += size
    return tiles


def _as_tensors(
    pieces: list[tuple[int, int, dict[int, int]]],
    queries: dict[int, range],
    num_tokens: int,
    segment_keys: int,
    shape: AttentionShape,
    page_table: Tensor,
    units: tuple[Tensor, Tensor, Tensor],
) -> AttentionPlan:
    max_tiles = shape.max_tiles + shape.max_pieces * page_table.shape[0]
    tiles = torch.zeros(max_tiles, 4, dtype=torch.int32, device="cpu")
    query_order = torch.full((shape.max_pieces, num_tokens), -1, dtype=torch.int32, device="cpu")
    bounds = torch.zeros(shape.max_pieces, 2, dtype=torch.int32, device="cpu")
    token_row = torch.full((num_tokens,), -1, dtype=torch.int32, device="cpu")
    for row, packed in queries.items():
        token_row[packed.start : packed.stop] = row
    number = 0
    for index, (start, end, owner) in enumerate(pieces):
        bounds[index] = torch.tensor([start * segment_keys, end * segment_keys], device="cpu")
        order = [token for row in sorted(owner, key=lambda row: (owner[row], row)) for token in queries[row]]
        query_order[index, : len(order)] = torch.tensor(order, dtype=torch.int32, device="cpu")
        for tile in _tiles(owner, queries, shape):
            tiles[number] = torch.tensor([index, *tile], dtype=torch.int32, device="cpu")
            number += 1
    counts = torch.tensor([number, len(pieces)], dtype=torch.int32, device="cpu")
    tensors = (tiles, query_order, bounds, token_row, counts, *units)
    return AttentionPlan(
        *(tensor.to(page_table.device) for tensor in tensors),
        shape.tile_tokens,
        shape.num_heads,
        shape.num_kv_heads,
    )
