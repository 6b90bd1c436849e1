"""The plain records that operators take and return.

A step works on *rows*: row `r` is branch `r % num_branches` of request `r // num_branches`. Below, R is the
number of rows (in shapes `rows`), Q of requests, N of branches per request (R = Q * N), G the generation
length. Positions of the generation region run from 0 to G; on the canvas they stand behind the request's
prompt.

A field says its shape and dtype (int32 if none) once, here, by its `Layout`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from blockbatch_kernels.shapes import NUM_LIKELY, STRETCH_INTEGERS, UNIT_INTEGERS, Layout, fields_of, zeros

PHASES = ("init", "block", "refresh")
STOP_REASONS = ("running", "eos", "length")

PHASE_INIT, PHASE_BLOCK, PHASE_REFRESH = range(3)
RUNNING, STOP_EOS, STOP_LENGTH = range(3)


@dataclass
class BranchState:
    """Everything that decoding keeps about the branches of a batch; `decode_policy` writes it in place.

    Window bounds, `progress` and `first_eos` count from the start of the generation region.
    """

    prompt_tokens: Annotated[Tensor, Layout("requests max_prompt", given=True)]  # zero behind the prompt
    prompt_length: Annotated[Tensor, Layout("requests", given=True)]
    tokens: Annotated[Tensor, Layout("rows gen_length")]  # MASK where nothing is decoded yet
    block_size: Annotated[Tensor, Layout("rows", given=True)]
    window_start: Annotated[Tensor, Layout("rows")]
    window_end: Annotated[Tensor, Layout("rows")]
    # Tokens that the branch (or the leader it was synced to) committed; with the policy "dream_published"
    # those that it holds, up to its first EOS.
    decoded: Annotated[Tensor, Layout("rows")]
    progress: Annotated[Tensor, Layout("rows")]  # start of the window, G when done
    blocks_since_refresh: Annotated[Tensor, Layout("rows")]
    # Commits since the last advance; read by fixed schedules alone.
    steps_in_block: Annotated[Tensor, Layout("rows")]
    needs_refresh: Annotated[Tensor, Layout("rows", torch.bool)]
    done: Annotated[Tensor, Layout("rows", torch.bool)]
    # Argmax of the latest forward that computed the position.
    top_token: Annotated[Tensor, Layout("rows gen_length")]
    # Its softmax probability; 0 before the first forward.
    confidence: Annotated[Tensor, Layout("rows gen_length", torch.float32)]
    # The token that the cached K/V was computed from; kept with open queries alone.
    cached_token: Annotated[Tensor, Layout("rows gen_length")]
    # The next three are kept by the policy "dream_published" alone. Tokens that the first MASK has moved
    # over since the last full forward:
    moved_since_refresh: Annotated[Tensor, Layout("rows")]
    # Tokens that once had a probability of one half there since then, and the last one above 0.2.
    # Entries fill a line from the front; a free one is 0. Without that policy map_entries is 0.
    map_token: Annotated[Tensor, Layout("rows gen_length map_entries")]
    map_probability: Annotated[Tensor, Layout("rows gen_length map_entries", torch.float32)]
    committed: Annotated[Tensor, Layout("rows")]  # tokens that this branch committed itself
    merged: Annotated[Tensor, Layout("rows")]  # tokens that it took from other branches by merge
    synced: Annotated[Tensor, Layout("rows")]  # how often it took over the leader's state
    adopted: Annotated[Tensor, Layout("rows")]  # forwards that it took over from drafts
    nfe: Annotated[Tensor, Layout("requests 3")]  # forwards by phase: init, block, refresh
    finished: Annotated[Tensor, Layout("requests", torch.bool)]
    winner: Annotated[Tensor, Layout("requests")]  # branch index; valid where finished
    stop_reason: Annotated[Tensor, Layout("requests")]  # index into STOP_REASONS
    # Predictions of its rows, drafts included, that came with a confidence that is NaN or infinite.
    non_finite: Annotated[Tensor, Layout("requests")]

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
        map_entries: int = 0,
    ):
        """The state before the first forward: every branch at its first block, nothing generated yet.

        Args:
            prompt_tokens: [Q, max prompt length] int32.
            prompt_length: [Q] int32.
            block_sizes: [N] int32, the block size of each branch.
            gen_length: positions to generate, G.
            mask_token_id: the id that marks an undecoded position.
            map_entries: for the policy "dream_published", `map_entries(block_sizes, gen_length)`.
        """
        num_requests, num_rows = prompt_tokens.shape[0], prompt_tokens.shape[0] * block_sizes.numel()
        device = prompt_tokens.device
        sizes = dict(requests=num_requests, rows=num_rows, gen_length=gen_length)
        sizes |= dict(max_prompt=prompt_tokens.shape[1], map_entries=map_entries)
        given = dict(
            prompt_tokens=prompt_tokens,
            prompt_length=prompt_length,
            block_size=block_sizes.to(device=device, dtype=torch.int32).repeat(num_requests),
        )
        state = cls(**{**zeros(cls, sizes, device, without=given), **given})
        state._start(mask_token_id)
        return state

    def reset(self, prompt_tokens: Tensor, prompt_length: Tensor, mask_token_id: int) -> None:
        """Back to the state before the first forward, in place, with new prompts.

        Args:
            prompt_tokens: [Q, at most max prompt length] int32.
            prompt_length: [Q] int32.
            mask_token_id: the id that marks an undecoded position.
        """
        for field in fields_of(BranchState):
            if not field.layout.given:
                getattr(self, field.name).zero_()
        self.prompt_tokens.zero_()
        self.prompt_tokens[:, : prompt_tokens.shape[1]] = prompt_tokens
        self.prompt_length.copy_(prompt_length)
        self._start(mask_token_id)

    def _start(self, mask_token_id: int) -> None:
        """What is not zero before the first forward."""
        self.tokens.fill_(mask_token_id)
        self.cached_token.fill_(mask_token_id)
        self.window_end.copy_(self.block_size.clamp(max=self.gen_length))


class StepPlan(NamedTuple):
    """The next forward, all on the device but for what `flags` says.

    `flags` is what the host reads once a step: [running requests, phase (index into PHASES), query tokens,
    predictions, stalled rows]. A block step may hold no query token at all; its policy still runs. A row is
    stalled when it has committed more tokens than there are: the model writes its own MASK. So is every row
    of a request with `BranchState.non_finite`, whose tokens mean nothing any more.
    """

    # Canvas positions [start, end) are computed; equal: the row sits out. In a block step of open queries
    # they are places in the row's line of `query_position` instead.
    query_start: Annotated[Tensor, Layout("rows")]
    query_end: Annotated[Tensor, Layout("rows")]
    # The row whose predictions and K/V it takes; -1: not in this forward.
    source_row: Annotated[Tensor, Layout("rows")]
    # Positions whose prediction can still matter.
    predict: Annotated[Tensor, Layout("rows gen_length", torch.bool)]
    flags: Annotated[Tensor, Layout("5")]
    # Canvas positions of open queries, ascending; zero behind them.
    query_position: Annotated[Tensor, Layout("rows gen_length+1")]

    @classmethod
    def allocate(cls, num_rows: int, gen_length: int, device: torch.device) -> StepPlan:
        """An empty plan to be written into. All of it but `predict` lies in one buffer: see `host_part`."""
        sizes = dict(rows=num_rows, gen_length=gen_length)
        host = [
            math.prod(shape)
            for shape in (fields_of(cls)[cls._fields.index(name)].layout.sizes(sizes) for name in _HOST_PART)
        ]
        buffer = torch.zeros(sum(host), dtype=torch.int32, device=device)
        parts = dict(zip(_HOST_PART, buffer.split(host)))
        return cls(**zeros(cls, sizes, device, without=parts), **parts)

    def host_part(self) -> Tensor:
        """[5 + 3 R] int32: flags, query_start, query_end, source_row of an allocated plan, for one copy."""
        size = sum(getattr(self, name).numel() for name in _HOST_PART)
        return self.flags.as_strided((size,), (1,))


# What the host reads of an allocated plan in one copy, in this order.
_HOST_PART = ("flags", "query_start", "query_end", "source_row")


class PackedQueries(NamedTuple):
    """The query tokens of all rows back to back, padded to a fixed capacity."""

    input_ids: Annotated[Tensor, Layout("capacity")]  # 0 in the padding
    positions: Annotated[Tensor, Layout("capacity")]  # canvas positions; 0 in the padding
    row_index: Annotated[Tensor, Layout("capacity")]  # -1 in the padding
    cu_seqlens_q: Annotated[Tensor, Layout("rows+1")]
    # Page * page_size + offset; -1 in the padding.
    slot_mapping: Annotated[Tensor, Layout("capacity", torch.int64)]
    # Packed token that predicts; 0 in the padding.
    predict_index: Annotated[Tensor, Layout("predict_capacity", torch.int64)]
    # Row * G + generation position; -1 in the padding.
    predict_target: Annotated[Tensor, Layout("predict_capacity", torch.int64)]


class Predictions(NamedTuple):
    """What the LM head says about the predicted positions of a forward, aligned with `target`."""

    # Row * G + generation position; -1: padding.
    target: Annotated[Tensor, Layout("predictions", torch.int64)]
    top_token: Annotated[Tensor, Layout("predictions")]  # argmax of the logits, the lowest id on a tie
    confidence: Annotated[Tensor, Layout("predictions", torch.float32)]  # its softmax probability
    # Probability of the token that the position holds now.
    probe_probability: Annotated[Tensor | None, Layout("predictions", torch.float32)] = None
    # What `lm_head_likely` says; for the policy "dream_published".
    likely_token: Annotated[Tensor | None, Layout(f"predictions {NUM_LIKELY}")] = None
    likely_probability: Annotated[Tensor | None, Layout(f"predictions {NUM_LIKELY}", torch.float32)] = None


class SamplingRules(NamedTuple):
    """How the tokens of each request are drawn; see `lm_head_sample`."""

    temperature: Annotated[Tensor, Layout("requests", torch.float32)]  # 0: the top token, without noise
    seed: Annotated[Tensor, Layout("requests", torch.int64)]
    # Forwards that the request has had: the noise of the next one is another.
    forward: Annotated[Tensor, Layout("requests")]
    # Ids whose logits are changed, each once.
    changed_token: Annotated[Tensor, Layout("changed")]
    logit_bias: Annotated[Tensor, Layout("requests changed", torch.float32)]  # minus infinity: a ban
    # At positions below this the token is banned, too; 0: at none.
    banned_before: Annotated[Tensor, Layout("requests changed")]
    # Each None: not asked for by any request.
    top_p: Annotated[Tensor | None, Layout("requests", torch.float32)] = None  # 1: of this one not
    top_k: Annotated[Tensor | None, Layout("requests")] = None  # 0: of this one not


class PolicyEvents(NamedTuple):
    """What one `decode_policy` call changed; the tokens and confidences stand in the state."""

    committed: Annotated[Tensor, Layout("rows gen_length", torch.bool)]
    merged: Annotated[Tensor, Layout("rows gen_length", torch.bool)]
    # The leader's row where the row was synced, else the row itself.
    sync_source: Annotated[Tensor, Layout("rows")]

    @classmethod
    def allocate(cls, num_rows: int, gen_length: int, device: torch.device) -> PolicyEvents:
        """Empty events to be written into."""
        return cls(**zeros(cls, dict(rows=num_rows, gen_length=gen_length), device))


class PagePool(NamedTuple):
    """Pages with ids of any allocator that `copy_pages` may give to the rows of a page table.

    Which of them are free follows from the table: those that stand nowhere in it. So nothing is given back,
    and `share_pages` needs no pool. No row writes a page that is not in the list.

    The list is long enough where every row could have a page of its own in each column that it may write.
    Where a page is wanted and none is free, the row keeps the one that it shares, or none, and `counts`
    tells: the K/V of that step are wrong. Who cannot be sure reads `counts` with the wait for the device that
    a step has anyway.
    """

    free_pages: Annotated[Tensor, Layout("pool_pages")]  # ids, each once, given in this order
    # Pages that were free after the latest call, and those that were wanted and not there, over all calls.
    counts: Annotated[Tensor, Layout("2")]

    @classmethod
    def of(cls, free_pages: Tensor) -> PagePool:
        """The pool of these ids, [any] int32."""
        counts = torch.tensor([len(free_pages), 0], dtype=torch.int32, device=free_pages.device)
        return cls(free_pages, counts)

    def check(self) -> None:
        """Raises RuntimeError if a page was missing so far. Waits for the device."""
        missing = int(self.counts[1])
        if missing:
            raise RuntimeError(
                f"pool.free_pages: expected a free page for every write, {missing} were missing among "
                f"{len(self.free_pages)}"
            )


class AttentionPlan(NamedTuple):
    """How the attention of one step is cut into work: made once a step, used by every layer.

    The keys are cut into *pieces*, the same for all rows. Within a piece, rows that read the same pages form
    a *group*, whose queries are computed together, so that the pages are read once. A *tile* is up to
    `tile_tokens` queries of one group over one piece. A query whose row reaches into several pieces has a
    partial result in each, which are combined at the end.

    The fastest kernel takes the same work from `units` instead, which only the CUDA backend plans; see
    `reference/attention_units.py`. Its processors tell each other through `arrivals` which partial results
    are there; a call on another stream than the plan's first one brings its own.
    """

    # Piece, first and number in query_order, a row of the group.
    tiles: Annotated[Tensor, Layout("max_tiles 4")]
    # Queries of each piece sorted by group; -1 behind.
    query_order: Annotated[Tensor, Layout("max_pieces tokens")]
    pieces: Annotated[Tensor, Layout("max_pieces 2")]  # first key and the key behind the last
    token_row: Annotated[Tensor, Layout("tokens")]  # row of each packed query; -1 in the padding
    counts: Annotated[Tensor, Layout("2")]  # tiles and pieces in use; the rest is zero
    # Nothing, or first the number of units, then for each: units from where to
    # where its tile has; first token and number of tokens of either block; number of keys, place of the first
    # in its page; a bit for every token of the blocks that reads the keys (4 integers); the page of each copy
    # (8); whether no other tile reads these keys; 0.
    units: Annotated[Tensor, Layout(f"max_units {UNIT_INTEGERS}")]
    # Of the units of all kv heads, one head after the other, from where to where a
    # processor has them; the first processor that shares its first tile; 0.
    stretches: Annotated[Tensor, Layout(f"processors {STRETCH_INTEGERS}")]
    arrivals: Annotated[Tensor, Layout("2*processors")]  # zero between calls
    tile_tokens: int
    num_heads: int  # of the queries that it is for, and of their keys
    num_kv_heads: int
