"""Which requests may share slots, and what host and device tell each other around a forward of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.decoding.method import Method
from blockbatch.decoding.rule import CommitRule
from blockbatch.decoding.sampling import SamplingKind
from blockbatch_kernels import PolicyParams


class Layout(NamedTuple):
    """What slots must have in common.

    Attributes:
        params: settings that all requests share; None: any without drafts by LLaDA's rule.
        num_branches, gen_length: of every request; None: up to what the slots have.
        is_open: whether block steps compute open queries.
        map_entries: see `bbk.BranchState.create`.
        rule: a commit rule of one's own that all requests share.
        sampling: what drawing tokens takes, the same for all requests; None: nobody draws.
    """

    params: PolicyParams | None
    num_branches: int | None
    gen_length: int | None
    is_open: bool
    map_entries: int = 0
    rule: CommitRule | None = None
    sampling: SamplingKind | None = None


def layout_of(method: Method, gen_length: int) -> Layout:
    """Drafts ask for an exact number of rows. Dream's rule looks at all rows and positions of a slot, and so
    may a rule of one's own."""
    params, sizes = method.params, method.block_sizes
    common = dict(is_open=params.query_span == "open", rule=method.rule, sampling=method.sampling)
    if params.policy == "dream_published":
        common["map_entries"] = bbk.map_entries(sizes, gen_length)
    if params.policy == "dream_published" or method.rule is not None:
        return Layout(params, len(sizes), gen_length, **common)
    if params.drafts:
        return Layout(params, len(sizes), None, **common)
    return Layout(None, None, None, **common)


class WholeRows(NamedTuple):
    """Whole rows of a forward, as the host says.

    Attributes:
        rows: that are computed now.
        starting: slots whose full forward begins with them.
        ending: slots whose full forward they complete, by phase.
        tokens: of the rows.
        predictions: of the rows, at most.
        inits_left: whether requests are before their init afterwards.
    """

    rows: list[int]
    starting: list[int]
    ending: dict[int, list[int]]
    tokens: int
    predictions: int
    inits_left: bool


class HostView(NamedTuple):
    """What the host reads behind a forward, lists by row or by request.

    Attributes:
        status: [Q] a list for each request, see `slots.STATUS`.
        tokens: [Q, G] what the first branch holds, a tensor of the host: few of them are looked at.
        usage: entries of the page table that have a page, and pages in use.
    """

    block_start: list[int]
    block_end: list[int]
    full_start: list[int]
    full_end: list[int]
    full_source: list[int]
    block_predictions: list[int]
    full_predictions: list[int]
    sync_source: list[int]
    blocking: list[int]
    refreshing: list[int]
    status: list[list[int]]
    tokens: Tensor
    usage: list[int]
