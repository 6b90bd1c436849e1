"""Which MASK positions take their top token: the three commit rules and that of merge, on tiles [N, G]."""

import triton
import triton.language as tl

from blockbatch_kernels.triton.rows import any_of, as_key, first_true, pick


@triton.jit
def _best(key, candidate, column, gen_length):
    """[N, G]: the candidate of highest key in every row, the first on a tie."""
    highest = tl.max(tl.where(candidate, key, -1.0), 1)[:, None]
    first = first_true(candidate & (key == highest), column, gen_length)[:, None]
    return candidate & (column == first)


@triton.jit
def sure(confidence, candidate, column, threshold, tail_threshold, gen_length):
    """Candidates at the threshold or above it; behind the first that is below, at the tail threshold."""
    chosen = candidate & (confidence >= threshold)
    if tail_threshold is not None:
        first_unsure = first_true(candidate & ~chosen, column, gen_length)[:, None]
        chosen &= (column < first_unsure) | (confidence >= tail_threshold)
    return chosen


@triton.jit
def best(confidence, candidate, column, gen_length):
    """The candidate of highest confidence in every row."""
    return _best(as_key(confidence), candidate, column, gen_length)


@triton.jit
def near_anchors(anchors, radius, memory, at, inside, column, gen_length):
    """[N, G]: positions within `radius` of an anchor (arXiv 2510.07081).

    `memory` holds [N, G] flags at the offsets `at`: neighbours are read from it.
    """
    tl.store(memory + at, anchors, mask=inside)
    tl.debug_barrier()
    near = anchors
    for distance in range(1, radius + 1):
        before = inside & (column >= distance)
        behind = inside & (column + distance < gen_length)
        near |= tl.load(memory + at - distance, mask=before, other=False) != 0
        near |= tl.load(memory + at + distance, mask=behind, other=False) != 0
    tl.debug_barrier()  # the memory may be written again
    return near


@triton.jit
def scheduled(confidence, candidate, column, size, steps, steps_per_block, gen_length):
    """The k highest confidences of each window, k fixed by the number of steps a block takes."""
    number = size // steps_per_block + (steps < size % steps_per_block).to(tl.int32)
    # A block that has used up its steps (it holds a MASK that the model itself wrote) takes the rest at once.
    number = tl.where(steps < steps_per_block, number, size)
    number = tl.minimum(number, tl.sum(candidate.to(tl.int32), 1))
    key = as_key(confidence)
    chosen = candidate != candidate
    for rank in range(tl.max(number, 0)):
        best = _best(key, candidate & ~chosen, column, gen_length)
        chosen |= best & (rank < number)[:, None]
    return chosen


@triton.jit
def mergeable(
    tokens, top, column, branch, member, window_start, window_end, horizon, mask_id, num_branches
):  # fmt: skip
    """[N, G]: where a row may take its own top token, because a compatible row behind it holds it already.

    Destinations go from the window that ends last to the one that ends first; sources stand behind them. No
    source's window reaches past the destination's, and so none past its first EOS.
    """
    covered = tokens != tokens
    agreed = tokens != tokens
    before_horizon = column < horizon[:, None]
    for source in range(num_branches):
        line = pick(branch[:, None], source, tokens)[None, :]
        start, end = pick(branch, source, window_start), pick(branch, source, window_end)
        held_by_both = (line != mask_id) & (tokens != mask_id)
        counts = held_by_both & before_horizon & (column < pick(branch, source, horizon))
        differ = any_of(counts & (tokens != line), 1)
        behind = (end < window_end) | ((end == window_end) & (branch < source))
        compatible = behind & ~differ & member & any_of((branch == source) & member, 0)
        covered |= compatible[:, None] & (column >= start) & (column < end)
        agreed |= compatible[:, None] & (line != mask_id) & (line == top)
    return (tokens == mask_id) & covered & agreed
