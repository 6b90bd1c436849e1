"""What the branches of a decode decide at each position, in figures by category of token.

For every position of the final text:

- A *decision* is a token that a branch committed itself; merges and syncs only pass tokens on. Branches that
  compute the same row (all of them at init, those with equal canvases at a refresh) make one decision
  together.
- The position is *decided twice* if two branches made separate decisions there, for whatever tokens.
- It is *agreed* if it was decided twice and every decision, also one that a sync later wiped out, was for
  the final token.
- *When*: the forward in which an agreed position was decided the second time, as a share of the decode (0:
  init, 1: the last forward).
- How each branch came to the token that it holds there in the end: committed it itself (own), took it in a
  merge, or with the leader's whole canvas in a sync (a branch that held the same token before keeps how it
  came by it).

Branches of BlockBatch help each other, so few positions are left to decide twice. To compare what block
sizes choose without help, trace decodes with merge_threshold=None and sync_threshold=None.

Intervals are 95%. Positions of one text are not independent, so shares have Wilson's interval for the number
of independent positions that vary as much as the texts do (the design effect of cluster samples), means 1.96
standard errors between texts. A single text shows no variation between texts: its positions then count as
independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from blockbatch.evaluation.statistics import Interval, wilson
from blockbatch.pictures.states import COMMITTED, MERGED, SYNCED, States, expand
from blockbatch.pictures.token_categories import CATEGORIES, categories

ORIGINS = {"own": COMMITTED, "merge": MERGED, "sync": SYNCED}
_Z = 1.96


class Position(NamedTuple):
    """What the branches did at one position of a final text.

    Attributes:
        position: in the generation region.
        category: of its token, of `CATEGORIES`.
        decided_twice: whether two branches decided on it independently.
        agreed: whether it was decided twice, always for the final token.
        when: if agreed: share of the decode after which it was decided twice; else None.
        origins: how many branches hold a token there in the end by each of `ORIGINS`.
    """

    position: int
    category: str
    decided_twice: bool
    agreed: bool
    when: float | None
    origins: dict[str, int]


class Share(NamedTuple):
    """A share or mean with its 95% interval and the number of positions (of tokens held) behind it."""

    value: float
    interval: Interval
    count: int


class Row(NamedTuple):
    """One category: its positions, and the three figures; None where there is nothing to take them of."""

    positions: int
    agreed: Share | None
    when: Share | None
    origins: dict[str, Share] | None


class _Decision(NamedTuple):
    computation: tuple[int, int]  # forward, and the first of the branches that share its row
    branch: int
    token: int


def positions(trace: dict[str, Any]) -> list[Position]:
    """The positions of the final text of a trace, as `blockbatch.load_trace` returns it.

    Raises:
        ValueError: the trace has a single branch, no canvas or no pieces.
    """
    if len(trace["block_sizes"]) < 2:
        raise ValueError("expected a trace of several branches, got one with a single block size")
    for name in ("canvas", "pieces"):
        if not trace[name]:
            raise ValueError(f"expected a trace with {name}, got one without")
    states = expand(trace)
    decisions, origins = _decisions(trace, states), states.origin[-1]
    text = _final_text(trace)
    kinds = categories([trace["pieces"].get(token, "") for token in text])
    last = max(1, len(trace["trace"]) - 1)
    found = []
    for position, (token, kind) in enumerate(zip(text, kinds)):
        if kind is None:
            continue
        made = decisions.get(position, [])
        second = _second(made)
        agreed = second is not None and all(one.token == token for one in made)
        when = second / last if agreed else None
        counts = {name: int((origins[:, position] == origin).sum()) for name, origin in ORIGINS.items()}
        found.append(Position(position, kind, second is not None, agreed, when, counts))
    return found


def _final_text(trace: dict[str, Any]) -> list[int]:
    """The winner's tokens before the first EOS; a MASK that the end left behind it does not count."""
    text = []
    for token in trace["canvas"]:
        if token in trace["eos_token_ids"] or token == trace["mask_token_id"]:
            break
        text.append(token)
    return text


