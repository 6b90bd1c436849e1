"""The plain records that operators take and return.

A step works on *rows*: row `r` is branch `r % num_branches` of request `r // num_branches`. Below, `R` is the
number of rows, `Q` of requests, `N` of branches per request (R = Q * N), `G` the generation length. Positions
of the generation region run from 0 to G; on the canvas they stand behind the request's prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

PHASES = ("init", "block", "refresh")
QUERY_SPANS = ("window", "suffix", "canvas", "open")
REFRESH_SCOPES = ("canvas", "generation")
EOS_EXITS = ("prefix", "window", "none")
STOP_REASONS = ("running", "eos", "length")

PHASE_INIT, PHASE_BLOCK, PHASE_REFRESH = range(3)
RUNNING, STOP_EOS, STOP_LENGTH = range(3)


@dataclass
class BranchState:
    """Everything that decoding keeps about the branches of a batch; `decode_policy` writes it in place.

    Window bounds, `progress` and `first_eos` count from the start of the generation region.
    """

    prompt_tokens: Tensor  # [Q, max prompt length] int32, zero behind the prompt
    prompt_length: Tensor  # [Q] int32
    tokens: Tensor  # [R, G] int32, MASK where nothing is decoded yet
    block_size: Tensor  # [R] int32
    window_start: Tensor  # [R] int32
    window_end: Tensor  # [R] int32
    decoded: Tensor  # [R] int32, tokens that the branch (or the leader it was synced to) committed
    progress: Tensor  # [R] int32, start of the window, G when done
    blocks_since_refresh: Tensor  # [R] int32
    steps_in_block: Tensor  # [R] int32, commits since the last advance; read by fixed schedules alone
    needs_refresh: Tensor  # [R] bool
    done: Tensor  # [R] bool
    top_token: Tensor  # [R, G] int32, argmax of the latest forward that computed the position
    confidence: Tensor  # [R, G] float32, its softmax probability; 0 before the first forward
    cached_token: (
        Tensor  # [R, G] int32, the token that the cached K/V was computed from; kept by open queries alone
    )
    committed: Tensor  # [R] int32, tokens that this branch committed itself
    merged: Tensor  # [R] int32, tokens that it took from other branches by merge
    synced: Tensor  # [R] int32, how often it took over the leader's state
    adopted: Tensor  # [R] int32, forwards that it took over from drafts
    nfe: Tensor  # [Q, 3] int32, forwards by phase: init, block, refresh
    finished: Tensor  # [Q] bool
    winner: Tensor  # [Q] int32, branch index; valid where finished
    stop_reason: Tensor  # [Q] int32, index into STOP_REASONS

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_requests(self) -> int:
        return self.prompt_length.shape[0]

    @property
    def num_branches(self) -> int:
        return self.num_rows // self.num_requests

    @property
    def gen_length(self) -> int:
        return self.tokens.shape[1]

    @classmethod
    def create(
        cls,
        prompt_tokens: Tensor,
        prompt_length: Tensor,
        block_sizes: Tensor,
        gen_length: int,
        mask_token_id: int,
    ):
        """The state before the first forward: every branch at its first block, nothing generated yet.

        Args:
            prompt_tokens: [Q, max prompt length] int32.
            prompt_length: [Q] int32.
            block_sizes: [N] int32, the block size of each branch.
            gen_length: positions to generate, G.
            mask_token_id: the id that marks an undecoded position.
        """
        device = prompt_tokens.device
        num_requests, num_rows = prompt_tokens.shape[0], prompt_tokens.shape[0] * block_sizes.numel()

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        block_size = block_sizes.to(device=device, dtype=torch.int32).repeat(num_requests)
        return cls(
            prompt_tokens=prompt_tokens,
            prompt_length=prompt_length,
            tokens=torch.full((num_rows, gen_length), mask_token_id, dtype=torch.int32, device=device),
            block_size=block_size,
            window_start=zeros(num_rows),
            window_end=block_size.clamp(max=gen_length),
            decoded=zeros(num_rows),
            progress=zeros(num_rows),
            blocks_since_refresh=zeros(num_rows),
            steps_in_block=zeros(num_rows),
            needs_refresh=zeros(num_rows, dtype=torch.bool),
            done=zeros(num_rows, dtype=torch.bool),
            top_token=zeros(num_rows, gen_length),
            confidence=zeros(num_rows, gen_length, dtype=torch.float32),
            cached_token=torch.full((num_rows, gen_length), mask_token_id, dtype=torch.int32, device=device),
            committed=zeros(num_rows),
            merged=zeros(num_rows),
            synced=zeros(num_rows),
            adopted=zeros(num_rows),
            nfe=zeros(num_requests, 3),
            finished=zeros(num_requests, dtype=torch.bool),
            winner=zeros(num_requests),
            stop_reason=zeros(num_requests),
        )

    def reset(self, prompt_tokens: Tensor, prompt_length: Tensor, mask_token_id: int) -> None:
        """Back to the state before the first forward, in place, with new prompts.

        Args:
            prompt_tokens: [Q, at most max prompt length] int32.
            prompt_length: [Q] int32.
            mask_token_id: the id that marks an undecoded position.
        """
        kept = {"block_size", "prompt_length", "window_end", "tokens", "cached_token"}
        for field in fields(self):
            if field.name not in kept:
                getattr(self, field.name).zero_()
        self.prompt_tokens[:, : prompt_tokens.shape[1]] = prompt_tokens
        self.prompt_length.copy_(prompt_length)
        self.tokens.fill_(mask_token_id)
        self.cached_token.fill_(mask_token_id)
        self.window_end.copy_(self.block_size.clamp(max=self.gen_length))


@dataclass(frozen=True)
class PolicyParams:
    """The settings of `decode_policy`; validated by the operator's front door.

    Attributes:
        mask_token_id: id of MASK.
        eos_token_ids: any of these ends a text.
        threshold: commit every MASK whose confidence is at least this; None follows `steps_per_block`
            instead.
        steps_per_block: with `threshold=None`, forwards that a block of s tokens takes: s // steps_per_block
            tokens a step, one more in its first s % steps_per_block steps.
        leap_radius: LocalLeap (arXiv 2510.07081): within this distance of an anchor (a MASK that reaches
            its threshold in this step) a MASK already commits at `leap_threshold`. 0 switches it off.
        leap_threshold: see `leap_radius`.
        tail_threshold: takes the place of `threshold` behind the first MASK of the window that is below
            `threshold`: what may depend on an undecided token has to be surer. None: `threshold` holds there.
            Only the reference knows it, which then runs by default.
        merge_threshold: confidence that a destination must exceed to take a token from another branch.
        sync_threshold: a branch that trails the leader by more committed tokens than this takes over its
            state.
        refresh_interval: tokens of finished blocks after which a branch asks for a full forward; None: never.
        eos_exit: one of EOS_EXITS.
        query_span: what a block denoise computes: the "window", the window and everything behind it
            ("suffix"), the whole "canvas", or what is "open": the MASKs of the window, and once more every
            token of the generation region whose K/V was computed from another (ours, not in the paper).
        refresh_scope: what a refresh computes of each distinct row: the whole "canvas", or the "generation"
            region alone, which leaves the K/V of the prompt as the first forward left them (ours).
        drafts: lengths of the drafts, ascending (ours; none: ()). Row 0 of a request is then its only branch,
            and row d holds, for a block step, what row 0 holds and the `drafts[d - 1]` MASKs of its window that
            the last forward was surest of, as that forward predicts them. Where row 0 comes to hold the same,
            the draft's forward is its next one. See `reference/drafts.py`.
        prediction_offset: 0 if the logits at a position predict that position, 1 if they predict the next
            one.
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    threshold: float | None = 0.9
    steps_per_block: int | None = None
    leap_radius: int = 0
    leap_threshold: float = 0.75
    tail_threshold: float | None = None
    merge_threshold: float = 0.5
    sync_threshold: int = 8
    refresh_interval: int | None = 32
    eos_exit: str = "prefix"
    query_span: str = "window"
    refresh_scope: str = "canvas"
    prediction_offset: int = 0
    drafts: tuple[int, ...] = ()


