"""What surrounds the model in a step: packing, pages, and the policy with the plan of the next forward."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.checks import checker
from blockbatch_kernels.ops import dispatch, values
from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.shapes import E4M3
from blockbatch_kernels.structs import (
    BranchState,
    PackedQueries,
    PagePool,
    PolicyEvents,
    Predictions,
    StepPlan,
)

_check_pack_windows = checker("pack_windows")
_check_share_pages = checker("share_pages")
_check_copy_pages = checker("copy_pages")
_check_initial_plan = checker("initial_plan")
_check_decode_policy = checker("decode_policy")


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
        scattered: the queries of a row are not the canvas positions from `plan.query_start` to `query_end`,
            but those at these places of `plan.query_position`: for block steps of open queries.
    """
    _check_pack_windows(
        state, plan, page_table, page_size, capacity, predict_capacity, prediction_offset, scattered
    )
    _check_requests(state)
    if values.ENABLED:
        sizes = (page_size, capacity, predict_capacity, prediction_offset, scattered)
        values.check_packing(state, plan, page_table, *sizes)
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


def share_pages(page_table: Tensor, source_row: Tensor, *, backend: str | None = None) -> None:
    """Lets each row use the pages of its source row: no K or V moves.

    Args:
        page_table: [R, pages_per_row] int32; *written*. All rows read the table as it was before.
        source_row: [R] int32; the row itself or -1 leaves the row as it is.
    """
    _check_share_pages(page_table, source_row)
    if values.ENABLED:
        values.check_sources(source_row, page_table.shape[0])
    dispatch.module_for(backend, "share_pages", page_table).share_pages(page_table, source_row)


def copy_pages(
    kv_cache: Tensor,
    page_table: Tensor,
    write_start: Tensor,
    write_end: Tensor,
    *,
    num_branches: int,
    write_positions: Tensor | None = None,
    pool: PagePool | None = None,
    backend: str | None = None,
) -> None:
    """Copy on write: gives each row its own page wherever it is about to change one that another row uses
    too.

    Without `pool` the pages of a request come from `num_branches` pages for every column of its page tables,
    page id (request * num_branches + k) * pages_per_row + column for k from 0 to num_branches - 1, so a free
    one always exists. The table must hold such ids alone: it starts as -1, and `copy_pages` and `share_pages`
    write nothing else. Tables with ids of another allocator need a `pool`. The contents are copied, in all
    layers, where the write does not cover the page whole.

    Args:
        kv_cache: [layers, 2, pages, page_size, num_kv_heads, head_dim], fp32, bf16, fp16 or float8_e4m3fn;
            *written* in the new pages.
        page_table: [R, pages_per_row] int32, -1 where a row has no page yet; *written*. With `pool` a page
            may stand in one column alone, in rows of any request.
        write_start, write_end: [R] int32, positions that the row will write; equal: none.
        num_branches: rows per request.
        write_positions: [R, any] int32, ascending; with it a row writes the positions at the places from
            `write_start` to `write_end` of its line. A page is then covered whole if all its positions are
            listed.
        pool: the pages that rows may be given, see `PagePool`; *written*: how many were missing. A page that
            is not in it is copied before a row writes it, as if another row used it.

    Raises, for tensors in host memory, and with `BBK_CHECK=1` on a GPU: ValueError for a page that is none of
    `kv_cache`, and without `pool` for one that is not the row's by the rule above.
    """
    _check_copy_pages(kv_cache, page_table, write_start, write_end, num_branches, write_positions, pool)
    rows = page_table.shape[0]
    if num_branches < 1 or rows % num_branches:
        raise ValueError(f"num_branches: expected a divisor of the {rows} rows, got {num_branches}")
    sizes = {}
    if pool is None:
        sizes["num_branches"] = num_branches
        if kv_cache.shape[2] < page_table.numel():
            raise ValueError(
                f"kv_cache: expected at least {page_table.numel()} pages, got {kv_cache.shape[2]}"
            )
    values.check_pages(kv_cache, page_table, write_start, write_end, num_branches, write_positions, pool)
    module = dispatch.module_for(backend, "copy_pages", page_table, **sizes)
    if kv_cache.dtype == E4M3:  # pages move as they are, so that elements may move in pairs
        kv_cache = _in_pairs(kv_cache)
    module.copy_pages(
        kv_cache,
        page_table,
        write_start,
        write_end,
        num_branches=num_branches,
        write_positions=write_positions,
        pool=pool,
    )
    if pool is not None and values.ENABLED and values.is_readable(page_table):
        pool.check()


