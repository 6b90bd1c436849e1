"""What surrounds the model in a step: packing, pages, and the policy with the plan of the next forward."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.checks import (
    FLOATS,
    check_events,
    check_plan,
    check_predictions,
    check_state,
    check_tensor,
)
from blockbatch_kernels.library import traceable
from blockbatch_kernels.ops import dispatch
from blockbatch_kernels.structs import (
    EOS_EXITS,
    QUERY_SPANS,
    BranchState,
    PackedQueries,
    PolicyEvents,
    PolicyParams,
    Predictions,
    StepPlan,
)


@traceable
def pack_windows(
    state: BranchState,
    plan: StepPlan,
    page_table: Tensor,
    *,
    page_size: int,
    capacity: int,
    predict_capacity: int,
    prediction_offset: int = 0,
    scattered: bool = False,
    backend: str | None = None,
) -> PackedQueries:
    """Gathers the query tokens of all rows of a plan into fixed-capacity tensors, without a host wait.

    Args:
        state: the branches; its tokens are read.
        plan: which rows compute which canvas positions; `plan.flags[2:4]` hold the exact sizes.
        page_table: [R, pages_per_row] int32.
        page_size: positions a page.
        capacity: packed tokens to make room for, at least the plan's query tokens.
        predict_capacity: predictions to make room for, at least the plan's.
        prediction_offset: a query at position p predicts p + prediction_offset.
    """
    check_state(state)
    check_plan("plan", plan, state)
    check_tensor("page_table", page_table, (state.num_rows, None), (torch.int32,), state.tokens.device)
    for name, value, least in (
        ("page_size", page_size, 1),
        ("capacity", capacity, 0),
        ("predict_capacity", predict_capacity, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    return dispatch.module_for(backend, "pack_windows", state.tokens).pack_windows(
        state,
        plan,
        page_table,
        page_size=page_size,
        capacity=capacity,
        predict_capacity=predict_capacity,
        prediction_offset=prediction_offset,
        scattered=scattered,
    )


@traceable
def share_pages(page_table: Tensor, source_row: Tensor, *, backend: str | None = None) -> None:
    """Lets each row use the pages of its source row: no K or V moves.

    Args:
        page_table: [R, pages_per_row] int32; *written*. All rows read the table as it was before.
        source_row: [R] int32; the row itself or -1 leaves the row as it is.
    """
    check_tensor("page_table", page_table, (None, None), (torch.int32,))
    check_tensor("source_row", source_row, (page_table.shape[0],), (torch.int32,), page_table.device)
    dispatch.module_for(backend, "share_pages", page_table).share_pages(page_table, source_row)


@traceable
def copy_pages(
    kv_cache: Tensor,
    page_table: Tensor,
    write_start: Tensor,
    write_end: Tensor,
    *,
    num_branches: int,
    write_positions: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Copy on write: gives each row its own page wherever it is about to change one that another row uses
    too.

    The pages of a request come from a pool of `num_branches` pages for every column of its page tables, page
    id (request * num_branches + k) * pages_per_row + column, so a free one always exists. The contents are
    copied, in all layers, where the write does not cover the page whole.

    Args:
        kv_cache: [layers, 2, pages, page_size, num_kv_heads, head_dim]; *written* in the new pages.
        page_table: [R, pages_per_row] int32, -1 where a row has no page yet; *written*.
        write_start, write_end: [R] int32, positions that the row will write; equal: none.
        num_branches: rows per request.
    """
    check_tensor("page_table", page_table, (None, None), (torch.int32,))
    check_tensor("kv_cache", kv_cache, (None, 2, None, None, None, None), FLOATS, page_table.device)
    rows = page_table.shape[0]
    check_tensor("write_start", write_start, (rows,), (torch.int32,), page_table.device)
    check_tensor("write_end", write_end, (rows,), (torch.int32,), page_table.device)
    if num_branches < 1 or rows % num_branches:
        raise ValueError(f"num_branches: expected a divisor of the {rows} rows, got {num_branches}")
    if kv_cache.shape[2] < page_table.numel():
        raise ValueError(f"kv_cache: expected at least {page_table.numel()} pages, got {kv_cache.shape[2]}")
    module = dispatch.module_for(backend, "copy_pages", page_table, num_branches=num_branches)
    module.copy_pages(
        kv_cache,
        page_table,
        write_start,
        write_end,
        num_branches=num_branches,
        write_positions=write_positions,
    )


