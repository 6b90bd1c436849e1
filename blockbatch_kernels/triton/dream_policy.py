"""What happens to the branches after a forward by the rule that BlockBatch's authors published for Dream.

`reference/dream_policy.py` says what that is. Three launches as for LLaDA's rule: the predictions go to their
positions, one program for each request turns its branches, the next forward is planned.
"""

import torch
import triton
import triton.language as tl

from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.shapes import LEAST_LIKELY, NUM_LIKELY
from blockbatch_kernels.structs import (
    PHASE_BLOCK,
    STOP_EOS,
    STOP_LENGTH,
    BranchState,
    PolicyEvents,
    Predictions,
    StepPlan,
)
from blockbatch_kernels.triton.commit import best
from blockbatch_kernels.triton.dream_map import empty_map, find_entry, store_likely, take_map
from blockbatch_kernels.triton.plan import write_plan
from blockbatch_kernels.triton.predictions import store_predictions
from blockbatch_kernels.triton.rows import (
    any_of,
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

BLOCK = tl.constexpr(PHASE_BLOCK)
EOS_REASON = tl.constexpr(STOP_EOS)
LENGTH_REASON = tl.constexpr(STOP_LENGTH)
LEAST = tl.constexpr(LEAST_LIKELY)
PLACES = tl.constexpr(NUM_LIKELY)
# A token is merged from this probability on.
TAKEN = tl.constexpr(0.5)


def decode_policy(
    state: BranchState,
    predictions: Predictions,
    plan: StepPlan,
    params: PolicyParams,
    out: tuple[StepPlan, PolicyEvents] | None = None,
) -> tuple[StepPlan, PolicyEvents]:
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
    wants_refresh = torch.empty(state.num_requests, dtype=torch.int32, device=device)
    # Which prediction is that of a position; -1: none.
    prediction_at = torch.full_like(state.tokens, -1)
    with device_of(state.tokens):
        store_predictions(state, predictions, place=prediction_at)
        _policy_kernel[(state.num_requests,)](
            state_tensors(state),
            plan.source_row,
            plan.flags,
            predictions,
            prediction_at,
            events,
            next_plan.flags,
            wants_refresh,
            params.threshold,
            params.sync_threshold,
            params.refresh_interval,
            params.mask_token_id,
            state.map_token.shape[2],
            EOS=params.eos_token_ids if params.eos_exit == "prefix" else (),
            **tile_options(state),
        )
    write_plan(state, params, next_plan, wants_refresh=wants_refresh)
    return out


@kernel
def _policy_kernel(
    state,
    source_row,
    flags,
    predictions,
    prediction_at,
    events,
    next_flags,
    wants_refresh,
    threshold,
    sync_threshold,
    refresh_interval,
    mask_id,
    map_entries,
    num_branches,
    gen_length,
    EOS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """EOS: ids that end a text; () where no token counts as one."""
    request = tl.program_id(0)
    branch, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    valid = branch < num_branches
    first_row = request * num_branches
    row = first_row + branch
    at = row[:, None] * gen_length + column
    inside = valid[:, None] & (column < gen_length)

    phase = tl.load(flags + 1)
    is_block = phase == BLOCK
    tokens = load_tokens(state.tokens, at, inside)
    size = tl.load(state.block_size + row, mask=valid, other=1)
    moved = tl.load(state.moved_since_refresh + row, mask=valid, other=0)
    finished = tl.load(state.finished + request) != 0
    winner, reason = tl.load(state.winner + request), tl.load(state.stop_reason + request)

    source = tl.load(source_row + row, mask=valid, other=-1)
    took_part = source >= 0
    # A row takes the predictions of its source: equal rows of a full forward were computed once.
    taken_from = tl.where(took_part, source, row)[:, None] * gen_length + column
    top = tl.load(state.top_token + taken_from, mask=inside, other=0)
    confidence = tl.load(state.confidence + taken_from, mask=inside, other=0.0)
    if any_of(took_part, 0):
        forwards = state.nfe + request * 3 + phase
        tl.store(forwards, tl.load(forwards) + 1)

    # Commit: after a full forward the first MASK, whatever its confidence.
    first_eos, first_mask, frontier = _look(tokens, column, mask_id, gen_length, EOS)
    start, end, done = _window(first_eos, first_mask, size, gen_length)
    forwarded = took_part & ~done & ~finished
    candidate = (tokens == mask_id) & in_window(column, start, end) & forwarded[:, None]
    sure = candidate & (confidence >= threshold)
    others = candidate & ~is_eos(top, EOS)
    others = tl.where(any_of(others, 1)[:, None], others, candidate)
    sure = tl.where(any_of(sure, 1)[:, None], sure, best(confidence, others, column, gen_length))
    first = candidate & (column == first_mask[:, None])
    chosen = tl.where(is_block, sure, first)
    tl.store(events.committed + at, chosen, mask=inside)
    tokens = tl.where(chosen, top, tokens)
    count_up(state.committed + row, tl.sum(chosen.to(tl.int32), 1), valid)

    store_likely(
        state, predictions, prediction_at, at, candidate & is_block, map_entries, LEAST, TAKEN, PLACES
    )
    is_full = forwarded & (phase != BLOCK)
    empty_map(state, at, inside & is_full[:, None], map_entries)

    before = frontier
    first_eos, first_mask, frontier = _look(tokens, column, mask_id, gen_length, EOS)
    start, end, done = _window(first_eos, first_mask, size, gen_length)
    moved = tl.where(is_full, 0, moved + tl.maximum(frontier - before, 0))
    holds = _holds(tokens, column, first_eos, inside, mask_id)
    finished, winner, reason = _finish(
        first_eos, first_mask, holds, branch, valid, num_branches, gen_length, finished, winner, reason
    )

    # Merge. Every lookup reads the state before merging; the map is read by other threads than wrote it.
    tl.debug_barrier()
    member = valid & ~done & ~finished & is_block
    value, token = _offers(
        state, tokens, at, column, branch, member, start, end, first_eos, mask_id, map_entries, num_branches
    )
    merged = (tokens == mask_id) & in_window(column, start, end) & member[:, None] & (value >= TAKEN)
    tl.store(events.merged + at, merged, mask=inside)
    tokens = tl.where(merged, token, tokens)
    # For traces, which read there what was written.
    top, confidence = tl.where(merged, token, top), tl.where(merged, value, confidence)
    count_up(state.merged + row, tl.sum(merged.to(tl.int32), 1), valid)
    before = frontier
    first_eos, first_mask, frontier = _look(tokens, column, mask_id, gen_length, EOS)
    start, end, done = _window(first_eos, first_mask, size, gen_length)
    moved += tl.maximum(frontier - before, 0)
    holds = _holds(tokens, column, first_eos, inside, mask_id)

    # Sync.
    leader = tl.argmax(tl.where(valid, holds, -1), 0)  # the smallest index on a tie
    ahead = pick(branch, leader, holds)
    trails = valid & ~done & ~finished & is_block & (ahead - holds > sync_threshold)
    tokens = tl.where(trails[:, None], pick(branch[:, None], leader, tokens)[None, :], tokens)
    moved = tl.where(trails, pick(branch, leader, moved), moved)
    take_map(state, at, (first_row + leader) * gen_length + column, inside & trails[:, None], map_entries)
    tl.store(events.sync_source + row, tl.where(trails, first_row + leader, row), mask=valid)
    count_up(state.synced + row, trails.to(tl.int32), valid)
    first_eos, first_mask, frontier = _look(tokens, column, mask_id, gen_length, EOS)
    start, end, done = _window(first_eos, first_mask, size, gen_length)
    holds = _holds(tokens, column, first_eos, inside, mask_id)
    finished, winner, reason = _finish(
        first_eos, first_mask, holds, branch, valid, num_branches, gen_length, finished, winner, reason
    )
    due = valid & ~done & ~finished
    if refresh_interval is not None:
        due &= moved >= refresh_interval
    else:
        due &= ~valid

    tl.debug_barrier()  # every warp has read what is written now
    tl.store(state.top_token + at, top, mask=inside)
    tl.store(state.confidence + at, confidence, mask=inside)
    tl.store(state.tokens + at, tokens, mask=inside)
    tl.store(state.window_start + row, start, mask=valid)
    tl.store(state.window_end + row, end, mask=valid)
    tl.store(state.decoded + row, holds, mask=valid)
    tl.store(state.progress + row, start, mask=valid)
    tl.store(state.moved_since_refresh + row, moved, mask=valid)
    tl.store(state.needs_refresh + row, due, mask=valid)
    tl.store(state.done + row, done, mask=valid)
    tl.store(state.finished + request, finished)
    tl.store(state.winner + request, winner)
    tl.store(state.stop_reason + request, reason)
    tl.store(wants_refresh + request, any_of(due, 0).to(tl.int32))
    if request == 0:
        # What the plan adds up. The phase stands: other programs may read it still.
        tl.store(next_flags, 0)
        for flag in tl.static_range(2, 5):
            tl.store(next_flags + flag, 0)


@triton.jit
def _look(tokens, column, mask_id, gen_length, EOS: tl.constexpr):
    """[N] each: first EOS, first MASK (G without one), and the first MASK before the first EOS or, without
    one, what stands behind the EOS."""
    first_eos = first_true(is_eos(tokens, EOS), column, gen_length)
    first_mask = first_true(tokens == mask_id, column, gen_length)
    behind = tl.minimum(first_eos + 1, gen_length)
    return first_eos, first_mask, tl.where(first_mask < first_eos, first_mask, behind)


@triton.jit
def _window(first_eos, first_mask, size, gen_length):
    """[N] each: the block of the first MASK, clipped at the first EOS, and whether no MASK is left."""
    done = first_mask >= first_eos
    start = first_mask - first_mask % size
    end = tl.minimum(start + size, first_eos)
    return tl.where(done, gen_length, start), tl.where(done, gen_length, end), done


@triton.jit
def _holds(tokens, column, first_eos, inside, mask_id):
    """[N]: decoded tokens up to and with the first EOS."""
    return tl.sum((inside & (tokens != mask_id) & (column <= first_eos[:, None])).to(tl.int32), 1)


@triton.jit
def _finish(
    first_eos, first_mask, holds, branch, valid, num_branches, gen_length, finished, winner, reason
):  # fmt: skip
    """Ends a request with the branch of the latest EOS, or with the largest that holds no MASK."""
    ready = valid & (first_mask >= first_eos) & (first_eos < gen_length)
    complete = valid & (first_mask == gen_length)
    most = tl.argmax(tl.where(ready, holds.to(tl.int64) * num_branches + branch, -1), 0)
    last = tl.max(tl.where(complete, branch, -1), 0)
    any_ready, any_complete = any_of(ready, 0), any_of(complete, 0)
    ends = (any_ready | any_complete) & ~finished
    winner = tl.where(ends, tl.where(any_ready, most, last), winner)
    reason = tl.where(ends, tl.where(any_ready, EOS_REASON, LENGTH_REASON), reason)
    return finished | ends, winner, reason


@triton.jit
def _offers(
    state, tokens, at, column, branch, member, start, end, first_eos, mask_id, map_entries, num_branches
):
    """[N, G] each: the highest probability in a row's map among the tokens that compatible rows behind it
    hold there, and that token; on a tie that of the row which stands first in the order.

    Destinations go from the window that ends last to the one that ends first; sources stand behind them.
    """
    counts = column <= first_eos[:, None]
    highest = tl.zeros(tokens.shape, tl.float32)
    token = tl.zeros_like(tokens)
    best_end, best_branch = tl.zeros_like(tokens), tl.zeros_like(tokens)
    wanted = (tokens == mask_id) & in_window(column, start, end) & member[:, None]
    for source in range(num_branches):
        line = pick(branch[:, None], source, tokens)[None, :]
        source_end, source_eos = pick(branch, source, end), pick(branch, source, first_eos)
        both = (line != mask_id) & (tokens != mask_id) & counts & (column <= source_eos)
        differ = any_of(both & (tokens != line), 1)
        behind = (source_end < end) | ((source_end == end) & (branch < source))
        compatible = behind & ~differ & member & any_of((branch == source) & member, 0)
        offered = wanted & compatible[:, None] & (line != mask_id) & (column <= source_eos)
        _, value = find_entry(state, at, tl.zeros_like(tokens) + line, offered, map_entries)
        in_front = (source_end > best_end) | ((source_end == best_end) & (source < best_branch))
        better = (value > highest) | ((value == highest) & (value > 0) & in_front)
        highest, token = tl.where(better, value, highest), tl.where(better, line, token)
        best_end, best_branch = tl.where(better, source_end, best_end), tl.where(better, source, best_branch)
    return highest, token
