"""Which rows compute which positions in the next forward."""

import torch
from torch import Tensor

from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.structs import PHASE_BLOCK, PHASE_INIT, PHASE_REFRESH, BranchState, StepPlan


def by_request(state: BranchState, x: Tensor) -> Tensor:
    """[R, ...] -> [Q, N, ...]"""
    return x.view(state.num_requests, state.num_branches, *x.shape[1:])


def is_eos(tokens: Tensor, params: PolicyParams) -> Tensor:
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for eos in params.eos_token_ids:
        found |= tokens == eos
    return found


def first_true(x: Tensor) -> Tensor:
    """[..., G] bool -> [...] int32: index of the first True, G if there is none."""
    return torch.where(x.any(-1), x.int().argmax(-1), x.shape[-1]).int()


def in_window(state: BranchState) -> Tensor:
    """[R, G] bool: positions inside the row's window."""
    position = torch.arange(state.gen_length, device=state.tokens.device)
    return (position >= state.window_start.unsqueeze(1)) & (position < state.window_end.unsqueeze(1))


def running_rows(state: BranchState) -> Tensor:
    """[R] bool: not done, and the request goes on."""
    return ~state.done & ~state.finished.repeat_interleave(state.num_branches)


def write(values: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    for target, value in zip(out, values, strict=True):
        target.copy_(value)


def initial_plan(state: BranchState, params: PolicyParams, out: StepPlan | None = None) -> StepPlan:
    rows = torch.arange(state.num_rows, device=state.tokens.device)
    plan = _full_forward(state, params, PHASE_INIT, rows - rows % state.num_branches)
    if out is None:
        return plan
    write(plan, out)
    return out


def next_plan(state: BranchState, params: PolicyParams) -> StepPlan:
    running = running_rows(state)
    refreshing = (
        by_request(state, running & state.needs_refresh).any(1).repeat_interleave(state.num_branches)
        & running
    )
    if params.drafts:
        # Drafts take no part in a full forward, and go on from its result.
        rows = torch.arange(state.num_rows, device=running.device)
        asking = by_request(state, refreshing).any(1).repeat_interleave(state.num_branches)
        source_row = torch.where(asking, rows - rows % state.num_branches, -1)
    else:
        source_row = _distinct_rows(state, refreshing)
    refresh = _full_forward(state, params, PHASE_REFRESH, source_row)
    block = _block_denoise(state, params, running)
    # Both are cheap, and choosing on the device spares a host wait.
    any_refresh = refreshing.any()
    return StepPlan(*(torch.where(any_refresh, a, b) for a, b in zip(refresh, block, strict=True)))


def _distinct_rows(state: BranchState, rows: Tensor) -> Tensor:
    """[R] int32: the first of the request's `rows` that holds the same tokens; -1 for rows not in `rows`."""
    tokens, member = by_request(state, state.tokens), by_request(state, rows)
    same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).all(-1) & member.unsqueeze(2) & member.unsqueeze(1)
    branch = same.int().argmax(-1)  # [Q, N]
    offset = torch.arange(state.num_requests, device=tokens.device).unsqueeze(1) * state.num_branches
    return torch.where(member, branch + offset, -1).flatten().int()


def _full_forward(state: BranchState, params: PolicyParams, phase: int, source_row: Tensor) -> StepPlan:
    rows = torch.arange(state.num_rows, device=state.tokens.device)
    prompt = state.prompt_length.repeat_interleave(state.num_branches)
    computed = source_row == rows
    query_end = torch.where(computed, prompt + state.gen_length, 0).int()
    query_start = torch.zeros_like(query_end)
    if phase == PHASE_REFRESH and params.refresh_scope == "generation":
        query_start = torch.where(computed, prompt - params.prediction_offset, 0).int()
    return _plan(state, params, phase, query_start, query_end, source_row.int())


