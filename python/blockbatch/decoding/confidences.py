"""How sure the model was of each token when it was committed, kept for requests that ask.

That is the confidence of the token in the forward that committed it (of a merge: in the latest forward that
computed its position). A branch that takes over another one's tokens takes over what that one was sure of.
"""

from __future__ import annotations

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.decoding.block_text import BlockText


class Confidences:
    """Of the rows of a state, on its device. `before` and `after` stand around the policy; nothing waits.

    Args:
        state: of the rows.
        mask_token_id: of the model.
        drafts: whether rows are drafts, whose K/V alone the others take over.

    Attributes:
        values: [R, G] fp32; where a row holds no token of its own they mean nothing.
    """

    def __init__(self, state: bbk.BranchState, mask_token_id: int, drafts: bool) -> None:
        self._state, self._mask, self._drafts = state, mask_token_id, drafts
        self.values = torch.zeros_like(state.confidence)
        self._rows = torch.arange(state.num_rows, device=self.values.device)
        on_gpu = self.values.device.type == "cuda"
        size = (state.num_requests, state.gen_length)
        self._host = torch.zeros(size, dtype=torch.float32, device="cpu", pin_memory=on_gpu)

    def before(self) -> Tensor:
        """[R, G] bool: what `after` needs of the time before a policy."""
        return self._state.tokens == self._mask

    def after(self, masked: Tensor, sources: Tensor) -> None:
        """Keeps what a policy wrote.

        Args:
            masked: of `before`.
            sources: [R] int32, the row whose tokens a row took over; itself or -1: none.
        """
        written = masked & (self._state.tokens != self._mask)
        values = torch.where(written, self._state.confidence, self.values)
        if not self._drafts:
            values = values[torch.where(sources < 0, self._rows, sources.long())]
        self.values.copy_(values)

    def refresh_host(self) -> None:
        """Starts the copy that `first_row` reads."""
        self._host.copy_(self.values[:: self._state.num_branches], non_blocking=True)

    def first_row(self, request: int, length: int) -> list[float]:
        """Of the first `length` positions of a request's first branch, as of the last copy."""
        return self._host[request, :length].tolist()

    def moved(self, state: bbk.BranchState, rows: Tensor) -> Confidences:
        """The same for a larger state, in which the rows have these numbers."""
        new = Confidences(state, self._mask, self._drafts)
        new.values[rows, : self.values.shape[1]] = self.values
        return new


class TextConfidences:
    """The same of one text of a block-causal model, whose rules run on the host."""

    def __init__(self) -> None:
        self._branches: list[dict[int, float]] = []

    def note(self, text: BlockText) -> None:
        """Keeps what the text's last forward wrote."""
        count = len(text.branches.all) if text.branches else 1
        while len(self._branches) < count:
            self._branches.append(dict(self._branches[0]) if self._branches else {})
        for commit in text.commits:
            mine = self._branches[commit.branch]
            mine.update(zip(commit.places, commit.confidences, strict=True))
            if commit.kind == "sync":
                mine.update(self._branches[commit.source])

    def of(self, branch: int, start: int, stop: int) -> list[float]:
        """What a branch was sure of at the places [start, stop)."""
        return [self._branches[branch][place] for place in range(start, stop)]
