"""What happens to the branches after a forward: commit, EOS check, advance, merge, sync (arXiv 2605.29233).

Three launches: the predictions go to their positions; one program for each request turns its branches; the
next forward is planned (`plan.py`), which needs to know what all requests ask for. With drafts the second is
repeated, for the branch that has come to hold what one of its drafts holds, and new drafts are written.
"""

import torch
import triton
import triton.language as tl

from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.structs import STOP_EOS, STOP_LENGTH, BranchState, PolicyEvents, Predictions, StepPlan
from blockbatch_kernels.triton import dream_policy
from blockbatch_kernels.triton.commit import best, mergeable, near_anchors, scheduled, sure
from blockbatch_kernels.triton.drafts import equal_draft, write_drafts
from blockbatch_kernels.triton.plan import BLOCK, INIT, REFRESH, write_plan
from blockbatch_kernels.triton.predictions import store_predictions
from blockbatch_kernels.triton.rows import (
    any_of,
    as_key,
    check_contiguous,
    count_up,
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

EOS_REASON = tl.constexpr(STOP_EOS)
LENGTH_REASON = tl.constexpr(STOP_LENGTH)


def decode_policy(
    state: BranchState,
    predictions: Predictions,
    plan: StepPlan,
    params: PolicyParams,
    out: tuple[StepPlan, PolicyEvents] | None = None,
) -> tuple[StepPlan, PolicyEvents]:
    if params.policy == "dream_published":
        return dream_policy.decode_policy(state, predictions, plan, params, out)
    device, num_rows, gen_length = state.tokens.device, state.num_rows, state.gen_length
    if out is None:
        out = (
            StepPlan.allocate(num_rows, gen_length, device),
            PolicyEvents.allocate(num_rows, gen_length, device),
        )
    next_plan, events = out
    named = (("predictions", predictions), ("plan", plan), ("out[0]", next_plan), ("out[1]", events))
    for name, record in named:
        check_contiguous(name, record)
    # Only the window exit asks for the probability of a token that stood there before.
    probe = torch.zeros_like(state.confidence) if params.eos_exit == "window" else None
    wants_refresh = torch.empty(state.num_requests, dtype=torch.int32, device=device)
    drafts = len(params.drafts)
    # Of the forward that drafts were part of; a request has one branch then, and its rows behind are drafts.
    window_end = torch.empty_like(wants_refresh) if drafts else None
    with device_of(state.tokens):
        store_predictions(state, predictions, probe=probe)
        for forward in range(1 + drafts):
            _policy_kernel[(state.num_requests,)](
                state_tensors(state),
                plan.source_row,
                plan.flags,
                probe,
                events,
                next_plan.flags,
                wants_refresh,
                window_end,
                params.threshold,
                params.tail_threshold,
                params.steps_per_block,
                params.leap_radius,
                params.leap_threshold,
                params.merge_threshold,
                params.sync_threshold,
                params.refresh_interval,
                params.mask_token_id,
                LEAPS=params.leap_radius > 0,
                EOS=params.eos_token_ids,
                EXIT=params.eos_exit,
                OPEN=params.query_span == "open",
                DRAFTS=drafts,
                ADOPTS=forward > 0,
                **tile_options(state, num_branches=1 if drafts else None),
            )
        if drafts:
            write_drafts(state, plan.source_row, window_end, events, params)
    write_plan(state, params, next_plan, wants_refresh=wants_refresh)
    return out


@kernel
def _policy_kernel(
    state,
    source_row,
    flags,
    probe,
    events,
    next_flags,
    wants_refresh,
    forward_end,
    threshold,
    tail_threshold,
    steps_per_block,
    leap_radius,
    leap_threshold,
    merge_threshold,
    sync_threshold,
    refresh_interval,
    mask_id,
    num_branches,
    gen_length,
    LEAPS: tl.constexpr,
    EOS: tl.constexpr,
    EXIT: tl.constexpr,
    OPEN: tl.constexpr,
    DRAFTS: tl.constexpr,
    ADOPTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """DRAFTS: rows of a request behind its branches. ADOPTS: a draft's forward may be the branch's next."""
    request = tl.program_id(0)
    branch, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    valid = branch < num_branches
    first_row = request * (num_branches if DRAFTS == 0 else num_branches + DRAFTS)
    row = first_row + branch
    at = row[:, None] * gen_length + column
    inside = valid[:, None] & (column < gen_length)

    phase = tl.load(flags + 1)
    is_refresh = phase == REFRESH
    tokens = load_tokens(state.tokens, at, inside)
    size = tl.load(state.block_size + row, mask=valid, other=1)
    window_start = tl.load(state.window_start + row, mask=valid, other=0)
    window_end = tl.load(state.window_end + row, mask=valid, other=0)
    decoded = tl.load(state.decoded + row, mask=valid, other=0)
    progress = tl.load(state.progress + row, mask=valid, other=0)
    blocks = tl.load(state.blocks_since_refresh + row, mask=valid, other=0)
    steps = tl.load(state.steps_in_block + row, mask=valid, other=0)
    needs_refresh = tl.load(state.needs_refresh + row, mask=valid, other=False) != 0
    done = tl.load(state.done + row, mask=valid, other=True) != 0
    finished = tl.load(state.finished + request) != 0
    winner, reason = tl.load(state.winner + request), tl.load(state.stop_reason + request)

    kv_row = row  # whose K and V it goes on with
    if ADOPTS:
        kv_row = equal_draft(state.tokens, source_row, tokens, row, at, inside, gen_length, DRAFTS)
        forwarded = (kv_row != row) & ~done & ~finished & (phase == BLOCK)
        if tl.max(forwarded.to(tl.int32), 0) == 0:
            return
        renewed = (tokens == mask_id) & in_window(column, window_start, window_end)
        taken_from = tl.where(renewed, kv_row[:, None], row[:, None]) * gen_length + column
        committed = tl.load(events.committed + at, mask=inside, other=False) != 0
        count_up(state.adopted + row, forwarded.to(tl.int32), valid)
    else:
        # A row takes the predictions of its source: equal rows of a full forward were computed once.
        source = tl.load(source_row + row, mask=valid, other=-1)
        forwarded = source >= 0
        taken_from = tl.where(forwarded, source, row)[:, None] * gen_length + column
        if DRAFTS > 0:
            tl.store(forward_end + request + branch, window_end, mask=valid)
    top = tl.load(state.top_token + taken_from, mask=inside, other=0)
    confidence = tl.load(state.confidence + taken_from, mask=inside, other=0.0)
    tl.debug_barrier()  # all sources are read before any is written
    tl.store(state.top_token + at, top, mask=inside)
    tl.store(state.confidence + at, confidence, mask=inside)
    if not ADOPTS:
        if any_of(forwarded, 0):
            forwards = state.nfe + request * 3 + phase
            tl.store(forwards, tl.load(forwards) + 1)

    # Commit.
    masked_before = tokens == mask_id
    candidate = masked_before & in_window(column, window_start, window_end) & forwarded[:, None]
    if steps_per_block is not None:
        chosen = scheduled(confidence, candidate, column, size, steps, steps_per_block, gen_length)
    else:
        chosen = sure(confidence, candidate, column, threshold, tail_threshold, gen_length)
        if LEAPS:
            near = near_anchors(chosen, leap_radius, events.committed, at, inside, column, gen_length)
            chosen |= candidate & near & (confidence >= leap_threshold)
        chosen |= best(confidence, candidate, column, gen_length)
    if ADOPTS:
        tl.store(events.committed + at, chosen | committed, mask=inside)
    else:
        tl.store(events.committed + at, chosen, mask=inside)
    tokens = tl.where(chosen, top, tokens)
    count = tl.sum(chosen.to(tl.int32), 1)
    decoded += count
    count_up(state.committed + row, count, valid)
    steps += forwarded.to(tl.int32)

    refreshed = forwarded & (is_refresh | (phase == INIT))
    blocks = tl.where(refreshed, 0, blocks)
    needs_refresh &= ~refreshed

    horizon = _horizon(tokens, column, gen_length, EOS, EXIT)
    window_end = tl.minimum(window_end, horizon)
    if EXIT == "prefix":
        ends, score = _prefix_ends(tokens, confidence, column, horizon, mask_id, gen_length)
        finished, winner, reason = _finish(ends, score, finished, winner, reason, EOS_REASON)
    if EXIT == "window":
        eos = is_eos(tokens, EOS) & in_window(column, window_start, window_end)
        closed = ~_open(tokens, column, window_start, window_end, mask_id)
        ends = forwarded & (phase == BLOCK) & any_of(eos, 1) & closed & ~done & ~finished
        # The probability of the EOS in this very forward: of the top token where it was just written.
        probed = tl.load(probe + taken_from, mask=inside, other=0.0)
        probability = tl.where(masked_before, confidence, probed)
        score = _at(probability, column, first_true(eos, column, gen_length))
        finished, winner, reason = _finish(ends, score, finished, winner, reason, EOS_REASON)

    # Advance. A refresh only commits; the rest waits for the next block denoise.
    moving = ~done & ~finished & ~is_refresh
    moving &= ~_open(tokens, column, window_start, window_end, mask_id)
    start, end, complete = _first_block(tokens, column, horizon, size, mask_id, gen_length)
    window_start, window_end, progress, done, steps = _move(
        moving, start, end, complete, window_start, window_end, progress, done, steps
    )
    blocks, needs_refresh = _count_blocks(moving & ~done, blocks, needs_refresh, size, refresh_interval)

    # Merge.
    member = ~done & ~finished & ~is_refresh
    merged = mergeable(
        tokens, top, column, branch, member, window_start, window_end, horizon, mask_id, num_branches
    )
    # Above a merge threshold of one half only the destination's own top token can pass.
    merged &= (confidence > merge_threshold) & (tl.max(decoded, 0) > 0)
    tl.store(events.merged + at, merged, mask=inside)
    tokens = tl.where(merged, top, tokens)
    count_up(state.merged + row, tl.sum(merged.to(tl.int32), 1), valid)
    horizon = _horizon(tokens, column, gen_length, EOS, EXIT)
    window_end = tl.minimum(window_end, horizon)
    moving = member & ~_open(tokens, column, window_start, window_end, mask_id)
    start, end, complete = _first_block(tokens, column, horizon, size, mask_id, gen_length)
    window_start, window_end, progress, done, steps = _move(
        moving, start, end, complete, window_start, window_end, progress, done, steps
    )
    blocks, needs_refresh = _count_blocks(moving & ~done, blocks, needs_refresh, size, refresh_interval)
    if EXIT == "prefix":
        ends, score = _prefix_ends(tokens, confidence, column, horizon, mask_id, gen_length)
        finished, winner, reason = _finish(ends, score, finished, winner, reason, EOS_REASON)

    # Sync.
    leader = tl.argmax(tl.where(valid, decoded, -1), 0)  # the smallest index on a tie
    ahead = pick(branch, leader, decoded)
    trails = ~done & ~finished & ~is_refresh & (ahead - decoded > sync_threshold)
    tokens = tl.where(trails[:, None], pick(branch[:, None], leader, tokens)[None, :], tokens)
    decoded = tl.where(trails, ahead, decoded)
    done |= trails & any_of((branch == leader) & done, 0)
    tl.store(events.sync_source + row, tl.where(trails, first_row + leader, kv_row), mask=valid)
    count_up(state.synced + row, trails.to(tl.int32), valid)
    horizon = _horizon(tokens, column, gen_length, EOS, EXIT)
    start, end, complete = _first_block(tokens, column, horizon, size, mask_id, gen_length)
    window_start, window_end, progress, done, steps = _move(
        trails, start, end, complete, window_start, window_end, progress, done, steps
    )

    # A request without an open branch ends with the most advanced one.
    ends = valid & ~any_of(~done, 0)
    finished, winner, reason = _finish(ends, progress.to(tl.float32), finished, winner, reason, LENGTH_REASON)

    if OPEN:
        # K and V are those of the tokens before the commit, which stand in memory still.
        cached = tl.load(state.cached_token + at, mask=inside, other=0)
        cached = tl.where(forwarded[:, None], load_tokens(state.tokens, at, inside), cached)
        cached = tl.where(trails[:, None], pick(branch[:, None], leader, cached)[None, :], cached)

    tl.debug_barrier()  # every warp has read what is written now
    if OPEN:
        tl.store(state.cached_token + at, cached, mask=inside)
    tl.store(state.tokens + at, tokens, mask=inside)
    tl.store(state.window_start + row, window_start, mask=valid)
    tl.store(state.window_end + row, window_end, mask=valid)
    tl.store(state.decoded + row, decoded, mask=valid)
    tl.store(state.progress + row, progress, mask=valid)
    tl.store(state.blocks_since_refresh + row, blocks, mask=valid)
    tl.store(state.steps_in_block + row, steps, mask=valid)
    tl.store(state.needs_refresh + row, needs_refresh, mask=valid)
    tl.store(state.done + row, done, mask=valid)
    tl.store(state.finished + request, finished)
    tl.store(state.winner + request, winner)
    tl.store(state.stop_reason + request, reason)
    tl.store(wants_refresh + request, any_of(needs_refresh & ~done & ~finished, 0).to(tl.int32))
    if request == 0:
        # What the plan adds up. The phase stands: other programs may read it still.
        tl.store(next_flags, 0)
        for flag in tl.static_range(2, 5):
            tl.store(next_flags + flag, 0)


@triton.jit
def _at(values, column, position):
    """[N]: the value of every row at its position; 0 outside the tile."""
    return tl.sum(tl.where(column == position[:, None], values, 0.0), 1)


@triton.jit
def _horizon(tokens, column, gen_length, EOS: tl.constexpr, EXIT: tl.constexpr):
    """[N]: end of the positions that a branch works on: with the prefix exit its first EOS."""
    if EXIT == "prefix":
        ends = is_eos(tokens, EOS)
    else:
        ends = tokens != tokens
    return first_true(ends, column, gen_length)


@triton.jit
def _open(tokens, column, window_start, window_end, mask_id):
    """[N]: the window still holds a MASK."""
    return any_of((tokens == mask_id) & in_window(column, window_start, window_end), 1)


@triton.jit
def _prefix_ends(tokens, confidence, column, first_eos, mask_id, gen_length):
    """[N]: whether everything before the first EOS is decoded, and the confidence of that EOS."""
    open_before = any_of((tokens == mask_id) & (column < first_eos[:, None]), 1)
    return (first_eos < gen_length) & ~open_before, _at(confidence, column, first_eos)


@triton.jit
def _finish(ends, score, finished, winner, reason, new_reason: tl.constexpr):
    """Ends a request that has a branch in `ends`; the highest score wins, the smallest branch on a tie."""
    best = tl.argmax(tl.where(ends, as_key(score), float("-inf")), 0)
    stops = any_of(ends, 0) & ~finished
    return finished | stops, tl.where(stops, best, winner), tl.where(stops, new_reason, reason)


@triton.jit
def _first_block(tokens, column, horizon, size, mask_id, gen_length):
    """[N] each: start and end of the block that holds the first open MASK, and whether there is none."""
    first_mask = first_true(tokens == mask_id, column, gen_length)
    complete = first_mask >= horizon
    start = tl.where(complete, gen_length, first_mask - first_mask % size)
    return start, tl.where(complete, gen_length, tl.minimum(start + size, horizon)), complete


@triton.jit
def _move(moving, start, end, complete, window_start, window_end, progress, done, steps):
    """Puts the windows of `moving` rows on their first open block; without one, the row is done."""
    return (
        tl.where(moving, start, window_start),
        tl.where(moving, end, window_end),
        tl.where(moving, start, progress),
        done | (moving & complete),
        tl.where(moving, 0, steps),
    )


@triton.jit
def _count_blocks(advanced, blocks, needs_refresh, size, refresh_interval):
    blocks += advanced.to(tl.int32)
    if refresh_interval is not None:
        needs_refresh |= advanced & (blocks * size >= refresh_interval)
    return blocks, needs_refresh