def _second(decisions: Sequence[_Decision]) -> int | None:
    """The forward in which a position was decided the second time; decisions come in their order."""
    for index, one in enumerate(decisions):
        for earlier in decisions[:index]:
            if one.branch != earlier.branch and one.computation != earlier.computation:
                return one.computation[0]
    return None


def _decisions(trace: dict[str, Any], states: States) -> dict[int, list[_Decision]]:
    """All decisions by position."""
    found: dict[int, list[_Decision]] = {}
    for forward, record in enumerate(trace["trace"]):
        # Equal rows of a full forward are computed once; in a block denoise every branch has its own window.
        # Of a block-causal model every forward is of whole blocks, equal ones computed once.
        same = range(states.num_branches)
        if record["kind"] == "init":
            same = [0] * states.num_branches
        elif forward == 0 and "stored" in record:
            same = [0] * states.num_branches
        elif record["kind"] == "refresh" or "stored" in record:
            canvases = states.tokens[forward - 1].tolist()
            same = [canvases.index(canvas) for canvas in canvases]
        for commit in record["commits"]:
            branch = commit["branch"]
            for position, token in zip(commit["positions"], commit["tokens"]):
                found.setdefault(position, []).append(_Decision((forward, same[branch]), branch, token))
    return found


def table(texts: Sequence[Sequence[Position]]) -> dict[str, Row]:
    """The figures of every category that occurs in the texts, and of all positions together under "all"."""
    rows = {}
    for name in (*CATEGORIES, "all"):
        groups = [[one for one in text if name in (one.category, "all")] for text in texts]
        count = sum(map(len, groups))
        if not count:
            continue
        held = [sum(sum(one.origins.values()) for one in group) for group in groups]
        origins = {
            origin: share(
                (sum(one.origins[origin] for one in group), total) for group, total in zip(groups, held)
            )
            for origin in ORIGINS
        }
        rows[name] = Row(
            positions=count,
            agreed=share((sum(one.agreed for one in g), sum(one.decided_twice for one in g)) for g in groups),
            when=mean([one.when for one in group if one.agreed] for group in groups),
            origins=origins if any(held) else None,
        )
    return rows


def share(texts: Iterable[tuple[int, int]]) -> Share | None:
    """The share of (hits, count) pairs, one for each text, with an interval that takes texts as clusters."""
    pairs = [(hits, count) for hits, count in texts if count]
    if not pairs:
        return None
    hits, count = map(sum, zip(*pairs))
    value = hits / count
    independent = float(count)
    if len(pairs) > 1:
        variance = _cluster_variance([h - value * n for h, n in pairs], count)
        if 0 < value < 1 and variance > 0:
            independent = min(float(count), max(1.0, value * (1 - value) / variance))
        elif value in (0, 1):
            independent = float(len(pairs))  # nothing varies: be as careful as if each text were one position
    return Share(value, wilson(value * independent, independent), count)


def mean(texts: Iterable[Sequence[float]]) -> Share | None:
    """The mean of all values of all texts, with an interval that takes texts as clusters."""
    groups = [list(values) for values in texts if len(values)]
    if not groups:
        return None
    clusters = groups if len(groups) > 1 else [[value] for value in groups[0]]
    count = sum(map(len, clusters))
    value = sum(map(sum, clusters)) / count
    spread = 0.0
    if len(clusters) > 1:
        spread = _Z * _cluster_variance([sum(g) - value * len(g) for g in clusters], count) ** 0.5
    return Share(value, (max(0.0, value - spread), min(1.0, value + spread)), count)


def _cluster_variance(residuals: Sequence[float], count: int) -> float:
    """Variance of a ratio estimated from the residuals of its clusters."""
    clusters = len(residuals)
    return clusters / (clusters - 1) * float(np.square(residuals).sum()) / count**2
