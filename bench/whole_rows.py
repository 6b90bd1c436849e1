"""A refresh whose rows are dealt out whole to the ranks, checked and timed; for tensor_parallel.py."""

from __future__ import annotations

from typing import Any

import torch
from timing import in_turns
from verify import Wrong, relative_error

from blockbatch.models import Model
from blockbatch.parallel.digest import StateDigest


def by_whole_rows(pair: Any, whole: Model, error: float, repeats: int) -> dict[str, Any]:
    """Times of a pair's refresh by rows that are dealt out.

    Args:
        pair: the refresh by one process and by all ranks.
        whole: the model of one process.
        error: of the reference backend's hidden states at another size.

    Raises:
        Wrong: this rank's heads of keys and values are not those of one process, within rounding.
    """
    share = pair.ranks.model.share
    share.hold_whole(whole)
    try:
        checks = _check(pair, error)
        run = [(pair.ranks.run, pair.ranks.snapshot.restore)]
        ((milliseconds, spread),) = in_turns(run, whole.device, repeats)
    finally:
        share.whole = None
    return {"whole_rows_ms": milliseconds, "whole_rows_spread": spread, "whole_rows_checks": checks}


def _check(pair: Any, error: float) -> dict[str, Any]:
    one, ranks = pair.one, pair.ranks
    for case in (one, ranks):
        case.snapshot.restore()
        case.run()
    pages = one.batch.cache.page_table.unique().long()
    if not torch.equal(pages, ranks.batch.cache.page_table.unique().long()):
        raise Wrong("pages: expected those of one process, got others")
    expected, found = pair.heads_of(one.batch.cache.kv)[:, :, pages], ranks.batch.cache.kv[:, :, pages]
    # Two results that each err by twice the reference's error at most; in fp32 that has none.
    difference, allowed = relative_error(found, expected), 3 * error + torch.finfo(found.dtype).eps
    if not difference <= allowed:
        raise Wrong(f"keys and values: expected within {allowed:.2e} of one process, got {difference:.2e}")
    same = (one.batch.state.top_token == ranks.batch.state.top_token).float().mean()
    digest = int(StateDigest(ranks.batch.state).compute())
    ranks.model.share.group.agree("the state behind dealt rows", digest)
    for case in (one, ranks):
        case.snapshot.restore()
    return {
        "difference_of_keys_and_values_from_one": difference,
        "top_tokens_equal_to_one": float(same),
        "same_state_on_all_ranks": True,
    }
