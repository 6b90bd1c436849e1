"""What happens to the branches after a forward: commit, EOS check, advance, merge, sync (arXiv 2605.29233).

Written as one pass over [rows, generation] tensors; nothing here asks the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.reference import drafts, dream_policy
from blockbatch_kernels.reference.plan import (
    by_request,
    first_true,
    in_window,
    is_eos,
    next_plan,
    running_rows,
    write,
)
from blockbatch_kernels.structs import (
    PHASE_BLOCK,
    PHASE_INIT,
    PHASE_REFRESH,
    STOP_EOS,
    STOP_LENGTH,
    BranchState,
    PolicyEvents,
    Predictions,
    StepPlan,
)


def decode_policy(
    state: BranchState,
    predictions: Predictions,
    plan: StepPlan,
    params: PolicyParams,
    out: tuple[StepPlan, PolicyEvents] | None = None,
) -> tuple[StepPlan, PolicyEvents]:
    phase = plan.flags[1]
    forwarded = plan.source_row >= 0
    count_forward(state, forwarded, phase)
    if params.query_span == "open":
        _note_cached(state, forwarded)
    probe_probability = store_predictions(state, predictions, plan)
    if params.policy == "dream_published":
        events = dream_policy.after_forward(state, predictions, forwarded, phase, params)
    elif params.drafts:
        events = drafts.follow(state, plan, probe_probability, params, after_forward)
    else:
        events = after_forward(state, forwarded, phase, probe_probability, params)
    result = next_plan(state, params), events
    if out is None:
        return result
    for values, target in zip(result, out, strict=True):
        write(values, target)
    return out


def after_forward(
    state: BranchState, forwarded: Tensor, phase: Tensor, probe_probability: Tensor, params: PolicyParams
) -> PolicyEvents:
    """All rules but the next plan, once the predictions of the rows `forwarded` stand in the state."""
    masked_before = state.tokens == params.mask_token_id
    committed = _commit(state, forwarded, params)
    _clip_windows(state, params)

    is_refresh, is_block = phase == PHASE_REFRESH, phase == PHASE_BLOCK
    refreshed = forwarded & (is_refresh | (phase == PHASE_INIT))
    state.blocks_since_refresh.masked_fill_(refreshed, 0)
    state.needs_refresh.masked_fill_(refreshed, False)

    if params.eos_exit == "prefix":
        _finish_prefix(state, params)
    elif params.eos_exit == "window":
        # The probability of the EOS in this very forward: of the top token where it was just written.
        eos_probability = torch.where(masked_before, state.confidence, probe_probability)
        _finish_window(state, forwarded & is_block, eos_probability, params)

    # A refresh only commits; the rest waits for the next block denoise.
    _advance(state, running_rows(state) & ~_open_windows(state, params) & ~is_refresh, params)
    merged = _merge(state, running_rows(state) & ~is_refresh, params)
    if params.eos_exit == "prefix":
        _finish_prefix(state, params)
    sync_source = _sync(state, running_rows(state) & ~is_refresh, params)
    _finish_length(state)
    return PolicyEvents(committed, merged, sync_source)


def count_forward(state: BranchState, forwarded: Tensor, phase: Tensor) -> None:
    took_part = by_request(state, forwarded).any(1).int()
    is_phase = torch.arange(3, device=phase.device) == phase
    state.nfe.add_(is_phase.int() * took_part.unsqueeze(1))


def _note_cached(state: BranchState, forwarded: Tensor) -> None:
    """Keeps in mind which tokens the K/V of the rows was computed from: those before this commit.

    That is the whole row, whatever the queries were: a token whose K/V was that of another was among them,
    and the K/V of a MASK always is that of a MASK.
    """
    state.cached_token.copy_(torch.where(forwarded.unsqueeze(1), state.tokens, state.cached_token))


def store_predictions(state: BranchState, predictions: Predictions, plan: StepPlan) -> Tensor:
    """Scatters the packed predictions; returns the probe probabilities, [R, G]."""
    num_rows, gen_length = state.tokens.shape
    request = predictions.target.clamp(min=0) // (state.num_branches * gen_length)
    non_finite = (predictions.target >= 0) & ~predictions.confidence.isfinite()
    state.non_finite.index_add_(0, request, non_finite.int())
    behind = num_rows * gen_length  # padding goes to a slot behind the end
    target = torch.where(predictions.target < 0, behind, predictions.target)
    rows = torch.arange(num_rows, device=target.device)
    source = torch.where(plan.source_row < 0, rows, plan.source_row.long())

    def scatter(into: Tensor, values: Tensor) -> Tensor:
        padded = torch.cat((into.flatten(), into.new_zeros(1)))
        padded.scatter_(0, target, values.to(into.dtype))
        # Equal rows of a full forward were computed once.
        return padded[:behind].view(num_rows, gen_length)[source]

    state.top_token.copy_(scatter(state.top_token, predictions.top_token))
    state.confidence.copy_(scatter(state.confidence, predictions.confidence))
    probe = torch.zeros_like(state.confidence)
    if predictions.probe_probability is None:
        return probe
    return scatter(probe, predictions.probe_probability)


def _first_eos(state: BranchState, params: PolicyParams) -> Tensor:
    """[R] int32: position of the first EOS of the row, G if it holds none."""
    return first_true(is_eos(state.tokens, params))


def _clip_windows(state: BranchState, params: PolicyParams) -> None:
    """With the prefix exit a branch works only on what stands before its first EOS."""
    if params.eos_exit == "prefix":
        state.window_end.copy_(torch.minimum(state.window_end, _first_eos(state, params)))


def _open_windows(state: BranchState, params: PolicyParams) -> Tensor:
    """[R] bool: the window still holds a MASK."""
    return ((state.tokens == params.mask_token_id) & in_window(state)).any(-1)


def _commit(state: BranchState, rows: Tensor, params: PolicyParams) -> Tensor:
    candidates = (state.tokens == params.mask_token_id) & in_window(state) & rows.unsqueeze(1)
    confidence = torch.where(candidates, state.confidence, -1.0)
    if params.threshold is None:
        chosen = _scheduled(state, confidence, params)
    else:
        position = torch.arange(state.gen_length, device=confidence.device)
        chosen = candidates & (confidence >= params.threshold)
        if params.tail_threshold is not None:
            behind = (candidates & ~chosen).int().cumsum(-1) > 0
            chosen = chosen & (~behind | (confidence >= params.tail_threshold))
        if params.leap_radius > 0:
            anchors = chosen.float().unsqueeze(1)
            near = (
                F.max_pool1d(
                    anchors, 2 * params.leap_radius + 1, stride=1, padding=params.leap_radius
                ).squeeze(1)
                > 0
            )
            chosen = chosen | (near & (confidence >= params.leap_threshold))
        chosen = chosen | (position == confidence.argmax(-1, keepdim=True))
    committed = chosen & candidates
    count = committed.sum(-1).int()
    state.tokens.copy_(torch.where(committed, state.top_token, state.tokens))
    state.decoded.add_(count)
    state.committed.add_(count)
    state.steps_in_block.add_(rows.int())
    return committed


def _scheduled(state: BranchState, confidence: Tensor, params: PolicyParams) -> Tensor:
    """The k highest confidences of each window, k fixed by the number of steps a block takes."""
    steps = params.steps_per_block
    number = state.block_size // steps + (state.steps_in_block < state.block_size % steps).int()
    # A block that has used up its steps (it holds a MASK that the model itself wrote) takes the rest at once.
    number = torch.where(state.steps_in_block < steps, number, state.block_size)
    order = torch.sort(confidence, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(state.gen_length, device=order.device).expand_as(order)
    )
    return rank < number.unsqueeze(1)


def _finish(state: BranchState, finished: Tensor, score: Tensor, reason: int) -> None:
    """Ends requests that have a finished branch; the highest score wins, the smallest branch on a tie."""
    finished = by_request(state, finished)
    score = torch.where(finished, by_request(state, score), float("-inf"))
    stops = finished.any(1) & ~state.finished
    state.winner.copy_(torch.where(stops, score.argmax(1).int(), state.winner))
    state.stop_reason.masked_fill_(stops, reason)
    state.finished.logical_or_(stops)


def _finish_prefix(state: BranchState, params: PolicyParams) -> None:
    first_eos = _first_eos(state, params)
    position = torch.arange(state.gen_length, device=first_eos.device)
    open_before = (state.tokens == params.mask_token_id) & (position < first_eos.unsqueeze(1))
    finished = (first_eos < state.gen_length) & ~open_before.any(-1)
    at_eos = first_eos.long().clamp(max=state.gen_length - 1).unsqueeze(1)
    _finish(state, finished, state.confidence.gather(1, at_eos).squeeze(1), STOP_EOS)


def _finish_window(state: BranchState, rows: Tensor, eos_probability: Tensor, params: PolicyParams) -> None:
    eos = is_eos(state.tokens, params) & in_window(state)
    finished = rows & eos.any(-1) & ~_open_windows(state, params) & running_rows(state)
    at_eos = first_true(eos).long().clamp(max=state.gen_length - 1).unsqueeze(1)
    _finish(state, finished, eos_probability.gather(1, at_eos).squeeze(1), STOP_EOS)


def _finish_length(state: BranchState) -> None:
    """A request without an open branch ends with the most advanced one."""
    all_done = by_request(state, state.done).all(1).repeat_interleave(state.num_branches)
    _finish(state, all_done, state.progress.float(), STOP_LENGTH)


def _move_window(state: BranchState, rows: Tensor, params: PolicyParams) -> None:
    """Puts the windows of `rows` on the block of the first open MASK; without one, the row is done."""
    first_eos = torch.full_like(state.window_end, state.gen_length)
    if params.eos_exit == "prefix":
        first_eos = _first_eos(state, params)
    first_mask = first_true(state.tokens == params.mask_token_id)
    complete = first_mask >= first_eos
    start = torch.where(complete, state.gen_length, first_mask - first_mask % state.block_size)
    end = torch.where(complete, state.gen_length, torch.minimum(start + state.block_size, first_eos))
    state.window_start.copy_(torch.where(rows, start, state.window_start))
    state.window_end.copy_(torch.where(rows, end, state.window_end))
    state.progress.copy_(torch.where(rows, start, state.progress))
    state.done.logical_or_(rows & complete)
    state.steps_in_block.masked_fill_(rows, 0)


def _advance(state: BranchState, rows: Tensor, params: PolicyParams) -> None:
    _move_window(state, rows, params)
    rows = rows & ~state.done
    state.blocks_since_refresh.add_(rows.int())
    if params.refresh_interval is not None:
        due = state.blocks_since_refresh * state.block_size >= params.refresh_interval
        state.needs_refresh.logical_or_(rows & due)


def _merge(state: BranchState, rows: Tensor, params: PolicyParams) -> Tensor:
    tokens = by_request(state, state.tokens)  # [Q, N, G]
    held = tokens != params.mask_token_id
    member = by_request(state, rows)
    end = by_request(state, state.window_end)
    branch = torch.arange(state.num_branches, device=tokens.device)
    # Destinations go from the window that ends last to the one that ends first; sources stand behind them.
    # Below, dimension 1 is the destination and dimension 2 the source.
    behind = (end.unsqueeze(1) < end.unsqueeze(2)) | (
        (end.unsqueeze(1) == end.unsqueeze(2)) & (branch.view(1, 1, -1) > branch.view(1, -1, 1))
    )
    differ = held.unsqueeze(2) & held.unsqueeze(1) & (tokens.unsqueeze(2) != tokens.unsqueeze(1))
    if params.eos_exit == "prefix":
        position = torch.arange(state.gen_length, device=tokens.device)
        before_eos = position < by_request(state, _first_eos(state, params)).unsqueeze(-1)
        differ &= before_eos.unsqueeze(2) & before_eos.unsqueeze(1)
    compatible = behind & ~differ.any(-1) & member.unsqueeze(2) & member.unsqueeze(1)

    # Above a merge threshold of one half only the destination's own top token can pass.
    top_token, confidence = by_request(state, state.top_token), by_request(state, state.confidence)
    source_window = by_request(state, in_window(state)).unsqueeze(1)
    covered = (compatible.unsqueeze(-1) & source_window).any(2)
    agreed = compatible.unsqueeze(-1) & held.unsqueeze(1) & (tokens.unsqueeze(1) == top_token.unsqueeze(2))
    started = (by_request(state, state.decoded).amax(1) > 0).view(-1, 1, 1)
    # No source's window reaches past the destination's, and so none past its first EOS.
    merged = ~held & covered & agreed.any(2) & (confidence > params.merge_threshold) & started
    merged = merged.flatten(0, 1)

    state.tokens.copy_(torch.where(merged, state.top_token, state.tokens))
    state.merged.add_(merged.sum(-1).int())
    _clip_windows(state, params)
    _advance(state, rows & ~_open_windows(state, params) & ~state.done, params)
    return merged


def _sync(state: BranchState, rows: Tensor, params: PolicyParams) -> Tensor:
    decoded = by_request(state, state.decoded)
    leader = decoded.argmax(1, keepdim=True)  # [Q, 1]
    trails = (decoded.gather(1, leader) - decoded > params.sync_threshold).flatten() & rows
    own = torch.arange(state.num_rows, device=decoded.device)
    first_row = torch.arange(state.num_requests, device=decoded.device).unsqueeze(1) * state.num_branches
    source = torch.where(trails, (leader + first_row).expand_as(decoded).flatten(), own)
    with_kv = (state.cached_token,) if params.query_span == "open" else ()
    for field in (state.tokens, state.decoded, state.done, *with_kv):
        field.copy_(field[source])
    _move_window(state, trails, params)
    state.synced.add_(trails.int())
    return source.int()
