"""Which rows compute which positions in the next forward: one program for each request."""

import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.structs import PHASE_BLOCK, PHASE_INIT, PHASE_REFRESH, BranchState, StepPlan
from blockbatch_kernels.triton.rows import (
    CHUNK,
    any_of,
    check_contiguous,
    device_of,
    first_true,
    in_window,
    is_eos,
    kernel,
    load_tokens,
    pick,
    state_tensors,
    tile_options,
)

INIT = tl.constexpr(PHASE_INIT)
BLOCK = tl.constexpr(PHASE_BLOCK)
REFRESH = tl.constexpr(PHASE_REFRESH)


def initial_plan(state: BranchState, params: PolicyParams, out: StepPlan | None = None) -> StepPlan:
    if out is None:
        out = StepPlan.allocate(state.num_rows, state.gen_length, state.tokens.device)
    else:
        check_contiguous("out", out)
        out.flags.zero_()
    write_plan(state, params, out, wants_refresh=None)
    return out


def write_plan(
    state: BranchState, params: PolicyParams, plan: StepPlan, *, wants_refresh: Tensor | None
) -> None:
    """Plans the next forward into `plan`.

    Args:
        plan: *written*; its flags are zero but for the phase.
        wants_refresh: [Q] int32, whether a running branch of the request needs a refresh; None: init.
    """
    with device_of(state.tokens):
        _plan_kernel[(state.num_requests,)](
            state_tensors(state),
            plan,
            wants_refresh,
            state.num_requests,
            params.mask_token_id,
            params.prediction_offset,
            INITIAL=wants_refresh is None,
            EOS=params.eos_token_ids,
            SPAN=params.query_span,
            GENERATION=params.refresh_scope == "generation",
            DRAFTS=len(params.drafts),
            DREAM=params.policy == "dream_published",
            **tile_options(state),
        )