def _block_denoise(state: BranchState, params: PolicyParams, running: Tensor) -> StepPlan:
    masked = ((state.tokens == params.mask_token_id) & in_window(state)).any(-1)
    active = running & masked
    prompt = state.prompt_length.repeat_interleave(state.num_branches)
    if params.query_span == "open":
        return _open_queries(state, params, active)
    query_start = torch.where(active, prompt + state.window_start - params.prediction_offset, 0)
    query_end = torch.where(active, prompt + state.window_end - params.prediction_offset, 0)
    if params.query_span == "suffix":
        query_end = torch.where(active, prompt + state.gen_length, 0)
    elif params.query_span == "canvas":
        query_start, query_end = (
            torch.zeros_like(query_start),
            torch.where(active, prompt + state.gen_length, 0),
        )
    rows = torch.arange(state.num_rows, device=prompt.device)
    source_row = torch.where(active, rows, -1).int()
    return _plan(state, params, PHASE_BLOCK, query_start.int(), query_end.int(), source_row)


def _open_queries(state: BranchState, params: PolicyParams, active: Tensor) -> StepPlan:
    """The queries that predict a MASK of the window, and every token whose K/V is that of another."""
    offset, gen_length = params.prediction_offset, state.gen_length
    held = state.tokens != params.mask_token_id
    window = in_window(state)
    stale = held & (state.tokens != state.cached_token)
    # Column i is the canvas position in front of generation position i.
    queries = torch.zeros(state.num_rows, gen_length + 1, dtype=torch.bool, device=held.device)
    queries[:, 1:] = stale
    first = 1 - offset
    queries[:, first : first + gen_length] |= ~held & window
    queries &= active.unsqueeze(1)
    prompt = state.prompt_length.repeat_interleave(state.num_branches).unsqueeze(1)
    column = torch.arange(gen_length + 1, device=held.device)
    # A query knows its rank; what is none goes to a place behind the end.
    rank = torch.where(queries, queries.cumsum(1) - 1, gen_length + 1)
    position = torch.zeros(state.num_rows, gen_length + 2, dtype=torch.int32, device=held.device)
    position.scatter_(1, rank, (prompt - 1 + column).int())
    rows = torch.arange(state.num_rows, device=held.device)
    source_row = torch.where(active, rows, -1).int()
    count = queries.sum(1).int()
    predict = queries[:, first : first + gen_length] & window
    plan = _plan(state, params, PHASE_BLOCK, torch.zeros_like(count), count, source_row, predicted=predict)
    return plan._replace(query_position=position[:, : gen_length + 1].contiguous())


def _asked_by_dream(state: BranchState, params: PolicyParams, phase: int) -> Tensor:
    """A sync takes the map with the tokens, so that a row asks for its own MASKs alone; and of a full
    forward for the first of them."""
    masked = state.tokens == params.mask_token_id
    return masked if phase == PHASE_BLOCK else masked & (masked.int().cumsum(1) == 1)


def _plan(
    state: BranchState,
    params: PolicyParams,
    phase: int,
    query_start: Tensor,
    query_end: Tensor,
    source_row: Tensor,
    predicted: Tensor | None = None,
) -> StepPlan:
    """`predicted` [R, G] bool: what the queries predict; None: that of the canvas positions [start, end)."""
    # A prediction can only matter where the row holds MASK or EOS at the moment it is asked for. Sync moves
    # tokens between branches but never adds a MASK or EOS that no branch of the request held before, so
    # positions where no branch holds one need no LM head.
    open_positions = (state.tokens == params.mask_token_id) | is_eos(state.tokens, params)
    if params.policy == "dream_published":
        open_positions = _asked_by_dream(state, params, phase)
    elif not params.drafts:
        open_positions = by_request(state, open_positions).any(1).repeat_interleave(state.num_branches, 0)
    prompt = state.prompt_length.repeat_interleave(state.num_branches).unsqueeze(1)
    # The query that predicts each generation position.
    query = torch.arange(state.gen_length, device=prompt.device) + prompt - params.prediction_offset
    if predicted is None:
        predicted = (query >= query_start.unsqueeze(1)) & (query < query_end.unsqueeze(1))
    predict = open_positions & predicted
    running = (~state.finished).sum().int()
    counts = (query_end - query_start).sum().int(), predict.sum().int()
    broken = (state.non_finite > 0).repeat_interleave(state.num_branches)
    stalled = (broken | (state.decoded > state.gen_length)).sum().int()
    flags = torch.stack((running, torch.full_like(running, phase), *counts, stalled))
    position = state.tokens.new_zeros(state.num_rows, state.gen_length + 1)
    return StepPlan(query_start, query_end, source_row, predict, flags, position)
