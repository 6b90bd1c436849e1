"""Places on the device that requests take and leave: the state of many decodes, each with lengths of its own.

A slot has `num_branches` rows and `gen_length` positions. A request with fewer branches leaves rows *idle*:
done from the start. One with a shorter generation region finds the positions behind it *filled* with a token
that is neither MASK nor an end of text. To the rules of `blockbatch_kernels.decode_policy` such a position is
decoded and such a row has nothing to do, so that a request goes on exactly as it does alone; only the ends of
whole rows have to be cut where the request's canvas ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.branches import NFE, BranchResult, RequestOutcome
from blockbatch.decoding.method import Method
from blockbatch_kernels import PolicyParams
from blockbatch_kernels.shapes import fields_of

# Of each request, what the host reads once a step.
STATUS = ("finished", "stalled", "non_finite", "final", "init", "block", "refresh")
_OF_BRANCHES = ("block_size", "committed", "merged", "synced", "progress", "adopted")


class Sizes(NamedTuple):
    """Of the slots: how many, rows and positions of each, and tokens of the longest prompt."""

    requests: int
    num_branches: int
    gen_length: int
    max_prompt: int

    def covering(self, other: Sizes) -> Sizes:
        """The larger of both in each regard."""
        return Sizes(*map(max, self, other))


class Slots:
    """Slots of one layout; all tensors are on the device. Empty ones count as finished.

    Args:
        sizes: see `Sizes`.
        mask_token_id: of the model.
        map_entries: see `BranchState.create`.

    Attributes:
        state: of all slots.
        gen_length: [Q] int32, of each request.
        live: [R] bool, rows that a request uses.
        branch: [R] bool, those of them that are branches, no drafts.
        group: [Q] int32, number of the settings that a request has.
        begun: [Q] bool, its first forward is over.
        filler: [Q] int32, the token behind its generation region.
        seqlens_k: [R] int32.
    """

    def __init__(self, sizes: Sizes, mask_token_id: int, map_entries: int, device: torch.device) -> None:
        self.sizes, self.mask_token_id, self.map_entries, self.device = (
            sizes,
            mask_token_id,
            map_entries,
            device,
        )
        requests, rows = sizes.requests, sizes.requests * sizes.num_branches
        ints = dict(dtype=torch.int32, device=device)
        self.state = bbk.BranchState.create(
            torch.zeros(requests, sizes.max_prompt, **ints),
            torch.zeros(requests, **ints),
            torch.ones(sizes.num_branches, **ints),
            sizes.gen_length,
            mask_token_id,
            map_entries,
        )
        self.state.finished.fill_(True)
        self.state.done.fill_(True)
        self.gen_length, self.group, self.filler = (torch.zeros(requests, **ints) for _ in range(3))
        self.begun = torch.zeros(requests, dtype=torch.bool, device=device)
        self.live, self.branch = (torch.zeros(rows, dtype=torch.bool, device=device) for _ in range(2))
        self.seqlens_k = torch.zeros(rows, **ints)

    @property
    def num_rows(self) -> int:
        return self.state.num_rows

    def rows_of(self, slot: int) -> slice:
        return slice(slot * self.sizes.num_branches, (slot + 1) * self.sizes.num_branches)

    def by_row(self, of_requests: Tensor) -> Tensor:
        """[Q] -> [R]"""
        return of_requests.unsqueeze(1).expand(-1, self.sizes.num_branches).reshape(-1)

    def join(self, slot: int, prompt: Sequence[int], method: Method, gen_length: int, group: int) -> None:
        """Puts a request before its first forward into an empty slot."""
        state, rows = self.state, self.rows_of(slot)
        count, drafts = len(method.block_sizes), len(method.params.drafts)
        self._clear(slot)
        ends = [min(size, gen_length) for size in method.block_sizes]
        ids, sizes, ends = self._ints([*prompt, *method.block_sizes, *ends]).split(
            [len(prompt), count, count]
        )
        state.prompt_tokens[slot, : len(prompt)] = ids
        state.prompt_length[slot] = len(prompt)
        filler = _filler(method.params)
        for tokens in (state.tokens, state.cached_token):
            tokens[rows] = filler
            tokens[rows][:count, :gen_length] = self.mask_token_id
        state.block_size[rows] = 1
        state.block_size[rows][:count] = sizes
        state.window_end[rows][:count] = ends
        state.done[rows] = True
        state.done[rows][:count] = False
        self.live[rows], self.branch[rows] = False, False
        self.live[rows][:count] = True
        self.branch[rows][: count - drafts] = True
        self.gen_length[slot], self.group[slot], self.filler[slot] = gen_length, group, filler
        self.begun[slot] = False
        self.seqlens_k[rows] = 0
        self.seqlens_k[rows][:count] = len(prompt) + gen_length

    def _clear(self, slot: int) -> None:
        """Zeroes all that a slot has of a state, in one launch for each dtype."""
        parts: dict[torch.dtype, list[Tensor]] = {}
        for field in fields_of(bbk.BranchState):
            value, shape = getattr(self.state, field.name), field.layout.shape
            if field.name != "prompt_tokens" and (field.layout.given or not value.numel()):
                continue
            own = value[self.rows_of(slot)] if shape.startswith("rows") else value[slot]
            parts.setdefault(value.dtype, []).append(own)
        for tensors in parts.values():
            torch._foreach_zero_(tensors)

    def leave(self, slot: int) -> None:
        """Empties a slot."""
        rows = self.rows_of(slot)
        self.state.finished[slot] = True
        self.state.non_finite[slot] = 0
        self.state.needs_refresh[rows] = False
        self.live[rows], self.branch[rows] = False, False
        self.seqlens_k[rows] = 0

    def status(self) -> Tensor:
        """[Q, len(STATUS)] int32; `final` is the length of the prefix on which all branches agree."""
        state = self.state
        stalled = (state.decoded > self.by_row(self.gen_length)) & self.branch
        tokens = state.tokens.view(self.sizes.requests, self.sizes.num_branches, -1)
        branch = self._by_request(self.branch).unsqueeze(-1)
        agreed = ((tokens == tokens[:, :1]) | ~branch).all(1) & (tokens[:, 0] != self.mask_token_id)
        agreed &= torch.arange(state.gen_length, device=self.device) < self.gen_length.unsqueeze(1)
        final = agreed.int().cumprod(1).sum(1, dtype=torch.int32)
        first = (state.finished, self._by_request(stalled).any(1), state.non_finite, final)
        return torch.cat((torch.stack([column.int() for column in first], 1), state.nfe), 1)

    def first_rows(self) -> Tensor:
        """[Q, G] int32: what the first branch of each request holds."""
        return self.state.tokens[:: self.sizes.num_branches]

    def outcome(self, slot: int, method: Method, gen_length: int) -> RequestOutcome:
        """How a request ended, or stands; then its most advanced branch, the first on a tie, is the winner.

        The host waits once.
        """
        state, rows = self.state, self.rows_of(slot)
        count = len(method.block_sizes) - len(method.params.drafts)
        columns = torch.stack([getattr(state, name)[rows][:count] for name in _OF_BRANCHES], 1)
        own = (state.finished[slot], state.winner[slot], state.stop_reason[slot], *state.nfe[slot])
        head = torch.stack([value.int() for value in own])
        tokens = state.tokens[rows][:count, :gen_length]
        values = torch.cat((head, columns.flatten(), tokens.flatten())).tolist()
        finished, winner, reason, *nfe = values[:6]
        behind = 6 + count * len(_OF_BRANCHES)
        branches = []
        for branch in range(count):
            numbers = dict(zip(_OF_BRANCHES, values[6 + branch * len(_OF_BRANCHES) :]))
            branches.append(BranchResult(**{**numbers, "progress": min(numbers["progress"], gen_length)}))
        if not finished:
            winner = max(range(count), key=lambda branch: (branches[branch].progress, -branch))
        canvas = values[behind + winner * gen_length : behind + (winner + 1) * gen_length]
        return RequestOutcome(canvas, NFE(*nfe), winner, bbk.STOP_REASONS[reason], tuple(branches))

    def grown(self, sizes: Sizes) -> Slots:
        """Slots of larger sizes that hold the same requests at the same numbers."""
        new = Slots(sizes, self.mask_token_id, self.map_entries, self.device)
        requests, rows, positions, prompt = self.sizes
        for field in fields_of(bbk.BranchState):
            old, into = getattr(self.state, field.name), getattr(new.state, field.name)
            if field.layout.shape.startswith("requests"):
                into[:requests][tuple(slice(size) for size in old.shape)] = old
            else:
                target = into.view(sizes.requests, sizes.num_branches, *into.shape[1:])
                source = old.view(requests, rows, *old.shape[1:])
                target[tuple(slice(size) for size in source.shape)] = source
        for name in ("gen_length", "group", "filler", "begun"):
            getattr(new, name)[:requests] = getattr(self, name)
        for name in ("live", "branch", "seqlens_k"):
            new._by_request(getattr(new, name))[:requests, :rows] = self._by_request(getattr(self, name))
        filler = self.filler.view(-1, 1, 1)
        for tokens in (new.state.tokens, new.state.cached_token):
            lines = tokens.view(sizes.requests, sizes.num_branches, -1)[:requests]
            lines[:, :, positions:] = filler
            lines[:, rows:] = filler
        return new

    def _by_request(self, of_rows: Tensor) -> Tensor:
        """[R] -> [Q, N], a view."""
        return of_rows.view(self.sizes.requests, self.sizes.num_branches)

    def _ints(self, values: Sequence[int]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int32, device="cpu")
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)


def _filler(params: PolicyParams) -> int:
    """The smallest id that is neither MASK nor an end of text."""
    taken = {params.mask_token_id, *params.eos_token_ids}
    return next(token for token in range(len(taken) + 1) if token not in taken)
