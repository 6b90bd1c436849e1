"""One text of a block-causal model while it is decoded: its ids, and the pages of its K and V."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from blockbatch.branches import BranchResult
from blockbatch.decoding.block_branches import BlockBranches, Change
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.block_forward import Predicted, Row
from blockbatch.text_pages import OutOfPagesError, TextPages


class Forward(NamedTuple):
    """A forward that a text asks for.

    Attributes:
        kind: "prefill", "denoise" or "store"; "block" and "sub" are denoise forwards of Fast-dLLM v2, and
            "fused" is a store (or prefill) with the next block's first denoise forward.
        rows: what it computes.
        branches: for each branch the row that it reads; empty: the only branch reads them all.
    """

    kind: str
    rows: list[Row]
    branches: tuple[int, ...] = ()


class Commit(NamedTuple):
    """Tokens that were written after a forward.

    Attributes:
        places: of the text; 0 is the prompt's first.
        tokens, confidences: one for each place.
        branch: that they were written in.
        kind: "commit", "merge" or "sync".
        source: of a sync, the branch that was copied.
    """

    places: list[int]
    tokens: list[int]
    confidences: list[float]
    branch: int = 0
    kind: str = "commit"
    source: int = 0


class BlockText:
    """
    Args:
        prompt: token ids.
        pool: where its pages come from.
        most_positions: of the model: the text ends before it would hold more.
        prefix_cache: the block size of the mask, to look for and keep finished blocks; None: neither.
        grow: whether the text ends where the pool does; else that is an error.

    Attributes:
        ids: prompt and text; MASK where nothing stands yet.
        prompt_length: ids of the prompt.
        stored: positions whose K and V are final.
        shift: by how much places in `ids` exceed positions.
        found: tokens of the prompt that the prefix cache had.
        committed: tokens that were written.
        commits: what was written since they were last cleared.
        branches: of BlockBatch; None: the text is its only branch.
        winner: the branch whose ids the text has.
        window: places that are being decoded.
        settled: places before the first MASK, or of the whole text.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        pool: TextPages,
        most_positions: int,
        mask_token_id: int,
        prefix_cache: int | None = None,
        grow: bool = False,
    ) -> None:
        self.ids, self.prompt_length, self.pool = list(prompt), len(prompt), pool
        self.mask, self.stored, self.shift, self.found = mask_token_id, 0, 0, 0
        self.pages: list[int] = []
        self._scratch: list[int] = []
        self.committed = 0
        self.commits: list[Commit] = []
        self.branches: BlockBranches | None = None
        self.winner = 0
        self.window = (len(prompt), len(prompt))
        self._most_positions, self._prefix_cache, self._grow = most_positions, prefix_cache, grow
        self._settled = len(prompt)

    @property
    def generated(self) -> list[int]:
        return self.ids[self.prompt_length :]

    @property
    def settled(self) -> int:
        while self._settled < len(self.ids) and self.ids[self._settled] != self.mask:
            self._settled += 1
        return min(self._settled, len(self.ids))

    def find_prefix(self, length: int) -> None:
        """Takes over kept K and V of the prompt's first `length` tokens, as far as there are any."""
        if self._prefix_cache is None:
            return
        self.pages = self.pool.find(self._prefix_cache, self._run, self.ids[:length])
        self.found = self.stored = len(self.pages) * self.pool.page_size

    def keep_prefix(self) -> None:
        """Keeps what is stored for other requests."""
        if self._prefix_cache is not None and self.shift == 0:
            whole = self.stored // self._run * self._run
            self.pool.keep(self._prefix_cache, self._run, self.ids[:whole], self.pages)

    @property
    def _run(self) -> int:
        return math.lcm(self._prefix_cache, self.pool.page_size)

    def make_room(self, places: int) -> bool:
        """Takes pages for the text's first `places`; False: the model or the memory ends before.

        Raises:
            OutOfPagesError: there are none, and the text does not take what there is.
        """
        positions = places - self.shift
        if positions > self._most_positions:
            return False
        lacking = -(-positions // self.pool.page_size) - len(self.pages)
        if lacking > 0:
            try:
                self.pages += self.pool.take(lacking)
            except OutOfPagesError:
                if not self._grow:
                    raise
                return False
        return True

    def scratch(self, start: int, count: int) -> list[list[int]]:
        """Page tables of `count` branches that share all before place `start`, a multiple of the page size.

        The first is the text's own. The others have pages that are theirs until the text ends.
        """
        whole = (start - self.shift) // self.pool.page_size
        own = len(self.pages) - whole
        while len(self._scratch) < (count - 1) * own:
            self._scratch += self.pool.take(own)
        parts = [self._scratch[branch * own : (branch + 1) * own] for branch in range(count - 1)]
        return [self.pages, *(self.pages[:whole] + part for part in parts)]

    def note(self, changes: Sequence[Change]) -> None:
        """Keeps what branches wrote, for observers."""
        for change in changes:
            branch, begin = self.branches.all[change.branch], self.branches.begin
            self.commits.append(
                Commit(
                    [begin + offset for offset in change.offsets],
                    [branch.top[offset] for offset in change.offsets],
                    [branch.confidence[offset] for offset in change.offsets],
                    change.branch,
                    change.kind,
                    change.source,
                )
            )

    def row(
        self,
        start: int,
        stop: int,
        end: int,
        predict: Sequence[int] = (),
        targets: Sequence[int] | None = None,
    ) -> Row:
        """Places [start, stop) as queries that see all before `end`.

        Args:
            predict: places whose logits are wanted.
            targets: the places that these predict; None: they themselves.
        """
        return Row(
            self.ids[start:stop],
            start - self.shift,
            end - self.shift,
            self.pages,
            [place - start for place in predict],
            list(predict if targets is None else targets),
        )

    def blocks(
        self,
        start: int,
        stop: int,
        size: int,
        predict: Sequence[int] = (),
        targets: Sequence[int] | None = None,
    ) -> list[Row]:
        """Places [start, stop) as one row for each block of the grid of `size` positions."""
        rows = []
        wanted = list(zip(predict, predict if targets is None else targets, strict=True))
        first = start
        while first < stop:
            position = first - self.shift
            last = min(stop, (position // size + 1) * size + self.shift)
            mine = [(place, target) for place, target in wanted if first <= place < last]
            rows.append(
                self.row(first, last, last, [place for place, _ in mine], [target for _, target in mine])
            )
            first = last
        return rows

    def masks(self, start: int, stop: int) -> list[int]:
        """Places of MASK in [start, stop)."""
        return [place for place in range(start, stop) if self.ids[place] == self.mask]

    def write(self, places: Sequence[int], predicted: Predicted) -> None:
        """Writes the top tokens at `places`, for all branches; appends where the text ends before."""
        for place, (token, _) in zip(places, predicted, strict=True):
            if place == len(self.ids):
                self.ids.append(token)
            else:
                self.ids[place] = token
        self.committed += len(places)
        tokens, confidences = [token for token, _ in predicted], [value for _, value in predicted]
        every = self.branches.all if self.branches else (None,)
        for index, branch in enumerate(every):
            self.commits.append(Commit(list(places), tokens, confidences, index))
            if branch is not None:
                branch.committed += len(places)

    def branch_results(self, method: BlockMethod) -> tuple[BranchResult, ...]:
        """What each branch did."""
        starts = [start for start, _ in self.windows()]
        if self.branches is None:
            return (BranchResult(method.block_size, self.committed, 0, 0, starts[0]),)
        return tuple(
            BranchResult(branch.size, branch.committed, branch.merged, branch.synced, start)
            for branch, start in zip(self.branches.all, starts, strict=True)
        )

    def sizes(self, method: BlockMethod) -> tuple[int, ...]:
        """Block sizes of the branches."""
        return self.branches.sizes if self.branches else (method.block_size,)

    def canvases(self) -> list[list[int]]:
        """What each branch holds behind the prompt."""
        if self.branches is None:
            return [self.generated]
        before = self.ids[self.prompt_length : self.branches.begin]
        skipped = max(self.prompt_length - self.branches.begin, 0)
        return [before + branch.tokens[skipped:] for branch in self.branches.all]

    def windows(self) -> list[tuple[int, int]]:
        """What each branch works on, in positions behind the prompt."""
        windows = [self.window] if self.branches is None else self.branches.windows()
        return [tuple(max(place - self.prompt_length, 0) for place in window) for window in windows]

    def first_of(self, tokens: Collection[int], start: int) -> int | None:
        """The first place from `start` on that holds one of `tokens`."""
        return next((place for place in range(start, len(self.ids)) if self.ids[place] in tokens), None)

    def release(self) -> None:
        """Gives the pages back."""
        self.pool.release(self.pages + self._scratch)
        self.pages, self._scratch = [], []
