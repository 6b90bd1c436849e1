"""Traces: what every forward of a decode did, as plain records that can be saved as JSON and replayed.

A trace is a list with one record for each forward of the request::

    {"kind": "block", "seconds": 0.03, "rows": [0, 1], "windows": [[4, 8], [0, 8]], "packed_tokens": 12,
     "distinct_rows": 2,
     "commits": [{"branch": 0, "positions": [4], "tokens": [17], "confidence": [0.98]}],
     "merges": [{"branch": 1, "positions": [2], "tokens": [9]}],
     "syncs": [{"branch": 1, "leader": 0}]}

`rows` are the branches that the forward served (init and refresh compute equal ones once: `distinct_rows`),
`windows` their windows during it, in positions of the generation region. Within a record commits come first,
then merges, then syncs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import blockbatch_kernels as bbk
from blockbatch.decoding.session import Step

Record = dict[str, Any]


class TraceRecorder:
    """Collects the trace of each request of a session."""

    def __init__(self, state: bbk.BranchState) -> None:
        self._state = state
        self.traces: list[list[Record]] = [[] for _ in range(state.num_requests)]

    def add(self, step: Step) -> None:
        count = self._state.num_branches
        source_row, lengths, windows = step.plan.source_row, step.plan.query_lengths, step.windows
        commits = self._changes(step.events.committed, with_confidence=True)
        merges = self._changes(step.events.merged)
        sync_source = step.events.sync_source.tolist()
        for request, trace in enumerate(self.traces):
            first = request * count
            rows = [row for row in range(first, first + count) if source_row[row] >= 0]
            if rows:
                trace.append(
                    {
                        "kind": step.phase,
                        "seconds": step.seconds,
                        "rows": [row - first for row in rows],
                        "windows": [list(windows[row]) for row in rows],
                        "packed_tokens": sum(lengths[first : first + count]),
                        "distinct_rows": len({source_row[row] for row in rows}),
                        "commits": [],
                        "merges": [],
                        "syncs": [],
                    }
                )
            if not trace:
                continue
            # A turn without a forward (every window was already complete) belongs to the forward before it.
            record = trace[-1]
            for row in range(first, first + count):
                if row in commits:
                    record["commits"].append({"branch": row - first, **commits[row]})
                if row in merges:
                    record["merges"].append({"branch": row - first, **merges[row]})
                if sync_source[row] != row:
                    record["syncs"].append({"branch": row - first, "leader": sync_source[row] - first})

    def _changes(self, changed, with_confidence: bool = False) -> dict[int, Record]:
        changes: dict[int, Record] = {}
        names = ["tokens", "confidence"] if with_confidence else ["tokens"]
        where = changed.nonzero()
        tokens = self._state.top_token[changed].tolist()
        confidence = self._state.confidence[changed].tolist()
        for (row, position), *values in zip(where.tolist(), tokens, confidence, strict=True):
            change = changes.setdefault(row, {"positions": [], **{name: [] for name in names}})
            change["positions"].append(position)
            for name, value in zip(names, values):
                change[name].append(value)
        return changes


def replay(trace: list[Record], num_branches: int, gen_length: int, mask_token_id: int) -> list[list[int]]:
    """The canvas of every branch after the last record: [num_branches][gen_length] token ids."""
    canvases = [[mask_token_id] * gen_length for _ in range(num_branches)]
    for record in trace:
        for change in record["commits"] + record["merges"]:
            for position, token in zip(change["positions"], change["tokens"], strict=True):
                canvases[change["branch"]][position] = token
        synced = {sync["branch"]: list(canvases[sync["leader"]]) for sync in record["syncs"]}
        for branch, canvas in synced.items():
            canvases[branch] = canvas
    return canvases


def save_trace(path: str | os.PathLike, trace: list[Record], **header: Any) -> None:
    """Writes `{**header, "trace": trace}` as JSON; the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps({**header, "trace": trace}), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