@traceable
def initial_plan(
    state: BranchState, params: PolicyParams, *, out: StepPlan | None = None, backend: str | None = None
) -> StepPlan:
    """The first forward: one full row for each request, whose results belong to all its branches.

    `out` (`StepPlan.allocate`) is *written* and returned if given.
    """
    _check_policy(state, params)
    if out is not None:
        check_plan("out", out, state)
    module = dispatch.module_for(backend, "initial_plan", state.tokens, **_policy_sizes(state, params))
    return module.initial_plan(state, params, out=out)


@traceable
def decode_policy(
    state: BranchState,
    predictions: Predictions,
    plan: StepPlan,
    params: PolicyParams,
    *,
    out: tuple[StepPlan, PolicyEvents] | None = None,
    backend: str | None = None,
) -> tuple[StepPlan, PolicyEvents]:
    """Everything between two forwards: commit, EOS check, advance, merge, sync, and the plan of the next
    forward.

    Source of the method: arXiv 2605.29233; LocalLeap's commit rule: arXiv 2510.07081.

    Args:
        state: *written*.
        predictions: of the forward that `plan` asked for.
        plan: what `initial_plan` or the previous call returned.
        params: the settings.
        out: *written* and returned if given (`StepPlan.allocate`, `PolicyEvents.allocate`); its plan may be
            `plan` itself.

    Returns:
        the plan of the next forward, and what changed (for traces; `sync_source` also tells `share_pages`
        which rows to repoint).
    """
    _check_policy(state, params)
    check_plan("plan", plan, state)
    if out is not None:
        check_plan("out[0]", out[0], state)
        check_events("out[1]", out[1], state)
    check_predictions(predictions, state.tokens.device)
    if predictions.probe_probability is None and params.eos_exit == "window":
        raise ValueError('predictions.probe_probability: expected a tensor with eos_exit="window", got None')
    module = dispatch.module_for(backend, "decode_policy", state.tokens, **_policy_sizes(state, params))
    return module.decode_policy(state, predictions, plan, params, out=out)


def _policy_sizes(state: BranchState, params: PolicyParams) -> dict[str, int]:
    return dict(num_branches=state.num_branches, num_eos_tokens=len(params.eos_token_ids))


def _check_policy(state: BranchState, params: PolicyParams) -> None:
    check_state(state)
    if params.eos_exit not in EOS_EXITS:
        raise ValueError(f"eos_exit: expected one of {', '.join(EOS_EXITS)}, got {params.eos_exit!r}")
    if params.query_span not in QUERY_SPANS:
        raise ValueError(f"query_span: expected one of {', '.join(QUERY_SPANS)}, got {params.query_span!r}")
    if params.prediction_offset not in (0, 1):
        raise ValueError(f"prediction_offset: expected 0 or 1, got {params.prediction_offset}")
    if not 0.5 <= params.merge_threshold <= 1.0:
        # Below one half two different tokens could pass, and the rule would need the whole distribution.
        raise ValueError(f"merge_threshold: expected a value from 0.5 to 1, got {params.merge_threshold}")
    if (params.threshold is None) == (params.steps_per_block is None):
        raise ValueError("threshold: expected either threshold or steps_per_block, got both or neither")
    if params.tail_threshold is not None:
        if params.threshold is None:
            raise ValueError(
                f"tail_threshold: expected None without a threshold, got {params.tail_threshold}"
            )
        if not params.tail_threshold >= params.threshold:
            raise ValueError(
                f"tail_threshold: expected at least threshold = {params.threshold}, got "
                f"{params.tail_threshold}"
            )
