"""Drafts: the same tokens in fewer forwards (ours).

The first row of a request is its only branch; the rows behind it are *drafts*, which hold what the next
commit may write. A forward computes them all. Where the commit leaves the branch with the tokens of a
draft, the draft's forward is the very one that the branch would need next: its window was computed whole,
and all else is the same. The branch adopts predictions and K/V, commits again, and so on through as many
drafts as match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.reference.plan import by_request, in_window, is_eos, running_rows
from blockbatch_kernels.structs import PHASE_BLOCK, BranchState, PolicyEvents, StepPlan

_OF_REQUESTS = ("prompt_tokens", "prompt_length", "nfe", "finished", "winner", "stop_reason", "non_finite")


def follow(
    state: BranchState,
    plan: StepPlan,
    probe_probability: Tensor,
    params: PolicyParams,
    after_forward: Callable,
) -> PolicyEvents:
    """The rules for the branches, with the forwards of drafts where they match; then new drafts."""
    phase, stride = plan.flags[1], state.num_branches
    branch = _first_rows(state)
    computed = by_request(state, plan.source_row >= 0)
    draft_tokens = by_request(state, state.tokens)[:, 1:].clone()
    window_end = branch.window_end.clone()
    forwarded = computed[:, 0]
    source = torch.arange(state.num_rows, device=phase.device)
    first = source[::stride]
    adopted = first.clone()

    committed = after_forward(branch, forwarded, phase, probe_probability[::stride], params).committed
    for _ in params.drafts:
        same = (draft_tokens == branch.tokens.unsqueeze(1)).all(-1) & computed[:, 1:]
        same &= (running_rows(branch) & (phase == PHASE_BLOCK)).unsqueeze(1)
        found = same.any(1)
        row = first + 1 + same.int().argmax(1)
        taken = found.unsqueeze(1) & (branch.tokens == params.mask_token_id) & in_window(branch)
        for field in (state.top_token, state.confidence, probe_probability):
            field[::stride] = torch.where(taken, field[row], field[::stride])
        adopted = torch.where(found, row, adopted)
        branch.adopted.add_(found.int())
        events = after_forward(branch, found, phase, probe_probability[::stride], params)
        committed = committed | events.committed

    _write_drafts(state, branch, params)
    # A draft computes its window whole and so may keep its pages, unless the window lost its end.
    shrunk = (branch.window_end != window_end).unsqueeze(1)
    source = by_request(state, source).clone()
    source[:, 1:] = torch.where(shrunk, adopted.unsqueeze(1), source[:, 1:])
    source[:, 0] = adopted
    all_committed = torch.zeros_like(state.tokens, dtype=torch.bool)
    all_committed[::stride] = committed
    return PolicyEvents(all_committed, torch.zeros_like(all_committed), source.flatten().int())


def _first_rows(state: BranchState) -> BranchState:
    """The branches alone, as views."""
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return BranchState(
        **{
            name: value if name in _OF_REQUESTS else value[:: state.num_branches]
            for name, value in values.items()
        }
    )


def _write_drafts(state: BranchState, branch: BranchState, params: PolicyParams) -> None:
    """Row d: the branch's tokens, and its surest `drafts[d - 1]` MASKs as the last forward predicts them.

    A draft must leave a MASK, or its forward would be of no use. With the prefix exit it holds no EOS of its
    own: an EOS ends the window earlier, behind which the branch keeps its K/V.
    """
    masked = (branch.tokens == params.mask_token_id) & in_window(branch)
    confidence = torch.where(masked, branch.confidence, -1.0)
    order = torch.sort(confidence, dim=-1, descending=True, stable=True).indices
    place = torch.arange(state.gen_length, device=order.device)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    most = masked.sum(-1) - 1
    if params.eos_exit == "prefix":
        at_eos = masked & is_eos(branch.top_token, params)
        most = torch.minimum(most, torch.where(at_eos, rank, state.gen_length).amin(-1))
    possible = running_rows(branch) & ~branch.needs_refresh
    rows = by_request(state, torch.arange(state.num_rows, device=order.device))
    for draft, length in enumerate(params.drafts, start=1):
        row = rows[:, draft]
        exists = possible & (length <= most)
        written = masked & (rank < length) & exists.unsqueeze(1)
        state.tokens[row] = torch.where(written, branch.top_token, branch.tokens)
        state.done[row] = ~exists
        for name in ("window_start", "window_end", "decoded", "progress"):
            getattr(state, name)[draft :: state.num_branches] = getattr(branch, name).clone()
