"""The policy between two forwards, and the plans of the forwards."""

from __future__ import annotations

from dataclasses import fields

import torch

from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.placement import launch_on, require_contiguous
from blockbatch_kernels.structs import (
    EOS_EXITS,
    QUERY_SPANS,
    BranchState,
    PolicyEvents,
    PolicyParams,
    Predictions,
    StepPlan,
)

_NUM_COUNTERS = 5  # kNumCounters in csrc/decode/policy.h


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
    sizes = _sizes(state)
    if out is None:
        out = _empty_plan(state), _empty_events(state)
    columns = [None if column is None else column.contiguous() for column in predictions]
    counters = torch.empty(_NUM_COUNTERS, dtype=torch.int32, device=state.tokens.device)
    extension.load().decode_policy(
        state=_addresses("state", state),
        predictions={
            name: 0 if column is None else column.data_ptr()
            for name, column in zip(Predictions._fields, columns)
        },
        plan=_addresses("plan", plan),
        out_plan=_addresses("out[0]", out[0]),
        events=_addresses("out[1]", out[1]),
        settings=_settings(params),
        counters=counters.data_ptr(),
        num_predictions=columns[0].shape[0],
        **sizes,
        **launch_on(state.tokens),
    )
    return out


def initial_plan(state: BranchState, params: PolicyParams, out: StepPlan | None = None) -> StepPlan:
    """See `blockbatch_kernels.ops.initial_plan`; limits as in `decode_policy`."""
    sizes = _sizes(state)
    if out is None:
        out = _empty_plan(state)
    counters = torch.empty(_NUM_COUNTERS, dtype=torch.int32, device=state.tokens.device)
    extension.load().initial_plan(
        state=_addresses("state", state),
        out_plan=_addresses("out", out),
        settings=_settings(params),
        counters=counters.data_ptr(),
        **sizes,
        **launch_on(state.tokens),
    )
    return out


def _sizes(state: BranchState) -> dict[str, int]:
    return {
        "num_requests": state.num_requests,
        "num_branches": state.num_branches,
        "gen_length": state.gen_length,
    }


def _addresses(owner: str, tensors: BranchState | StepPlan | PolicyEvents) -> dict[str, int]:
    """Address of each field."""
    if isinstance(tensors, BranchState):
        named = [(field.name, getattr(tensors, field.name)) for field in fields(tensors)]
    else:
        named = tensors._asdict().items()
    for name, tensor in named:
        require_contiguous(f"{owner}.{name}", tensor)
    return {name: tensor.data_ptr() for name, tensor in named}


def _settings(params: PolicyParams) -> dict:
    return {
        **vars(params),
        "eos_exit": EOS_EXITS.index(params.eos_exit),
        "query_span": QUERY_SPANS.index(params.query_span),
    }


def _empty_plan(state: BranchState) -> StepPlan:
    """As `StepPlan.allocate`, without the zeros."""
    rows = state.num_rows
    buffer = torch.empty(5 + 3 * rows, dtype=torch.int32, device=state.tokens.device)
    flags, *columns = buffer.split((5, rows, rows, rows))
    return StepPlan(*columns, torch.empty_like(state.tokens, dtype=torch.bool), flags)


def _empty_events(state: BranchState) -> PolicyEvents:
    committed, merged = (torch.empty_like(state.tokens, dtype=torch.bool) for _ in range(2))
    return PolicyEvents(committed, merged, torch.empty_like(state.decoded))