def _in_pairs(kv_cache: Tensor) -> Tensor:
    """The cache in e4m3 as one of 16-bit elements."""
    strides = kv_cache.stride()
    if kv_cache.shape[5] % 2 or strides[5] != 1 or any(stride % 2 for stride in strides[:5]):
        raise ValueError(
            "kv_cache: expected pairs of e4m3 next to each other, an even head_dim and even strides but the "
            f"last, got {list(kv_cache.shape)} with strides {list(strides)}"
        )
    return kv_cache.view(torch.float16)


def initial_plan(
    state: BranchState, params: PolicyParams, *, out: StepPlan | None = None, backend: str | None = None
) -> StepPlan:
    """The first forward: one full row for each request, whose results belong to all its branches.

    `out` (`StepPlan.allocate`) is *written* and returned if given.
    """
    _check_initial_plan(state, params, out)
    _check_requests(state)
    _check_drafts(state, params)
    module = dispatch.module_for(backend, "initial_plan", state.tokens, **_policy_sizes(state, params))
    return module.initial_plan(state, params, out=out)


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

    Source of the method: arXiv 2605.29233, whose authors published one rule for LLaDA and another for Dream
    (`params.policy`); LocalLeap's commit rule: arXiv 2510.07081.

    A confidence that is NaN or infinite says that the model's numbers broke. It goes through the rules as the
    highest one, and is counted in `state.non_finite`. The plan's flags then count all rows of the request as
    stalled, so that the host learns of it with what it reads anyway.

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
    _check_decode_policy(state, predictions, plan, params, out)
    _check_requests(state)
    _check_drafts(state, params)
    _check_map(state, predictions, params)
    if predictions.probe_probability is None and params.eos_exit == "window":
        raise ValueError('predictions.probe_probability: expected a tensor with eos_exit="window", got None')
    if values.ENABLED:
        values.check_predictions(state, predictions)
    module = dispatch.module_for(backend, "decode_policy", state.tokens, **_policy_sizes(state, params))
    return module.decode_policy(state, predictions, plan, params, out=out)


def _policy_sizes(state: BranchState, params: PolicyParams) -> dict[str, int]:
    return dict(num_branches=state.num_branches, num_eos_tokens=len(params.eos_token_ids))


def _check_drafts(state: BranchState, params: PolicyParams) -> None:
    if params.drafts and state.num_branches != len(params.drafts) + 1:
        raise ValueError(
            f"params.drafts: expected one for each row of a request but the first, {state.num_branches - 1}, "
            f"got {len(params.drafts)}"
        )


def _check_map(state: BranchState, predictions: Predictions, params: PolicyParams) -> None:
    if params.policy != "dream_published":
        return
    for name in ("likely_token", "likely_probability"):
        if getattr(predictions, name) is None:
            raise ValueError(f'predictions.{name}: expected a tensor with policy="{params.policy}", got None')
    if state.map_token.shape[2] == 0:
        raise ValueError(f'state.map_token: expected entries with policy="{params.policy}", got none')


def _check_requests(state: BranchState) -> None:
    if state.num_requests < 1 or state.num_rows % state.num_requests:
        raise ValueError(
            f"state.prompt_length: expected a divisor of the {state.num_rows} rows, got {state.num_requests}"
        )
