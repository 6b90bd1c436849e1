"""BlockBatch inside the trained block of a block-causal model. Ours: nobody has published it for such models.

Branches of several sizes decode the same block. A branch's size is how far it may commit: its window. All
see one stored prefix, and a branch is nothing but the ids of its block, since every forward computes the
block whole. So merge and sync copy ids, and no refresh is ever needed. The rules between two forwards are
those of `blockbatch_kernels.decode_policy` with the prefix exit, on one block in place of the generation
region; a block ends once a branch holds all of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class BranchRules(NamedTuple):
    """The settings of `blockbatch_kernels.PolicyParams` that make sense inside a block, by the same names."""

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    threshold: float
    tail_threshold: float | None
    merge_threshold: float
    sync_threshold: int
    leap_radius: int
    leap_threshold: float


@dataclass
class Branch:
    """One branch; all places are offsets in the block.

    Attributes:
        size: of its windows.
        tokens: ids of the block, MASK where it has none.
        top, confidence: what the latest forward predicted for each place.
        start, end: its window.
        decoded: tokens of the block that it committed itself, or that its leader had.
        done: whether it holds the whole block, or all before its first end of text.
        committed, merged, synced: counts over all blocks.
    """

    size: int
    tokens: list[int] = field(default_factory=list)
    top: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    start: int = 0
    end: int = 0
    decoded: int = 0
    done: bool = False
    committed: int = 0
    merged: int = 0
    synced: int = 0


class Change(NamedTuple):
    """What one branch wrote: offsets, and the leader where it took over another's ids."""

    kind: str
    branch: int
    offsets: list[int]
    source: int = 0


