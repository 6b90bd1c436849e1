"""What happens to the branches after a forward by the rule that BlockBatch's authors published for Dream.

The paper (arXiv 2605.29233) describes one rule; the authors' code for Dream follows another than their code
for LLaDA, which `policy.py` holds. Where the two differ:

- A full forward writes one token, at the first MASK, whatever its confidence.
- A branch works on the block of its first MASK, found anew after every change; a sync can move it back.
- Merges go by a *map*: a token that another branch holds is taken where its last probability above 0.2 since
  the last full forward is one half or more. Probabilities that have sunk to 0.2 are not noticed. Of that map
  only tokens that once had one half are kept here: no other can be taken (see `shapes.map_entries`).
- Progress is how many tokens a row holds, and a refresh is due once the first MASK has moved far enough.
- The first branch that is complete ends its request.

Windows, `decoded` and `done` follow from the tokens and are brought up to date after every change.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.reference.plan import by_request, first_true, in_window, is_eos
from blockbatch_kernels.shapes import LEAST_LIKELY
from blockbatch_kernels.structs import (
    PHASE_BLOCK,
    STOP_EOS,
    STOP_LENGTH,
    BranchState,
    PolicyEvents,
    Predictions,
)

_TAKEN = 0.5


class Rows(NamedTuple):
    """What follows from the tokens of the rows, [R] each. The first EOS is G where none counts."""

    first_eos: Tensor
    first_mask: Tensor
    frontier: Tensor  # the first MASK before the first EOS; without one, what stands behind the EOS


def after_forward(
    state: BranchState, predictions: Predictions, forwarded: Tensor, phase: Tensor, params: PolicyParams
) -> PolicyEvents:
    """All rules but the next plan, once the predictions of the rows `forwarded` stand in the state."""
    is_block = phase == PHASE_BLOCK
    before = _realign(state, params)
    forwarded = forwarded & ~state.done & ~state.finished.repeat_interleave(state.num_branches)
    candidates = (state.tokens == params.mask_token_id) & in_window(state) & forwarded.unsqueeze(1)
    committed = _chosen(state, candidates, before.first_mask, is_block, params)
    state.tokens.copy_(torch.where(committed, state.top_token, state.tokens))
    state.committed.add_(committed.sum(-1).int())

    is_full = forwarded & ~is_block
    _store(state, predictions, candidates & is_block)
    _empty_map(state, is_full)
    _advance(state, before.frontier, params)
    state.moved_since_refresh.masked_fill_(is_full, 0)
    _finish(state, params)

    merged = _merge(state, _running(state) & is_block, params)
    sync_source = _sync(state, _running(state) & is_block, params)
    _finish(state, params)
    state.needs_refresh.copy_(_due(state, params) & _running(state))
    return PolicyEvents(committed, merged, sync_source)


def _running(state: BranchState) -> Tensor:
    return ~state.done & ~state.finished.repeat_interleave(state.num_branches)


def _look(state: BranchState, params: PolicyParams) -> Rows:
    if params.eos_exit == "prefix":
        first_eos = first_true(is_eos(state.tokens, params))
    else:
        first_eos = torch.full_like(state.decoded, state.gen_length)
    first_mask = first_true(state.tokens == params.mask_token_id)
    behind = (first_eos + 1).clamp(max=state.gen_length)
    return Rows(first_eos, first_mask, torch.where(first_mask < first_eos, first_mask, behind))


def _realign(state: BranchState, params: PolicyParams) -> Rows:
    """Brings windows, `progress`, `decoded` and `done` up to date."""
    rows = _look(state, params)
    position = torch.arange(state.gen_length, device=state.tokens.device)
    counts = (state.tokens != params.mask_token_id) & (position <= rows.first_eos.unsqueeze(1))
    state.decoded.copy_(counts.sum(-1))
    done = rows.first_mask >= rows.first_eos
    start = rows.first_mask - rows.first_mask % state.block_size
    end = torch.minimum(start + state.block_size, rows.first_eos)
    state.done.copy_(done)
    state.window_start.copy_(torch.where(done, state.gen_length, start))
    state.window_end.copy_(torch.where(done, state.gen_length, end))
    state.progress.copy_(state.window_start)
    return rows


def _advance(state: BranchState, frontier_before: Tensor, params: PolicyParams) -> None:
    rows = _realign(state, params)
    state.moved_since_refresh.add_((rows.frontier - frontier_before).clamp(min=0))


def _chosen(
    state: BranchState, candidates: Tensor, first_mask: Tensor, is_block: Tensor, params: PolicyParams
) -> Tensor:
    """[R, G] bool: what is committed; after a full forward the first MASK, whatever its confidence."""
    position = torch.arange(state.gen_length, device=candidates.device)
    first = candidates & (position == first_mask.unsqueeze(1))
    return torch.where(is_block, _sure(state, candidates, params), first)


def _due(state: BranchState, params: PolicyParams) -> Tensor:
    """[R] bool: whether the row asks for a full forward, if it goes on."""
    if params.refresh_interval is None:
        return torch.zeros_like(state.done)
    return state.moved_since_refresh >= params.refresh_interval


def _sure(state: BranchState, candidates: Tensor, params: PolicyParams) -> Tensor:
    """Candidates at the threshold; in a row without any, the highest of those that would not be an EOS."""
    confidence = torch.where(candidates, state.confidence, -1.0)
    sure = candidates & (confidence >= params.threshold)
    others = candidates
    if params.eos_exit == "prefix":
        others = candidates & ~is_eos(state.top_token, params)
        others = torch.where(others.any(-1, keepdim=True), others, candidates)
    best = torch.where(others, confidence, -1.0).argmax(-1, keepdim=True)
    position = torch.arange(state.gen_length, device=confidence.device)
    return torch.where(sure.any(-1, keepdim=True), sure, candidates & (position == best))


def _entries_in_use(state: BranchState) -> tuple[Tensor, Tensor]:
    """Views of the map up to one free place in every line. The host waits for the number."""
    used = (state.map_probability > 0).sum(-1).max() + 1
    number = min(int(used), state.map_token.shape[2])
    return state.map_token[:, :, :number], state.map_probability[:, :, :number]


def _empty_map(state: BranchState, rows: Tensor) -> None:
    for field in (state.map_token, state.map_probability):
        field.masked_fill_(rows.view(-1, 1, 1), 0)


def _store(state: BranchState, predictions: Predictions, rows_and_positions: Tensor) -> None:
    """Writes what is likely there into the map: every token that has an entry, and new ones from one half on.

    An entry whose token is below one half stays, and can no longer be taken.
    """
    behind = state.tokens.numel()
    target = torch.where(predictions.target < 0, behind, predictions.target)

    def scatter(values: Tensor) -> Tensor:
        padded = values.new_zeros(behind + 1, values.shape[1])
        padded[target] = values
        return padded[:behind].view(*state.tokens.shape, -1)

    likely_token, likely_probability = map(
        scatter, (predictions.likely_token, predictions.likely_probability)
    )
    for place in range(likely_token.shape[-1]):
        map_token, map_probability = _entries_in_use(state)
        token, probability = likely_token[..., place, None], likely_probability[..., place, None]
        stored = rows_and_positions.unsqueeze(-1) & (probability > LEAST_LIKELY)
        known = (map_token == token) & (map_probability > 0)
        is_new = stored & ~known.any(-1, keepdim=True) & (probability >= _TAKEN)
        is_free = map_probability == 0
        first_free = is_free & (is_free.int().cumsum(-1) == 1)
        written = (stored & known) | (is_new & first_free)
        map_token.copy_(torch.where(written, token, map_token))
        map_probability.copy_(torch.where(written, probability, map_probability))


def _merge(state: BranchState, rows: Tensor, params: PolicyParams) -> Tensor:
    tokens = by_request(state, state.tokens)  # [Q, N, G]
    held = tokens != params.mask_token_id
    member, end = by_request(state, rows), by_request(state, state.window_end)
    branch, position = (torch.arange(size, device=tokens.device) for size in tokens.shape[1:])
    # Destinations go from the window that ends last to the one that ends first; sources stand behind them.
    # Below, dimension 1 is the destination and dimension 2 the source.
    behind = (end.unsqueeze(1) < end.unsqueeze(2)) | (
        (end.unsqueeze(1) == end.unsqueeze(2)) & (branch.view(1, 1, -1) > branch.view(1, -1, 1))
    )
    before = _look(state, params)
    # What stands behind the first EOS of a row counts for nothing.
    counts = position <= by_request(state, before.first_eos).unsqueeze(-1)
    both_held = held.unsqueeze(2) & held.unsqueeze(1) & counts.unsqueeze(2) & counts.unsqueeze(1)
    differ = both_held & (tokens.unsqueeze(2) != tokens.unsqueeze(1))
    compatible = behind & ~differ.any(-1) & member.unsqueeze(2) & member.unsqueeze(1)
    offers = compatible.unsqueeze(-1) & (held & counts).unsqueeze(1)

    map_token, map_probability = (by_request(state, field) for field in _entries_in_use(state))
    value = torch.zeros(offers.shape, device=tokens.device)
    for entry in range(map_token.shape[-1]):
        matches = offers & (map_token[..., entry].unsqueeze(2) == tokens.unsqueeze(1))
        value = torch.maximum(value, torch.where(matches, map_probability[..., entry].unsqueeze(2), 0.0))
    highest = value.amax(2)
    # Of equal values the source that stands first in the order counts.
    rank = behind.sum(1)  # [Q, N]: rows in front of each
    first = torch.where(value == highest.unsqueeze(2), rank.view(-1, 1, rank.shape[1], 1), rank.shape[1])
    source = first.argmin(2)  # [Q, N, G]
    token = tokens.gather(1, source)
    places = _merge_places(state, compatible) & ~held & member.unsqueeze(-1)
    merged = places & (highest >= _TAKEN)

    merged, token, highest = (x.flatten(0, 1) for x in (merged, token, highest))
    state.tokens.copy_(torch.where(merged, token, state.tokens))
    # For traces, which read there what was written.
    state.top_token.copy_(torch.where(merged, token, state.top_token))
    state.confidence.copy_(torch.where(merged, highest, state.confidence))
    state.merged.add_(merged.sum(-1).int())
    _advance(state, before.frontier, params)
    return merged


def _merge_places(state: BranchState, compatible: Tensor) -> Tensor:
    """[Q, N, G]: where a destination may take tokens, of [Q, N, N] destinations and sources: its window."""
    return by_request(state, in_window(state))


def _taken_over(state: BranchState) -> tuple[Tensor, ...]:
    """What a sync copies, beside K/V."""
    return (state.tokens, state.moved_since_refresh, *_entries_in_use(state))


def _progress(state: BranchState) -> Tensor:
    """[R]: who has most leads."""
    return state.decoded


def _sync(state: BranchState, rows: Tensor, params: PolicyParams) -> Tensor:
    holds = by_request(state, _progress(state))
    leader = holds.argmax(1, keepdim=True)  # [Q, 1]
    trails = (holds.gather(1, leader) - holds > params.sync_threshold).flatten() & rows
    own = torch.arange(state.num_rows, device=holds.device)
    first_row = torch.arange(state.num_requests, device=holds.device).unsqueeze(1) * state.num_branches
    source = torch.where(trails, (leader + first_row).expand_as(holds).flatten(), own)
    for field in _taken_over(state):
        field.copy_(field[source])
    state.synced.add_(trails.int())
    _realign(state, params)
    return source.int()


def _finish(state: BranchState, params: PolicyParams) -> None:
    """Ends requests that have a branch with an EOS and no MASK before it, or one without any MASK.

    Of the former the one wins that holds most, which is the one of the latest EOS; the largest block size on
    a tie, as among the latter.
    """
    rows = _look(state, params)
    ready = by_request(state, state.done & (rows.first_eos < state.gen_length))
    complete = by_request(state, rows.first_mask == state.gen_length)
    branch = torch.arange(state.num_branches, device=ready.device)
    holds = by_request(state, state.decoded).long()
    most = torch.where(ready, holds * state.num_branches + branch, -1).argmax(1)
    last = torch.where(complete, branch, -1).argmax(1)
    ends_ready = ready.any(1) & ~state.finished
    ends_complete = complete.any(1) & ~ready.any(1) & ~state.finished
    state.winner.copy_(torch.where(ends_ready, most, torch.where(ends_complete, last, state.winner)))
    state.stop_reason.masked_fill_(ends_ready, STOP_EOS).masked_fill_(ends_complete, STOP_LENGTH)
    state.finished.logical_or_(ends_ready | ends_complete)
