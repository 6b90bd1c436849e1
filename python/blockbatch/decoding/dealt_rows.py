"""Whole rows dealt out to ranks that each hold all weights beside their part.

A row is computed by one rank, with all heads and without a sum over ranks. Behind a layer's attention its
keys and values go to the ranks whose heads they are, so that every rank's cache holds its heads of all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.decoding.batch import Batch
from blockbatch.decoding.packing import pack, plan_of, predict
from blockbatch.kv_cache import pages_per_row
from blockbatch.parallel import Share
from blockbatch.parallel.exchange import as_words
from blockbatch.steps import HostPlan


class _Dealt(NamedTuple):
    """Rows that one rank computes at once.

    Attributes:
        rows: of the batch, ascending.
        pages: how many each of them fills.
        packed: their queries, in the slots of the batch's cache.
    """

    rows: list[int]
    pages: list[int]
    packed: bbk.PackedQueries


class _Layers:
    """Stands for the keys and values of all layers, which take turns on the same memory.

    Two at a time: those of one layer are on their way to other ranks while the next one's are computed.

    Args:
        shape: of a layer's.
    """

    def __init__(self, num_layers: int, shape: tuple[int, ...], like: Tensor) -> None:
        # Zeros: what lies behind the end of a row meets weights of zero.
        self._turns = torch.zeros(2, *shape, dtype=like.dtype, device=like.device)
        self.shape, self.device = (num_layers, *shape), like.device

    def __getitem__(self, layer: int) -> Tensor:
        return self._turns[layer % 2]

    def element_size(self) -> int:
        return self._turns.element_size()


class _LayerCache:
    """Stands for a `KVCache` of a rank's rows with all heads.

    Args:
        num_pages: of the rank with the most.
    """

    def __init__(self, model, batch: Batch, own: _Dealt, num_pages: int) -> None:
        spec, cache = model.spec, batch.cache
        self.page_size, self.distinct_rows = cache.page_size, len(own.rows)
        self.num_branches = 1  # no row has pages of another one
        shape = (2, num_pages, self.page_size, spec.num_kv_heads, spec.head_dim)
        self.kv = _Layers(spec.num_layers, shape, cache.kv)
        table = [[-1] * cache.page_table.shape[1] for _ in range(cache.page_table.shape[0])]
        starts, first = [0] * len(table), 0
        for row, count in zip(own.rows, own.pages, strict=True):
            table[row][:count] = range(first, first + count)
            starts[row] = first * self.page_size
            first += count
        device = cache.page_table.device
        self.page_table = torch.tensor(table, dtype=torch.int32, device="cpu").to(device)
        start = torch.tensor(starts, dtype=torch.int64, device="cpu").to(device)
        slots = start[own.packed.row_index.long()] + own.packed.positions
        self.packed = own.packed._replace(slot_mapping=slots)


def predict_dealt(
    share: Share, batch: Batch, plan: HostPlan, max_tokens: int
) -> tuple[list[bbk.Predictions], list[int]]:
    """Computes as many of the planned rows as every rank can have an equal number of.

    Args:
        share: of the model, with a whole one.
        max_tokens: see `forward.whole_rows`; for each rank.

    Returns:
        predictions, the same bits on every rank, and the lengths of the rows that are left: 0 for the others.
    """
    lengths, size = list(plan.query_lengths), share.size
    rows = [row for row, length in enumerate(lengths) if length]
    if len(rows) < size or any(plan.query_start):  # rows that look back at keys which other ranks hold
        return [], lengths
    predictions = []
    for each in _rounds(rows, lengths, size, max_tokens):
        predictions += _round(share, batch, plan, each)
        for dealt in each:
            for row in dealt:
                lengths[row] = 0
    return predictions, lengths


def _rounds(rows: list[int], lengths: list[int], size: int, max_tokens: int) -> list[list[list[int]]]:
    """Rows of each rank, equally many, within `max_tokens` for each unless it is a single row."""
    rounds, first = [], 0
    while len(rows) - first >= size:
        best = []
        for count in range(1, (len(rows) - first) // size + 1):
            each = [rows[first + rank * count : first + (rank + 1) * count] for rank in range(size)]
            most = max(sum(lengths[row] for row in dealt) for dealt in each)
            if best and most > max_tokens:
                break
            best = each
        rounds.append(best)
        first += size * len(best[0])
    return rounds


def _round(share: Share, batch: Batch, plan: HostPlan, each: list[list[int]]) -> list[bbk.Predictions]:
    """One forward of each rank's rows."""
    capacity = min(plan.predictions, len(each[0]) * batch.state.gen_length)
    dealt = []
    for rows in each:
        part = plan_of(batch, slice(rows[0], rows[-1] + 1))
        packed = pack(batch, part, sum(plan.query_lengths[row] for row in rows), capacity)
        pages = [pages_per_row(plan.query_lengths[row], batch.cache.page_size) for row in rows]
        dealt.append(_Dealt(rows, pages, packed))
    places = [_pages_of(batch, own) for own in dealt]
    cache = _LayerCache(share.whole, batch, dealt[share.shard.rank], max(len(found) for found in places))
    heads = [share.shard.kv_heads(rank) for rank in range(share.size)]

    def send(layer: int) -> None:
        written = as_words(batch.cache.kv[layer].flatten(2))  # [2, pages, numbers of a page]

        def receive(parts: list[Tensor], piece: slice) -> None:
            for part, pages in zip(parts, places, strict=True):
                pages = pages[piece]
                if len(pages):
                    written.index_copy_(1, pages, as_words(part.flatten(2)[:, : len(pages)]))

        parts = [cache.kv[layer][..., own.start : own.stop, :] for own in heads]
        share.exchange.send(parts, receive)

    found = predict(share.whole, batch, cache.packed, cache, send)
    share.exchange.finish()
    return _of_all(share, dealt, found)


def _pages_of(batch: Batch, own: _Dealt) -> Tensor:
    """[pages] int64: where the batch's cache has these rows."""
    table = batch.cache.page_table
    return torch.cat([table[row, :count] for row, count in zip(own.rows, own.pages, strict=True)]).long()


def _of_all(share: Share, dealt: list[_Dealt], own: bbk.Predictions) -> list[bbk.Predictions]:
    """Every rank's predictions, from this one's; token ids are exact in fp32."""
    columns = [values.float().view(len(own.target), -1) for values in own[1:] if values is not None]
    gathered = share.group.all_gather(torch.cat(columns, 1))
    found = []
    for part, of_rank in zip(gathered, dealt, strict=True):
        pieces = iter(part.split([column.shape[1] for column in columns], 1))
        fields = [
            like if like is None else next(pieces).to(like.dtype).reshape(like.shape) for like in own[1:]
        ]
        found.append(bbk.Predictions(of_rank.packed.predict_target, *fields))
    return found