class StepPlan(NamedTuple):
    """The next forward, all on the device but for what `flags` says.

    `flags` is what the host reads once a step: [running requests, phase (index into PHASES), query tokens,
    predictions, stalled rows]. A block step may hold no query token at all; its policy still runs. A row is
    stalled when it has committed more tokens than there are: the model writes its own MASK.
    """

    # [R] int32, canvas positions [start, end) are computed; equal: the row sits out. In a block step of open
    # queries they are places in the row of `query_position` instead.
    query_start: Tensor
    query_end: Tensor  # [R] int32
    source_row: Tensor  # [R] int32, the row whose predictions and K/V it takes; -1: not in this forward
    predict: Tensor  # [R, G] bool, positions whose prediction can still matter
    flags: Tensor  # [5] int32
    query_position: Tensor  # [R, G + 1] int32, canvas positions of open queries, ascending

    @classmethod
    def allocate(cls, num_rows: int, gen_length: int, device: torch.device) -> StepPlan:
        """An empty plan to be written into. All of it but `predict` lies in one buffer: see `host_part`."""
        buffer = torch.zeros(5 + 3 * num_rows, dtype=torch.int32, device=device)
        flags, *rows = buffer.split((5, num_rows, num_rows, num_rows))
        predict = torch.zeros(num_rows, gen_length, dtype=torch.bool, device=device)
        positions = torch.zeros(num_rows, gen_length + 1, dtype=torch.int32, device=device)
        return cls(*rows, predict, flags, positions)

    def host_part(self) -> Tensor:
        """[5 + 3 R] int32: flags, query_start, query_end, source_row of an allocated plan, for one copy."""
        size = 5 + 3 * self.query_start.shape[0]
        return self.flags.as_strided((size,), (1,))


