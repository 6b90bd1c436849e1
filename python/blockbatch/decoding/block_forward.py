"""One packed forward of a block-causal model: rows of queries that each see a prefix of their pages.

Rows of one block see the stored prefix and their own block, which is all keys up to the block's end: a length
for each row says the whole mask. The blocks of a prompt are rows over the same pages; K and V of all of them
are written before the attention of a layer reads any, so one forward prefills the prompt under mask(B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.decoding.graph_pool import capture
from blockbatch.decoding.graphs import StepGraphs
from blockbatch.decoding.sampling import RowSampling, SamplingKind, pack_rows, packed_size, unpack_rows
from blockbatch.models.drawn import Draw
from blockbatch.text_pages import TextPages

# Rows that are planned together: the plan of the attention compares every row with every other.
_MOST_ROWS = 256
# Forwards of more rows are as good as never repeated in the same shape.
_MOST_GRAPH_ROWS = 12
_MOST_GRAPHS = 48


class Row(NamedTuple):
    """Queries of one block, or of a part of it.

    Attributes:
        ids: their tokens.
        first: position of the first.
        end: they see positions [0, end).
        pages: page j holds positions from j * page_size on; at least those up to `end`.
        predict: places in `ids` whose prediction is wanted, ascending.
        targets: for each of them the place of the text that it predicts; read where tokens are drawn.
        draw: how tokens are drawn; None: those of the highest logits. Rows of other kinds run apart.
    """

    ids: Sequence[int]
    first: int
    end: int
    pages: Sequence[int]
    predict: Sequence[int] = ()
    targets: Sequence[int] = ()
    draw: RowSampling | None = None


# For every wanted place of a row: the top token and its confidence.
Predicted = list[tuple[int, float]]


class _Shape(NamedTuple):
    """What decides which work is launched.

    Attributes:
        lengths: tokens of each row.
        columns: pages of a row of the page table.
        places: predictions.
        distinct: texts that the rows belong to, as far as they begin differently.
        sampling: what drawing tokens takes.
    """

    lengths: tuple[int, ...]
    columns: int
    places: int
    distinct: int
    sampling: SamplingKind | None = None


class _Pages(NamedTuple):
    """What `Model.predict` wants of a cache."""

    kv: Tensor
    page_table: Tensor
    distinct_rows: int
    num_branches: int | None = None  # texts of different requests may share pages


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    outputs: Tensor


class BlockForward:
    """Runs rows on a model and its pool; the host waits for the device once a forward.

    On a GPU forwards of few rows are captured as CUDA graphs: the first of a shape runs as it is.

    Args:
        model: see `BlockSession`.
        pool: the pages that rows speak of; *written* at their queries.

    Attributes:
        pool: as given.
    """

    def __init__(self, model, pool: TextPages) -> None:
        self._model, self.pool = model, pool
        self._graphs: dict[_Shape, _Graph] | None = {} if StepGraphs.possible(model) else None
        self._graph_pool, self._generation = None, pool.generation

    def run(self, rows: Sequence[Row], max_tokens: int) -> list[Predicted]:
        """What the model predicts for each row; rows in front are computed before rows behind.

        Args:
            max_tokens: rows are computed several at a time within this many tokens, a longer row alone.
        """
        predicted: list[Predicted] = []
        with self.pool.lock:
            for part in _chunks(rows, max_tokens):
                predicted += self._run(part)
        return predicted

    @property
    def device(self) -> torch.device:
        return self._model.device

    def captured(self, rows: Sequence[Row]) -> Callable[[], None] | None:
        """What replays the captured forward of these rows, for measurements; None if there is none."""
        graph = (self._graphs or {}).get(self._pack(rows, padded=True)[0])
        return None if graph is None else graph.graph.replay

    def _run(self, rows: Sequence[Row]) -> list[Predicted]:
        captured = self._graphs is not None and len(rows) <= _MOST_GRAPH_ROWS and any(r.predict for r in rows)
        shape, values = self._pack(rows, captured)
        packed = torch.tensor(values, dtype=torch.int32, device="cpu")
        both = (
            self._replay(shape, packed) if captured else self._compute(shape, packed.to(self._model.device))
        )
        counts = [len(row.predict) for row in rows]
        if not any(counts):
            if both.is_cuda:  # the next forward may be that of another thread, on another stream
                torch.cuda.current_stream().synchronize()
            return [[] for _ in rows]
        both = both.cpu()
        pairs = list(zip(both[0].tolist(), both[1].view(torch.float32).tolist(), strict=True))
        ends = list(accumulate(counts, initial=0))
        return [pairs[start:end] for start, end in zip(ends, ends[1:])]

    def _pack(self, rows: Sequence[Row], padded: bool) -> tuple[_Shape, list[int]]:
        """The forward's inputs as one list, in the order in which `_compute` takes them apart.

        Args:
            padded: to few shapes: as many predictions as tokens, a page table of a power of two of columns.
        """
        page_size = self.pool.page_size
        ids, positions, slots, row_index, wanted = [], [], [], [], []
        for index, row in enumerate(rows):
            wanted += [len(ids) + place for place in row.predict]
            ids += row.ids
            row_index += [index] * len(row.ids)
            for position in range(row.first, row.first + len(row.ids)):
                positions.append(position)
                slots.append(row.pages[position // page_size] * page_size + position % page_size)
        columns = max(-(-row.end // page_size) for row in rows)
        if padded:
            columns = max(16, 1 << (columns - 1).bit_length())
        # Without a prediction to make, the last layer still needs a row to go on with.
        places = len(ids) if padded else max(len(wanted), 1)
        lengths = [len(row.ids) for row in rows]
        ends = [row.end for row in rows]
        table = []
        for row in rows:
            pages = list(row.pages[:columns])
            table += pages + [pages[0]] * (columns - len(pages))
        # Rows of one text share what is stored.
        distinct = len({row.pages[0] for row in rows})
        values = [*ids, *positions, *row_index, *accumulate(lengths, initial=0), *ends, *slots]
        padding = [0] * (places - len(wanted))
        values += wanted + padding + table
        draws = [row.draw for row in rows]
        kind = None if draws[0] is None else draws[0].kind
        if kind is not None:
            values += [index for index, row in enumerate(rows) for _ in row.predict] + padding
            values += [place for row in rows for place in row.targets] + padding
            values += pack_rows(draws)
        return _Shape(tuple(lengths), columns, places, distinct, kind), values

    def _compute(self, shape: _Shape, packed: Tensor) -> Tensor:
        """The forward of what `_pack` wrote, on the device: top tokens and the bits of confidences."""
        rows, tokens = len(shape.lengths), sum(shape.lengths)
        sizes = [tokens, tokens, tokens, rows + 1, rows, tokens, shape.places, rows * shape.columns]
        kind, options = shape.sampling, {}
        if kind is not None:
            sizes += [shape.places, shape.places, packed_size(kind, rows)]
        parts = packed.split(sizes)
        ids, positions, row_index, cu_seqlens_q, seqlens_k, slots, places, table = parts[:8]
        if kind is not None:
            request, targets, rules = parts[8:]
            options["sampling"] = Draw(unpack_rows(kind, rows, rules), request, targets, kind.confidence)
        queries = bbk.PackedQueries(
            input_ids=ids,
            positions=positions,
            row_index=row_index,
            cu_seqlens_q=cu_seqlens_q,
            slot_mapping=slots.long(),
            predict_index=places.long(),
            predict_target=torch.arange(shape.places, device=packed.device),
        )
        pages = _Pages(self.pool.kv, table.view(rows, shape.columns), shape.distinct)
        predictions = self._model.predict(queries, pages, seqlens_k, **options)
        return torch.stack((predictions.top_token, predictions.confidence.view(torch.int32)))

    def _replay(self, shape: _Shape, packed: Tensor) -> Tensor:
        """`_compute` by a graph, captured behind the first forward of its shape."""
        if self._generation != self.pool.generation:
            # The pool's memory is another.
            self._graphs.clear()
            self._graph_pool = None  # gone with the last graph
            self._generation = self.pool.generation
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.inputs.copy_(packed)
            graph.graph.replay()
            return graph.outputs
        inputs = packed.to(self._model.device)
        # This forward is real work and warms up what a capture must not do: loading kernels, choosing
        # algorithms.
        outputs = self._compute(shape, inputs)
        if len(self._graphs) < _MOST_GRAPHS:
            graph, captured, _ = capture(
                lambda: self._compute(shape, inputs), self._model.device, self._graph_pool
            )
            self._graph_pool = self._graph_pool or graph.pool()
            self._graphs[shape] = _Graph(graph, inputs, captured)
        return outputs


def _chunks(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Consecutive rows of at most `max_tokens` tokens together, or single rows; not too many either."""
    chunks: list[list[Row]] = []
    tokens = 0
    for row in rows:
        joins = chunks and _kind(row) == _kind(chunks[-1][0])
        if joins and tokens + len(row.ids) <= max_tokens and len(chunks[-1]) < _MOST_ROWS:
            chunks[-1].append(row)
            tokens += len(row.ids)
        else:
            chunks.append([row])
            tokens = len(row.ids)
    return chunks


def _kind(row: Row) -> SamplingKind | None:
    return None if row.draw is None else row.draw.kind
