"""The policy between two forwards, and the plans of the forwards."""

from __future__ import annotations

import torch

from blockbatch_kernels.cuda import extension
from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.structs import BranchState, PolicyEvents, Predictions, StepPlan


def decode_policy(
    state: BranchState,
    predictions: Predictions,
    plan: StepPlan,
    params: PolicyParams,
    out: tuple[StepPlan, PolicyEvents] | None = None,
) -> tuple[StepPlan, PolicyEvents]:
    """See `blockbatch_kernels.ops.decode_policy`. One launch for one request, two for several.

    All tensors of `state`, of `out` and of `plan` are contiguous; at most 32 branches and 32 EOS ids.
    `predictions.target` has no position twice.
    """
    if out is None:
        out = _empty_plan(state), _empty_events(state)
    extension.load().decode_policy(
        state=state,
        predictions=Predictions(*(None if column is None else column.contiguous() for column in predictions)),
        plan=plan,
        out_plan=out[0],
        events=out[1],
        params=params,
        counters=_counters(state),
        stream=extension.stream_of(state.tokens),
    )
    return out


def initial_plan(state: BranchState, params: PolicyParams, out: StepPlan | None = None) -> StepPlan:
    """See `blockbatch_kernels.ops.initial_plan`; limits as in `decode_policy`."""
    if out is None:
        out = _empty_plan(state)
    extension.load().initial_plan(
        state=state,
        out_plan=out,
        params=params,
        counters=_counters(state),
        stream=extension.stream_of(state.tokens),
    )
    return out


def _counters(state: BranchState) -> torch.Tensor:
    return torch.empty(extension.load().NUM_COUNTERS, dtype=torch.int32, device=state.tokens.device)


def _empty_plan(state: BranchState) -> StepPlan:
    """As `StepPlan.allocate`, without the zeros."""
    rows = state.num_rows
    buffer = torch.empty(5 + 3 * rows, dtype=torch.int32, device=state.tokens.device)
    flags, *columns = buffer.split((5, rows, rows, rows))
    predict = torch.empty_like(state.tokens, dtype=torch.bool)
    positions = state.tokens.new_empty(rows, state.gen_length + 1)
    return StepPlan(*columns, predict, flags, positions)


def _empty_events(state: BranchState) -> PolicyEvents:
    committed, merged = (torch.empty_like(state.tokens, dtype=torch.bool) for _ in range(2))
    return PolicyEvents(committed, merged, torch.empty_like(state.decoded))