class PackedQueries(NamedTuple):
    """The query tokens of all rows back to back, padded to a fixed capacity."""

    input_ids: Tensor  # [capacity] int32, 0 in the padding
    positions: Tensor  # [capacity] int32, canvas positions; 0 in the padding
    row_index: Tensor  # [capacity] int32, -1 in the padding
    cu_seqlens_q: Tensor  # [R + 1] int32
    slot_mapping: Tensor  # [capacity] int64, page * page_size + offset; -1 in the padding
    predict_index: Tensor  # [predict_capacity] int64, packed token that predicts; 0 in the padding
    predict_target: Tensor  # [predict_capacity] int64, row * G + generation position; -1 in the padding


class Predictions(NamedTuple):
    """What the LM head says about the predicted positions of a forward, aligned with `target`."""

    target: Tensor  # [M] int64, row * G + generation position; -1: padding
    top_token: Tensor  # [M] int32, argmax of the logits, the lowest id on a tie
    confidence: Tensor  # [M] float32, its softmax probability
    probe_probability: Tensor | None = (
        None  # [M] float32, probability of the token that the position holds now
    )


class PolicyEvents(NamedTuple):
    """What one `decode_policy` call changed; the tokens and confidences stand in the state."""

    committed: Tensor  # [R, G] bool
    merged: Tensor  # [R, G] bool
    sync_source: Tensor  # [R] int32, the leader's row where the row was synced, else the row itself

    @classmethod
    def allocate(cls, num_rows: int, gen_length: int, device: torch.device) -> PolicyEvents:
        """Empty events to be written into."""
        committed, merged = torch.zeros(2, num_rows, gen_length, dtype=torch.bool, device=device)
        return cls(committed, merged, torch.zeros(num_rows, dtype=torch.int32, device=device))


class AttentionPlan(NamedTuple):
    """How the attention of one step is cut into work: made once a step, used by every layer.

    The keys are cut into *pieces*, the same for all rows. Within a piece, rows that read the same pages form
    a *group*, whose queries are computed together, so that the pages are read once. A *tile* is up to
    `tile_tokens` queries of one group over one piece. A query whose row reaches into several pieces has a
    partial result in each, which are combined at the end.

    The fastest kernel takes the same work from `units` instead, which only the CUDA backend plans; see
    `reference/attention_units.py`. Its processors tell each other through `arrivals` which partial results
    are there, so a plan serves one stream at a time.
    """

    tiles: Tensor  # [max_tiles, 4] int32: piece, first and number in query_order, a row of the group
    query_order: Tensor  # [max_pieces, tokens] int32, queries of each piece sorted by group; -1 behind
    pieces: Tensor  # [max_pieces, 2] int32, first key and the key behind the last
    token_row: Tensor  # [tokens] int32, row of each packed query; -1 in the padding
    counts: Tensor  # [2] int32, tiles and pieces in use; the rest is zero
    # [1 + max_units, 22] int32, or nothing. First the number of units, then for each: units from where to
    # where its tile has; first token and number of tokens of either block; number of keys, place of the first
    # in its page; a bit for every token of the blocks that reads the keys (4 integers); the page of each copy
    # (8); whether no other tile reads these keys; 0.
    units: Tensor
    # [processors, 4] int32: of the units of all kv heads, one head after the other, from where to where a
    # processor has them; the first processor that shares its first tile; 0.
    stretches: Tensor
    arrivals: Tensor  # [2 * processors] int32, zero between calls
    tile_tokens: int
    num_heads: int  # of the queries that it is for, and of their keys
    num_kv_heads: int
