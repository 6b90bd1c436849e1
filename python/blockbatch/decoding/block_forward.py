"""One packed forward of a block-causal model: rows of queries that each see a prefix of their pages.

Rows of one block see the stored prefix and their own block, which is all keys up to the block's end: a length
for each row says the whole mask. The blocks of a prompt are rows over the same pages; K and V of all of them
are written before the attention of a layer reads any, so one forward prefills the prompt under mask(B).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

import blockbatch_kernels as bbk
from blockbatch.page_pool import PagePool


class Row(NamedTuple):
    """Queries of one block, or of a part of it.

    Attributes:
        ids: their tokens.
        first: position of the first.
        end: they see positions [0, end).
        pages: page j holds positions from j * page_size on; at least those up to `end`.
        predict: places in `ids` whose prediction is wanted, ascending.
    """

    ids: Sequence[int]
    first: int
    end: int
    pages: Sequence[int]
    predict: Sequence[int] = ()


# For every wanted place of a row: the top token and its confidence.
Predicted = list[tuple[int, float]]


class _Pages(NamedTuple):
    """What `Model.predict` wants of a cache."""

    kv: torch.Tensor
    page_table: torch.Tensor
    distinct_rows: int


class BlockForward:
    """Runs rows on a model and its pool; the host waits for the device once a forward.

    Args:
        model: see `BlockSession`.
        pool: the pages that rows speak of; *written* at their queries.
    """

    def __init__(self, model, pool: PagePool) -> None:
        self._model, self._pool = model, pool

    def run(self, rows: Sequence[Row], max_tokens: int) -> list[Predicted]:
        """What the model predicts for each row; rows in front are computed before rows behind.

        Args:
            max_tokens: rows are computed several at a time within this many tokens, a longer row alone.
        """
        predicted: list[Predicted] = []
        for part in _chunks(rows, max_tokens):
            predicted += self._run(part)
        return predicted

    def _run(self, rows: Sequence[Row]) -> list[Predicted]:
        page_size, device = self._pool.page_size, self._model.device
        ids, positions, slots, row_index, wanted = [], [], [], [], []
        for index, row in enumerate(rows):
            wanted += [len(ids) + place for place in row.predict]
            ids += row.ids
            row_index += [index] * len(row.ids)
            for position in range(row.first, row.first + len(row.ids)):
                positions.append(position)
                slots.append(row.pages[position // page_size] * page_size + position % page_size)
        columns = max(-(-row.end // page_size) for row in rows)
        tables = [list(row.pages[:columns]) for row in rows]
        # Without a prediction to make, the last layer still needs a row to go on with.
        places = wanted or [0]
        parts = (
            ids,
            positions,
            row_index,
            list(accumulate((len(row.ids) for row in rows), initial=0)),
            [row.end for row in rows],
            slots,
            places,
            *(table + [table[0]] * (columns - len(table)) for table in tables),
        )
        sizes = [len(part) for part in parts]
        packed = torch.tensor([value for part in parts for value in part], dtype=torch.int32)
        on_device = packed.to(device, non_blocking=True).split(sizes)
        input_ids, positions, row_index, cu_seqlens_q, seqlens_k, slots, places = on_device[:7]
        queries = bbk.PackedQueries(
            input_ids=input_ids,
            positions=positions,
            row_index=row_index,
            cu_seqlens_q=cu_seqlens_q,
            slot_mapping=slots.long(),
            predict_index=places.long(),
            predict_target=torch.arange(len(places), device=device),
        )
        distinct = len({tuple(table[-1:]) for table in tables})
        pages = _Pages(self._pool.kv, torch.stack(on_device[7:]), distinct)
        predictions = self._model.predict(queries, pages, seqlens_k)
        if not wanted:
            return [[] for _ in rows]
        both = torch.stack((predictions.top_token, predictions.confidence.view(torch.int32))).cpu()
        pairs = list(zip(both[0].tolist(), both[1].view(torch.float32).tolist(), strict=True))
        ends = list(accumulate((len(row.predict) for row in rows), initial=0))
        return [pairs[start:end] for start, end in zip(ends, ends[1:])]


def _chunks(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Consecutive rows of at most `max_tokens` tokens together, or single rows."""
    chunks: list[list[Row]] = []
    tokens = 0
    for row in rows:
        if chunks and tokens + len(row.ids) <= max_tokens:
            chunks[-1].append(row)
            tokens += len(row.ids)
        else:
            chunks.append([row])
            tokens = len(row.ids)
    return chunks
