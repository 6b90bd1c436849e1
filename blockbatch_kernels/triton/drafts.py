"""Drafts, the rows behind a request's only branch; `reference/drafts.py` describes them."""

import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.structs import BranchState, PolicyEvents
from blockbatch_kernels.triton.commit import best
from blockbatch_kernels.triton.rows import (
    any_of,
    device_of,
    is_eos,
    kernel,
    load_tokens,
    state_tensors,
    tile_options,
)


@triton.jit
def equal_draft(memory, source_row, tokens, row, at, inside, gen_length, DRAFTS: tl.constexpr):
    """[N]: the first row behind a branch that was in the forward and holds its tokens, or the branch itself.

    `memory` holds the tokens of all rows; those of the branches stand at the offsets `at`.
    """
    found = row
    for draft in range(1, DRAFTS + 1):
        differ = any_of(load_tokens(memory, at + draft * gen_length, inside) != tokens, 1)
        computed = tl.load(source_row + row + draft) >= 0
        found = tl.where((found == row) & ~differ & computed, row + draft, found)
    return found


def write_drafts(
    state: BranchState,
    source_row: Tensor,
    forward_end: Tensor,
    events: PolicyEvents,
    params: PolicyParams,
) -> None:
    """Writes the rows behind the branches, which have taken their turn; one program for each request.

    Args:
        state: *written*.
        source_row: [R] int32, as the plan of the last forward has it.
        forward_end: [Q] int32, where the window of the branch ended in that forward.
        events: *written* but for the branches.
    """
    with device_of(state.tokens):
        _drafts_kernel[(state.num_requests,)](
            state_tensors(state),
            source_row,
            forward_end,
            events,
            params.mask_token_id,
            LENGTHS=params.drafts,
            LONGEST=max(params.drafts),
            EOS=params.eos_token_ids,
            EXIT=params.eos_exit,
            **tile_options(state, num_branches=1),
        )


@kernel
def _drafts_kernel(
    state,
    source_row,
    forward_end,
    events,
    mask_id,
    num_branches,
    gen_length,
    LENGTHS: tl.constexpr,
    LONGEST: tl.constexpr,
    EOS: tl.constexpr,
    EXIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    request = tl.program_id(0)
    branch = request * (num_branches + len(LENGTHS))
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < gen_length
    at = branch * gen_length + column
    tokens = load_tokens(state.tokens, at, inside)
    top = tl.load(state.top_token + at, mask=inside, other=0)
    confidence = tl.load(state.confidence + at, mask=inside, other=0.0)
    window_start, window_end = tl.load(state.window_start + branch), tl.load(state.window_end + branch)
    decoded, progress = tl.load(state.decoded + branch), tl.load(state.progress + branch)
    stands = (tl.load(state.done + branch) != 0) | (tl.load(state.needs_refresh + branch) != 0)
    stands |= tl.load(state.finished + request) != 0

    # The rank of the surest MASKs; behind the longest draft it does not matter.
    masked = (tokens == mask_id) & (column >= window_start) & (column < window_end)
    most = tl.sum(tl.sum(masked.to(tl.int32), 1), 0) - 1
    rank = tl.full(column.shape, 0, tl.int32) + gen_length
    for place in range(tl.minimum(most, LONGEST)):
        surest = best(confidence, masked & (rank == gen_length), column, gen_length)
        rank = tl.where(surest, place, rank)
    if EXIT == "prefix":
        ends = masked & is_eos(top, EOS)
        most = tl.minimum(most, tl.min(tl.min(tl.where(ends, rank, gen_length), 1), 0))

    kept = window_end == tl.load(forward_end + request)
    adopted = tl.load(events.sync_source + branch)
    nothing = tokens != tokens
    for draft in tl.static_range(len(LENGTHS)):
        row = branch + 1 + draft
        line = row * gen_length + column
        exists = (LENGTHS[draft] <= most) & ~stands
        written = masked & (rank < LENGTHS[draft]) & exists
        tl.store(state.tokens + line, tl.where(written, top, tokens), mask=inside)
        tl.store(state.done + row, ~exists)
        tl.store(state.window_start + row, window_start)
        tl.store(state.window_end + row, window_end)
        tl.store(state.decoded + row, decoded)
        tl.store(state.progress + row, progress)
        source = tl.load(source_row + row)
        if (source >= 0) & (source != row):  # a full forward: the branch's result is that of all rows
            taken_from = source * gen_length + column
            tl.store(state.top_token + line, tl.load(state.top_token + taken_from, mask=inside), mask=inside)
            values = tl.load(state.confidence + taken_from, mask=inside)
            tl.store(state.confidence + line, values, mask=inside)
        tl.store(events.committed + line, nothing, mask=inside)
        tl.store(events.merged + line, nothing, mask=inside)
        tl.store(events.sync_source + row, tl.where(kept, row, adopted))
