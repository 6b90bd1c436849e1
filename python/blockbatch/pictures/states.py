"""What every branch holds after every forward of a decode, worked out of its trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from blockbatch.tracing import phase

# How a branch came to the token that it holds.
MASKED, COMMITTED, MERGED, SYNCED = 0, 1, 2, 3
PHASES = ("init", "block", "refresh")


@dataclass(frozen=True)
class States:
    """A decode step by step; a step is one forward with the commits, merges and syncs after it.

    Attributes:
        block_sizes: of the branches [branches].
        phases: "init", "block" or "refresh" [steps].
        tokens: ids after the step, MASK where there is none yet, int64 [steps, branches, gen_length].
        origin: how the branch came to its token: MASKED (and where a fill was given one), COMMITTED (by
            itself), MERGED (from another branch), SYNCED (copied with the leader's state, and not held
            before), uint8 [steps, branches, gen_length].
        change: the origins that this step brought, MASKED where it changed nothing or took a token away,
            uint8 [steps, branches, gen_length].
        since: the step in which the branch came to its token, -1 for MASK and for given tokens, int32
            [steps, branches, gen_length].
        confidence: with which the token was committed, NaN where unknown (MASK, merged tokens),
            float32 [steps, branches, gen_length].
        windows: start and end of the window during the step, of a branch that the forward left out its latest
            one, int64 [steps, branches, 2].
        active: whether the forward served the branch, bool [steps, branches].
        decoded: tokens committed by the branch, or by the leader whose state it took over, int64
            [steps, branches]; with Dream's published rule those that it holds, up to the first EOS that
            counts.
        leader: the branch that had decoded most before the syncs of the step, the first on a tie, int64
            [steps].
        syncs: (branch, leader) pairs [steps][number of them].
        mask_token_id: the id of MASK.
    """

    block_sizes: tuple[int, ...]
    phases: tuple[str, ...]
    tokens: np.ndarray
    origin: np.ndarray
    change: np.ndarray
    since: np.ndarray
    confidence: np.ndarray
    windows: np.ndarray
    active: np.ndarray
    decoded: np.ndarray
    leader: np.ndarray
    syncs: tuple[tuple[tuple[int, int], ...], ...]
    mask_token_id: int

    @property
    def num_steps(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_branches(self) -> int:
        return self.tokens.shape[1]

    @property
    def gen_length(self) -> int:
        return self.tokens.shape[2]


class Agreement(NamedTuple):
    """How far the branches agree at each position after each step.

    Attributes:
        token: the token that most branches hold, the lowest id on a tie, MASK where all are masked, int64
            [steps, gen_length].
        count: branches that hold it, 0 where all are masked, int64 [steps, gen_length].
        distinct: different tokens that branches hold there, int64 [steps, gen_length]; from two on the
            branches have bifurcated.
    """

    token: np.ndarray
    count: np.ndarray
    distinct: np.ndarray


def held_up_to(trace: dict[str, Any]) -> tuple[int, ...] | None:
    """Of a trace of Dream's published rule, where tokens held decide who leads: behind which ids none counts.
    None for another, where tokens committed do."""
    settings = trace["settings"]
    if settings.get("policy") != "dream_published":
        return None
    return tuple(trace["eos_token_ids"]) if settings.get("eos_exit") == "prefix" else ()


def expand(trace: dict[str, Any]) -> States:
    """The states of a loaded trace (`blockbatch.load_trace`)."""
    records, sizes, mask = trace["trace"], tuple(trace["block_sizes"]), trace["mask_token_id"]
    shape = (len(records), len(sizes), trace["gen_length"])
    states = States(
        block_sizes=sizes,
        phases=tuple(map(phase, records)),
        tokens=np.full(shape, mask, dtype=np.int64),
        origin=np.zeros(shape, dtype=np.uint8),
        change=np.zeros(shape, dtype=np.uint8),
        since=np.full(shape, -1, dtype=np.int32),
        confidence=np.full(shape, np.nan, dtype=np.float32),
        windows=np.zeros((*shape[:2], 2), dtype=np.int64),
        active=np.zeros(shape[:2], dtype=bool),
        decoded=np.zeros(shape[:2], dtype=np.int64),
        leader=np.zeros(shape[0], dtype=np.int64),
        syncs=tuple(tuple((s["branch"], s["leader"]) for s in record["syncs"]) for record in records),
        mask_token_id=mask,
    )
    if trace["given"] is not None:
        states.tokens[0] = trace["given"]
    for step, record in enumerate(records):
        if step:
            for kept in _kept(states):
                kept[step] = kept[step - 1]
        _apply(states, step, record, held_up_to(trace))
    return states


def _kept(states: States) -> tuple[np.ndarray, ...]:
    """What a step leaves as it was unless its record says otherwise."""
    return (
        states.tokens,
        states.origin,
        states.since,
        states.confidence,
        states.windows,
        states.decoded,
    )


def _apply(states: States, step: int, record: dict[str, Any], ends: tuple[int, ...] | None) -> None:
    tokens, origin, change = states.tokens[step], states.origin[step], states.change[step]
    since, confidence, decoded = states.since[step], states.confidence[step], states.decoded[step]

    for branch, window in zip(record["rows"], record["windows"], strict=True):
        states.active[step, branch] = True
        states.windows[step, branch] = window

    for name, kind in (("commits", COMMITTED), ("merges", MERGED)):
        for written in record[name]:
            branch, positions = written["branch"], written["positions"]
            tokens[branch, positions] = written["tokens"]
            origin[branch, positions] = change[branch, positions] = kind
            since[branch, positions] = step
            confidence[branch, positions] = written.get("confidence", np.nan)
            if kind == COMMITTED:
                decoded[branch] += len(positions)

    if ends is not None:
        decoded[:] = _held(states, step, ends)
    states.leader[step] = decoded.argmax()
    for branch, leader in states.syncs[step]:
        # A token that both hold stays the branch's own.
        differs = tokens[branch] != tokens[leader]
        arrived = differs & (tokens[leader] != states.mask_token_id)
        tokens[branch] = tokens[leader]
        change[branch, differs] = np.where(arrived, SYNCED, MASKED)[differs]
        origin[branch, differs] = change[branch, differs]
        since[branch, differs] = np.where(arrived, step, -1)[differs]
        confidence[branch, differs] = confidence[leader, differs]
        decoded[branch] = decoded[leader]


def _held(states: States, step: int, ends: tuple[int, ...]) -> np.ndarray:
    """[branches]: tokens up to and with the first of `ends`."""
    tokens = states.tokens[step]
    is_end = np.isin(tokens, ends)
    counts = is_end.cumsum(1) - is_end == 0
    return ((tokens != states.mask_token_id) & counts).sum(1)


def agreement(states: States) -> Agreement:
    """Where the branches agree; `count` of a position that only one branch has decoded is 1."""
    shape = (states.num_steps, states.gen_length)
    token = np.full(shape, states.mask_token_id, dtype=np.int64)
    count = np.zeros(shape, dtype=np.int64)
    distinct = np.zeros(shape, dtype=np.int64)
    # Branch by branch: the pairs of all branches at once would take branches times the memory.
    for branch in range(states.num_branches):
        mine = states.tokens[:, branch]
        held = mine != states.mask_token_id
        holders = np.where(held, (states.tokens == mine[:, None]).sum(1), 0)
        first = held & ~(states.tokens[:, :branch] == mine[:, None]).any(1)
        distinct += first
        better = (holders > count) | ((holders == count) & held & (mine < token))
        token, count = np.where(better, mine, token), np.where(better, holders, count)
    return Agreement(token, count, distinct)


def nfe(states: States) -> np.ndarray:
    """Forwards so far by phase (init, block, refresh) after each step, int64 [steps, 3]."""
    return np.cumsum([[phase == name for name in PHASES] for phase in states.phases], axis=0)
