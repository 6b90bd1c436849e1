"""The map of probabilities that Dream's published rule keeps: lines of entries, free ones (0) behind.

Tiles of positions [N, G] walk along their lines together, as far as any of them has entries. A walk ends in
a barrier where it wrote: the next one may read by other threads.
"""

import triton
import triton.language as tl

from blockbatch_kernels.triton.rows import any_of


@triton.jit
def _any(flags):
    return any_of(any_of(flags, 1), 0)


@triton.jit
def _as_mask(flags):
    """The same flags; Triton's interpreter loads by no mask that an inversion is part of."""
    return tl.where(flags, 1, 0) > 0


@triton.jit
def find_entry(state, at, token, searched, map_entries):
    """[N, G] each: the place of the token in its line and its probability; without it the first free place
    and 0, and `map_entries` for its place where nothing is free or searched."""
    searched = _as_mask(searched)
    line = at.to(tl.int64) * map_entries
    place = tl.zeros_like(at) + map_entries
    probability = tl.zeros(at.shape, tl.float32)
    entry = 0
    while _any(searched) & (entry < map_entries):
        value = tl.load(state.map_probability + line + entry, mask=searched, other=0.0)
        held = tl.load(state.map_token + line + entry, mask=searched, other=0)
        found = searched & ((value == 0) | (held == token))
        place = tl.where(found, entry, place)
        probability = tl.where(found, value, probability)
        searched &= (value != 0) & (held != token)
        entry += 1
    return place, probability


@triton.jit
def store_likely(
    state,
    predictions,
    prediction_at,
    at,
    stored,
    map_entries,
    LEAST: tl.constexpr,
    TAKEN: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Writes what is likely at the positions `stored`: tokens that have an entry, new ones from TAKEN on."""
    stored = _as_mask(stored)
    index = tl.load(prediction_at + at, mask=stored, other=-1)
    for rank in tl.static_range(PLACES):
        given = stored & (index >= 0)
        likely = index * PLACES + rank
        token = tl.load(predictions.likely_token + likely, mask=given, other=-1)
        probability = tl.load(predictions.likely_probability + likely, mask=given, other=0.0)
        given &= probability > LEAST
        place, before = find_entry(state, at, token, given, map_entries)
        written = given & (place < map_entries) & ((before > 0) | (probability >= TAKEN))
        entry = at.to(tl.int64) * map_entries + place
        tl.store(state.map_token + entry, token, mask=written)
        tl.store(state.map_probability + entry, probability, mask=written)
        tl.debug_barrier()


@triton.jit
def empty_map(state, at, emptied, map_entries):
    """Frees all entries of the positions `emptied`."""
    emptied = _as_mask(emptied)
    line = at.to(tl.int64) * map_entries
    entry = 0
    while _any(emptied) & (entry < map_entries):
        emptied &= tl.load(state.map_probability + line + entry, mask=emptied, other=0.0) > 0
        tl.store(state.map_token + line + entry, tl.zeros_like(at), mask=emptied)
        tl.store(state.map_probability + line + entry, tl.zeros(at.shape, tl.float32), mask=emptied)
        entry += 1
    tl.debug_barrier()


@triton.jit
def take_map(state, at, source_at, taken, map_entries):
    """Copies the lines at `source_at` over those of the positions `taken`."""
    taken = _as_mask(taken)
    line = at.to(tl.int64) * map_entries
    source = tl.zeros_like(line) + source_at.to(tl.int64) * map_entries
    entry = 0
    while _any(taken) & (entry < map_entries):
        probability = tl.load(state.map_probability + source + entry, mask=taken, other=0.0)
        token = tl.load(state.map_token + source + entry, mask=taken, other=0)
        taken &= (probability > 0) | (
            tl.load(state.map_probability + line + entry, mask=taken, other=0.0) > 0
        )
        tl.store(state.map_token + line + entry, token, mask=taken)
        tl.store(state.map_probability + line + entry, probability, mask=taken)
        entry += 1
