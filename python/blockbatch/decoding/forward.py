"""The two kinds of forward, each with the policy behind it: block denoise, and whole rows (init, refresh)."""

from __future__ import annotations

import torch

import blockbatch_kernels as bbk
from blockbatch.decoding.batch import Batch
from blockbatch.decoding.dealt_rows import predict_dealt
from blockbatch.decoding.packing import pack, predict
from blockbatch.decoding.row_graphs import RowGraphs, RowSizes, row_sizes
from blockbatch.parallel import share_of
from blockbatch.steps import HostPlan


def block_denoise(model, batch: Batch, capacity: int, predict_capacity: int) -> None:
    """One forward of the planned windows and all that follows up to the next plan.

    Sizes alone decide what is launched, so that a step can be captured and run again: lengths, tables and
    windows are read on the device.

    Args:
        capacity: packed tokens to make room for, at least the plan's; 0: no row has anything to compute.
        predict_capacity: predictions to make room for, at least the plan's.
    """
    if capacity == 0:
        predictions = _no_predictions(batch.device)
    else:
        scattered = batch.method.params.query_span == "open"
        positions = batch.plan.query_position if scattered else None
        batch.cache.make_private(batch.plan.query_start, batch.plan.query_end, positions)
        predictions = _predict(model, batch, batch.plan, capacity, predict_capacity, scattered=scattered)
    _apply_policy(batch, predictions)


def whole_rows(model, batch: Batch, plan: HostPlan, max_tokens: int, graphs: RowGraphs | None = None) -> None:
    """An init or refresh: computes the planned rows whole, and all that follows up to the next plan.

    Args:
        plan: the batch's plan on the host.
        max_tokens: rows are computed several at a time within this many tokens, a longer row alone.
        graphs: of the batch; None: every forward is launched as it is.
    """
    if graphs is None:
        batch.cache.prepare(batch.plan)
    else:
        graphs.run("pages", lambda: batch.cache.prepare(batch.plan))
    share = share_of(model)
    parts, lengths = [], plan.query_lengths
    if share.whole is not None:
        parts, lengths = predict_dealt(share, batch, plan, max_tokens)
    with share.lanes() as lane:
        for number, rows in enumerate(_chunks(lengths, max_tokens)):
            with lane(number):
                parts.append(_predict_rows(model, batch, plan, rows, graphs))
    batch.cache.share(batch.plan.source_row)
    batch.note_sources(plan.source_row)
    _apply_policy(batch, _concatenate(parts))


def _predict_rows(
    model, batch: Batch, plan: HostPlan, rows: slice, graphs: RowGraphs | None
) -> bbk.Predictions:
    """The forward of some of the planned rows."""
    tokens, count = sum(plan.query_lengths[rows]), sum(length > 0 for length in plan.query_lengths[rows])
    most = (rows.stop - rows.start) * batch.state.gen_length
    sizes = RowSizes(tokens, min(plan.predictions, most), count, captured=False)
    if graphs is not None:
        sizes = row_sizes(tokens, plan.predictions, count, count * batch.state.gen_length)
    batch.cache.distinct_rows = count
    # Lanes run side by side, so that each has a mask of its own.
    chosen = batch.chosen_rows if sizes.captured else torch.zeros_like(batch.chosen_rows)
    chosen.zero_()
    chosen[rows] = True

    def compute() -> bbk.Predictions:
        query_end = batch.plan.query_end * chosen
        # Regions begin behind their prompts, those of other rows as well.
        query_start = torch.minimum(batch.plan.query_start, query_end)
        chunk = batch.plan._replace(query_start=query_start, query_end=query_end)
        return _predict(model, batch, chunk, sizes.tokens, sizes.predictions)

    return graphs.run(sizes, compute) if sizes.captured else compute()


def replan(batch: Batch) -> None:
    """Plans the next forward anew, after requests were ended from outside; changes nothing else."""
    # A refresh only commits, and one that no row took part in not even that.
    batch.plan.source_row.fill_(-1)
    batch.plan.flags[1] = bbk.PHASES.index("refresh")
    _apply_policy(batch, _no_predictions(batch.device))


def _chunks(lengths: list[int], max_tokens: int) -> list[slice]:
    """Consecutive rows whose lengths add up to at most `max_tokens`, or single rows."""
    chunks: list[slice] = []
    tokens = 0
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        if chunks and tokens + length <= max_tokens:
            chunks[-1] = slice(chunks[-1].start, row + 1)
            tokens += length
        else:
            chunks.append(slice(row, row + 1))
            tokens = length
    return chunks


def _predict(
    model,
    batch: Batch,
    plan: bbk.StepPlan,
    capacity: int,
    predict_capacity: int,
    *,
    scattered: bool = False,
) -> bbk.Predictions:
    packed = pack(batch, plan, capacity, predict_capacity, scattered=scattered)
    return predict(model, batch, packed, batch.cache)


def _apply_policy(batch: Batch, predictions: bbk.Predictions) -> None:
    out = batch.plan, batch.events
    if batch.rule:
        batch.rule.decode_policy(batch.state, predictions, batch.plan, out, batch.backend)
    else:
        bbk.decode_policy(
            batch.state, predictions, batch.plan, batch.method.params, out=out, backend=batch.backend
        )
    batch.cache.share(batch.events.sync_source)
    batch.copy_plan_to_host()


def _no_predictions(device: torch.device) -> bbk.Predictions:
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    likely = nothing.view(0, bbk.NUM_LIKELY)
    return bbk.Predictions(nothing.long(), nothing, nothing.float(), nothing.float(), likely, likely.float())


def _concatenate(parts: list[bbk.Predictions]) -> bbk.Predictions:
    if len(parts) == 1:
        return parts[0]
    return bbk.Predictions(
        *(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts, strict=True))
    )