class BlockBranches:
    """
    Args:
        sizes: ascending, each a divisor of the block.
        rules: see `BranchRules`.

    Attributes:
        all: the branches.
        begin: place of the block in the text.
        finished: the branch that won because everything before its first end of text stands; None: none yet.
    """

    def __init__(self, sizes: Sequence[int], rules: BranchRules) -> None:
        self.sizes, self._rules = tuple(sizes), rules
        self.all = [Branch(size) for size in sizes]
        self.begin = self._given = 0
        self.finished: int | None = None
        self._sure, self._agreeing = fp32(rules.threshold), fp32(rules.merge_threshold)
        self._tail = None if rules.tail_threshold is None else fp32(rules.tail_threshold)

    def open(self, begin: int, tokens: Sequence[int], given: int) -> None:
        """Puts all branches at the beginning of a block that holds `tokens`, at least one of them MASK.

        Args:
            given: so many of them are the prompt's, where an end of text ends nothing.
        """
        self.begin, self._given = begin, given
        for branch in self.all:
            branch.tokens = list(tokens)
            branch.top, branch.confidence = [0] * len(tokens), [0.0] * len(tokens)
            branch.decoded, branch.done = 0, False
            self._move_window(branch)

    def windows(self) -> list[tuple[int, int]]:
        """Of every branch, as places of the text."""
        return [(self.begin + branch.start, self.begin + branch.end) for branch in self.all]

    def agreed(self) -> list[int]:
        """The ids that all branches hold, MASK elsewhere."""
        mask = self._rules.mask_token_id
        columns = zip(*(branch.tokens for branch in self.all), strict=True)
        return [column[0] if len(set(column)) == 1 else mask for column in columns]

    def winner(self) -> int | None:
        """The branch whose ids the text goes on from; None: the block goes on.

        One that ended the text, else the smallest of those that hold the whole block.
        """
        if self.finished is not None:
            return self.finished
        return next((index for index, branch in enumerate(self.all) if branch.done), None)

    def take_over(self, winner: int) -> list[Change]:
        """Gives all branches the winner's ids, at the end of a block; not counted as syncs."""
        changes = []
        for index, branch in enumerate(self.all):
            if branch.tokens != self.all[winner].tokens:
                branch.tokens = list(self.all[winner].tokens)
                changes.append(Change("sync", index, [], winner))
        return changes

    def after_forward(self, predicted: Sequence[dict[int, tuple[int, float]]]) -> list[Change]:
        """Commit, end of text, advance, merge and sync.

        Args:
            predicted: for each branch what the forward of its ids predicts at its MASKs, by offset.
        """
        for branch, values in zip(self.all, predicted, strict=True):
            for offset, (token, confidence) in values.items():
                branch.top[offset], branch.confidence[offset] = token, confidence
        changes = [self._commit(index, branch) for index, branch in enumerate(self.all) if not branch.done]
        self._finish()
        if self.finished is None:
            self._advance()
            changes += self._merge()
            self._finish()
        if self.finished is None:
            changes += self._sync()
        return [change for change in changes if change.offsets or change.kind == "sync"]

    def _commit(self, index: int, branch: Branch) -> Change:
        masks, rules = self._open(branch), self._rules
        chosen, unsure = [], False
        for offset in masks:
            sure = branch.confidence[offset] >= self._sure
            unsure |= not sure
            if sure and (self._tail is None or not unsure or branch.confidence[offset] >= self._tail):
                chosen.append(offset)
        if rules.leap_radius:
            near = fp32(rules.leap_threshold)
            chosen += [
                offset
                for offset in masks
                if offset not in chosen
                and branch.confidence[offset] >= near
                and any(abs(offset - anchor) <= rules.leap_radius for anchor in tuple(chosen))
            ]
        if masks:
            highest = max(masks, key=lambda offset: branch.confidence[offset])
            if highest not in chosen:
                chosen.append(highest)
        chosen.sort()
        for offset in chosen:
            branch.tokens[offset] = branch.top[offset]
        branch.decoded += len(chosen)
        branch.committed += len(chosen)
        self._clip(branch)
        return Change("commit", index, chosen)

    def _finish(self) -> None:
        """Looks for branches that hold everything before an end of text; the surest of them wins."""
        best = None
        for index, branch in enumerate(self.all):
            at = self._first_eos(branch)
            if at < len(branch.tokens) and self._rules.mask_token_id not in branch.tokens[:at]:
                if best is None or branch.confidence[at] > best[0]:
                    best = branch.confidence[at], index
        if best is not None and self.finished is None:
            self.finished = best[1]

    def _advance(self) -> None:
        for branch in self.all:
            if not branch.done and not self._open(branch):
                self._move_window(branch)

    def _move_window(self, branch: Branch) -> None:
        """On the window of the first MASK that counts; without one the branch is done."""
        mask, length, eos = self._rules.mask_token_id, len(branch.tokens), self._first_eos(branch)
        first = branch.tokens.index(mask) if mask in branch.tokens else length
        if first >= eos:
            branch.start, branch.end, branch.done = length, length, True
            return
        branch.start = first - first % branch.size
        branch.end = min(branch.start + branch.size, eos)

    def _merge(self) -> list[Change]:
        mask, taken = self._rules.mask_token_id, []
        members = [index for index, branch in enumerate(self.all) if not branch.done]
        if not any(branch.decoded for branch in self.all):
            return []
        for index in members:
            branch = self.all[index]
            sources = [self.all[other] for other in members if self._is_source(other, index)]
            offsets = []
            for offset, held in enumerate(branch.tokens):
                if held != mask or not branch.confidence[offset] > self._agreeing:
                    continue
                covered = any(source.start <= offset < source.end for source in sources)
                agrees = any(source.tokens[offset] == branch.top[offset] != mask for source in sources)
                if covered and agrees:
                    offsets.append(offset)
            taken.append(Change("merge", index, offsets))
        # Every destination has read what stood before the merge.
        for change in taken:
            branch = self.all[change.branch]
            for offset in change.offsets:
                branch.tokens[offset] = branch.top[offset]
            branch.merged += len(change.offsets)
            self._clip(branch)
        self._advance()
        return taken

    def _is_source(self, source: int, destination: int) -> bool:
        """Whether one branch's window stands behind in the order of merges, and no token contradicts."""
        one, other, mask = self.all[source], self.all[destination], self._rules.mask_token_id
        if source == destination or (one.end, -source) > (other.end, -destination):
            return False
        before = min(self._first_eos(one), self._first_eos(other))
        pairs = zip(one.tokens[:before], other.tokens[:before], strict=True)
        return not any(a != b and mask not in (a, b) for a, b in pairs)

    def _sync(self) -> list[Change]:
        most = max(branch.decoded for branch in self.all)
        source = next(index for index, branch in enumerate(self.all) if branch.decoded == most)
        leader, changes = self.all[source], []
        for index, branch in enumerate(self.all):
            if branch.done or most - branch.decoded <= self._rules.sync_threshold:
                continue
            branch.tokens, branch.decoded, branch.done = list(leader.tokens), leader.decoded, leader.done
            self._move_window(branch)
            branch.synced += 1
            changes.append(Change("sync", index, [], source))
        return changes

    def _open(self, branch: Branch) -> list[int]:
        mask = self._rules.mask_token_id
        return [offset for offset in range(branch.start, branch.end) if branch.tokens[offset] == mask]

    def _first_eos(self, branch: Branch) -> int:
        eos, length = self._rules.eos_token_ids, len(branch.tokens)
        return next((place for place in range(self._given, length) if branch.tokens[place] in eos), length)

    def _clip(self, branch: Branch) -> None:
        branch.end = min(branch.end, self._first_eos(branch))


def fp32(value: float) -> float:
    """`value` as a confidence would hold it, since they are compared in fp32."""
    return struct.unpack("f", struct.pack("f", value))[0]