@kernel
def _plan_kernel(
    state,
    plan,
    wants_refresh,
    num_requests,
    mask_id,
    prediction_offset,
    num_branches,
    gen_length,
    INITIAL: tl.constexpr,
    EOS: tl.constexpr,
    SPAN: tl.constexpr,
    GENERATION: tl.constexpr,
    DRAFTS: tl.constexpr,
    DREAM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    request = tl.program_id(0)
    branch, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid, row = branch < num_branches, request * num_branches + branch
    at = row[:, None] * gen_length + column[None, :]
    inside = valid[:, None] & (column < gen_length)[None, :]
    tokens = load_tokens(state.tokens, at, inside)
    prompt = tl.load(state.prompt_length + request)
    finished = tl.load(state.finished + request)
    masked = tokens == mask_id

    if INITIAL:
        phase = INIT
        source = tl.zeros_like(row) + request * num_branches
        start = tl.zeros_like(row)
        end = tl.where(branch == 0, prompt + gen_length, 0)
    else:
        # One request that needs a refresh makes the next forward a refresh: the others sit it out.
        any_wants = 0
        for first in range(0, num_requests, CHUNK):
            requests = first + tl.arange(0, CHUNK)
            wants = tl.load(wants_refresh + requests, mask=requests < num_requests, other=0)
            any_wants = tl.maximum(any_wants, tl.max(wants, 0))
        phase = tl.where(any_wants > 0, REFRESH, BLOCK)
        running = valid & (tl.load(state.done + row, mask=valid, other=True) == 0) & (finished == 0)
        if phase == REFRESH:
            wanted = tl.load(wants_refresh + request) > 0
            if DRAFTS > 0:
                # Drafts take no part, and go on from the branch's result.
                source = tl.where(wanted, tl.zeros_like(row) + request * num_branches, -1)
            else:
                source = _first_equal_row(tokens, running & wanted, branch, request, num_branches)
            start = tl.zeros_like(row)
            if GENERATION:
                start = tl.where(source == row, prompt - prediction_offset, 0)
            end = tl.where(source == row, prompt + gen_length, 0)
        else:
            window_start = tl.load(state.window_start + row, mask=valid, other=0)
            window_end = tl.load(state.window_end + row, mask=valid, other=0)
            active = running & any_of(masked & in_window(column[None, :], window_start, window_end), 1)
            source = tl.where(active, row, -1)
            start = tl.where(active, prompt + window_start - prediction_offset, 0)
            end = tl.where(active, prompt + window_end - prediction_offset, 0)
            if SPAN == "suffix" or SPAN == "canvas":
                end = tl.where(active, prompt + gen_length, 0)
            if SPAN == "canvas":
                start = tl.zeros_like(row)
            if SPAN == "open":  # no range of the canvas
                start, end = tl.zeros_like(row), tl.zeros_like(row)

    # Where no branch of the request holds MASK or EOS, no prediction can matter.
    open_position = masked | is_eos(tokens, EOS)
    if DREAM:
        # A row asks for its own MASKs, and of a full forward for the first of them.
        first_mask = first_true(masked, column[None, :], gen_length)
        any_mask = tl.zeros_like(first_mask) + phase == BLOCK
        open_position = masked & (any_mask[:, None] | (column[None, :] == first_mask[:, None]))
    elif DRAFTS == 0:
        open_position = any_of(open_position, 0)[None, :]
    query = column + prompt - prediction_offset  # that predicts the position
    predict = open_position & (query[None, :] >= start[:, None]) & (query[None, :] < end[:, None])
    if SPAN == "open":
        active = source >= 0
        active &= tl.zeros_like(source) + phase == BLOCK
        asked, number = _open_queries(
            state, plan, tokens, row, column, valid, active, prompt, mask_id, prediction_offset, gen_length
        )
        predict |= open_position & asked
        end = tl.where(active, number, end)
    predict &= inside

    if SPAN != "open":
        places = plan.query_position + row * (gen_length + 1)
        nowhere = tl.zeros_like(at)
        tl.store(places[:, None] + column[None, :], nowhere, mask=inside)
        tl.store(places + gen_length, tl.zeros_like(row), mask=valid)
    tl.store(plan.query_start + row, start, mask=valid)
    tl.store(plan.query_end + row, end, mask=valid)
    tl.store(plan.source_row + row, source, mask=valid)
    tl.store(plan.predict + at, predict, mask=inside)

    decoded = tl.load(state.decoded + row, mask=valid, other=0)
    # Sums of integers: the same in any order.
    tl.atomic_add(plan.flags, (finished == 0).to(tl.int32))
    tl.atomic_add(plan.flags + 2, tl.sum(tl.where(valid, end - start, 0), 0))
    tl.atomic_add(plan.flags + 3, tl.sum(tl.sum(predict.to(tl.int32), 1), 0))
    stalled = valid & ((decoded > gen_length) | (tl.load(state.non_finite + request) > 0))
    tl.atomic_add(plan.flags + 4, tl.sum(stalled.to(tl.int32), 0))
    if request == 0:
        tl.store(plan.flags + 1, phase)


@triton.jit
def _first_equal_row(tokens, member, branch, request, num_branches):
    """[N]: the first of the request's `member` rows that holds the same tokens; -1 for other rows."""
    source = tl.full(branch.shape, -1, tl.int32)
    for other in range(num_branches):
        line = pick(branch[:, None], other, tokens)
        same = (any_of(tokens != line[None, :], 1) == 0) & any_of((branch == other) & member, 0)
        source = tl.where(member & same & (source < 0), request * num_branches + other, source)
    return source


@triton.jit
def _open_queries(
    state, plan, tokens, row, column, valid, active, prompt, mask_id, prediction_offset, gen_length
):  # fmt: skip
    """Writes the places of the queries of `active` rows, ascending and zero behind the last.

    Query c stands `prediction_offset` in front of generation position c, which it predicts. It is asked for
    the sake of that position, a MASK of the window, or because the K/V of the token that it holds itself is
    that of another.

    Returns:
        [N, G], whether the position is predicted and lies in the window, and [N], the number of queries.
    """
    window_start = tl.load(state.window_start + row, mask=active, other=0)
    window_end = tl.load(state.window_end + row, mask=active, other=0)
    window = in_window(column[None, :], window_start, window_end)
    line = column[None, :] < gen_length
    held = row[:, None] * gen_length + column[None, :] - prediction_offset
    holds = active[:, None] & line & (column[None, :] >= prediction_offset)
    queries = ((tokens == mask_id) & window & active[:, None]) | _is_stale(state, held, holds, mask_id)
    # With an offset the last token has a query behind those that predict anything.
    behind = (row + 1) * gen_length - prediction_offset
    last = _is_stale(state, behind, active & (behind < (row + 1) * gen_length), mask_id)

    before = tl.sum(queries.to(tl.int32), 1)
    number = before + last.to(tl.int32)
    first = prompt - prediction_offset
    places = plan.query_position + row * (gen_length + 1)
    rank = tl.cumsum(queries.to(tl.int32), 1) - 1
    position = tl.zeros_like(rank) + first + column[None, :]
    tl.store(places[:, None] + rank, position, mask=queries)
    tl.store(places + before, tl.zeros_like(row) + first + gen_length, mask=last)
    rest = valid[:, None] & line & (column[None, :] >= number[:, None])
    tl.store(places[:, None] + column[None, :], tl.zeros_like(rank), mask=rest)
    tl.store(places + gen_length, tl.zeros_like(row), mask=valid & (number <= gen_length))
    return queries & window, number


@triton.jit
def _is_stale(state, at, valid, mask_id):
    """Whether a token stands there whose K/V was computed from another."""
    token = tl.load(state.tokens + at, mask=valid, other=mask_id)
    return (token != mask_id) & (token != tl.load(state.cached_token + at, mask=valid, other=mask_id))
