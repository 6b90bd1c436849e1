"""Pages of K and V that requests of a block-causal model take one block at a time, and share by content.

A finished block's K and V never change there, and depend on nothing but the tokens up to the block's end. So
pages of equal beginnings can be kept, and serve every later request that begins with the same blocks.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from blockbatch.kv_cache import PAGE_SIZE


def _locked(method):
    @functools.wraps(method)
    def run(self, *arguments):
        with self.lock:
            return method(self, *arguments)

    return run


class OutOfPagesError(MemoryError):
    """The pool may not grow as far as a request asks."""


@dataclass
class _Entry:
    """A run of tokens whose pages are kept.

    Attributes:
        key: in the table: the entry before it and the tokens.
        number: what keys of the entries behind it call it.
        pages: of the run.
        used: when it was last found or added.
        children: entries behind it.
    """

    key: tuple[int, tuple[int, ...]]
    number: int
    pages: list[int]
    used: int
    parent: _Entry | None
    children: int = 0


@dataclass
class PrefixStats:
    """What the prefix cache did: tokens asked for, tokens found, entries given up for their pages."""

    asked: int = 0
    found: int = 0
    evicted: int = 0


@dataclass
class _Prefixes:
    entries: dict[tuple[int, tuple[int, ...]], _Entry] = field(default_factory=dict)
    numbers: itertools.count = field(default_factory=lambda: itertools.count(1))
    clock: itertools.count = field(default_factory=itertools.count)
    stats: PrefixStats = field(default_factory=PrefixStats)


class TextPages:
    """All pages of one model.

    Attributes:
        kv: [layers, 2, pages, page_size, num_kv_heads, head_dim]; another tensor whenever the pool grew.
        page_size: positions a page.
        most_pages: it grows no further.
        generation: how often it grew.
        lock: held while the pool changes and while a forward uses its memory, so that threads may share it.
        stats: of the prefix cache.
    """

    def __init__(
        self,
        most_pages: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.page_size, self.most_pages, self.generation = page_size, most_pages, 0
        self.lock = threading.RLock()
        self._shape = (page_size, num_kv_heads, head_dim)
        self.kv = torch.zeros(num_layers, 2, 0, *self._shape, dtype=dtype, device=device)
        self._free: list[int] = []
        self._holders: list[int] = []  # of each page
        self._prefixes = _Prefixes()

    def __len__(self) -> int:
        """Pages that it has now."""
        return len(self._holders)

    @property
    def stats(self) -> PrefixStats:
        return self._prefixes.stats

    @property
    def pages_in_use(self) -> int:
        """Pages that a request or the prefix cache holds."""
        return len(self._holders) - len(self._free)

    @_locked
    def held(self) -> int:
        """Pages that requests hold; those that the prefix cache alone holds can be had."""
        kept = sum(
            self._holders[page] == 1 for entry in self._prefixes.entries.values() for page in entry.pages
        )
        return self.pages_in_use - kept

    @_locked
    def take(self, count: int) -> list[int]:
        """Pages for a request to write; their content is of no meaning.

        Raises:
            OutOfPagesError: there are not as many, and no kept prefix can be given up for them.
        """
        if len(self._free) < count:
            self._grow(len(self._holders) - len(self._free) + count)
        while len(self._free) < count and self._evict():
            pass
        if len(self._free) < count:
            raise OutOfPagesError(
                f"cache: expected {count} pages of {self.page_size} positions, got {len(self._free)} of at "
                f"most {self.most_pages}"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    @_locked
    def reserve(self, count: int) -> None:
        """Grows as far as `count` more pages need, within the most."""
        if len(self._free) < count:
            self._grow(self.pages_in_use + count)

    @_locked
    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of pages that are in use."""
        for page in pages:
            self._holders[page] += 1

    @_locked
    def release(self, pages: Sequence[int]) -> None:
        """One holder less; a page without any is free."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    @_locked
    def find(self, block_size: int, run: int, tokens: Sequence[int]) -> list[int]:
        """Pages that hold the K and V of the longest known beginning of `tokens`, held for the caller.

        Args:
            block_size: of the mask: K and V of another mask are others.
            run: tokens of an entry, a multiple of block size and page size.
        """
        self.stats.asked += len(tokens)
        pages: list[int] = []
        for entry in self._chain(block_size, run, tokens):
            entry.used = next(self._prefixes.clock)
            pages += entry.pages
        self.hold(pages)
        self.stats.found += len(pages) * self.page_size
        return pages

    @_locked
    def keep(self, block_size: int, run: int, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Keeps the pages of all whole runs of `tokens`, for `find`.

        Args:
            block_size, run: see `find`.
            pages: of the request; page j holds positions from j * page_size on, all of them final.
        """
        prefixes, each = self._prefixes, run // self.page_size
        known = list(self._chain(block_size, run, tokens))
        parent = known[-1] if known else None
        for entry in known:
            entry.used = next(prefixes.clock)
        for place in range(len(known), len(tokens) // run):
            key = _key(parent, block_size, tokens[place * run : (place + 1) * run])
            own = list(pages[place * each : (place + 1) * each])
            self.hold(own)
            entry = _Entry(key, next(prefixes.numbers), own, next(prefixes.clock), parent)
            prefixes.entries[key] = entry
            if parent is not None:
                parent.children += 1
            parent = entry

    @_locked
    def forget(self) -> None:
        """Gives up all kept prefixes."""
        for entry in self._prefixes.entries.values():
            self.release(entry.pages)
        self._prefixes.entries.clear()

    def _chain(self, block_size: int, run: int, tokens: Sequence[int]):
        parent = None
        for start in range(0, len(tokens) - run + 1, run):
            key = _key(parent, block_size, tokens[start : start + run])
            parent = self._prefixes.entries.get(key)
            if parent is None:
                return
            yield parent

    def _evict(self) -> bool:
        """Gives up the entry that was used longest ago of those with nothing behind them."""
        last = [entry for entry in self._prefixes.entries.values() if entry.children == 0]
        if not last:
            return False
        entry = min(last, key=lambda entry: entry.used)
        del self._prefixes.entries[entry.key]
        if entry.parent is not None:
            entry.parent.children -= 1
        self.release(entry.pages)
        self.stats.evicted += 1
        return True

    def _grow(self, wanted: int) -> None:
        """To `wanted` pages or more, at most `most_pages`."""
        pages = len(self._holders)
        # By half as much again, so that a long text moves its pages a few times only.
        size = min(self.most_pages, max(wanted, pages + pages // 2, 16))
        if size <= pages:
            return
        shape = (*self.kv.shape[:2], size, *self._shape)
        larger = torch.zeros(shape, dtype=self.kv.dtype, device=self.kv.device)
        larger[:, :, :pages] = self.kv
        self.kv = larger
        self.generation += 1
        self._free[:0] = range(size - 1, pages - 1, -1)
        self._holders += [0] * (size - pages)


def _key(parent: _Entry | None, block_size: int, tokens: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    # The first entry of a chain stands for the mask.
    return (-block_size if parent is None else parent.number, tuple(tokens))
