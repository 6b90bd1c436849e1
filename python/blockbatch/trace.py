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

With K/V (`DecodeConfig(trace_kv=True)`) a record also holds the cache states of the branches that it changed:
``"kv": [{"branches": [0, 2], "state": [...]}]``, branches with the same cache together, the states as
`blockbatch.kv_trace` makes them. Of several states of a branch in one record the last holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockbatch.trace_file import load_trace

if TYPE_CHECKING:
    import blockbatch_kernels as bbk
    from blockbatch.config import DecodeConfig
    from blockbatch.decoding.session import Session, Step
    from blockbatch.generation import Result
    from blockbatch.kv_cache import KVCache
    from blockbatch.models import Model
    from blockbatch.models.tokenizer import Tokenizer

__all__ = [
    "Record",
    "TraceRecorder",
    "decode_settings",
    "load_trace",
    "open_recorder",
    "replay",
    "save_trace",
    "trace_header",
]

Record = dict[str, Any]


class TraceRecorder:
    """Collects the trace of each request of a session.

    Args:
        state: of the session.
        cache: of the session, to record where K and V go; None: they are left out.
    """

    def __init__(self, state: bbk.BranchState, cache: KVCache | None = None) -> None:
        self._state = state
        lengths = (state.prompt_length + state.gen_length).tolist()
        self._sketcher = None
        if cache is not None:
            from blockbatch.kv_trace import KVSketcher  # it needs torch, which reading a trace does not

            self._sketcher = KVSketcher(cache, lengths)
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
            if self._sketcher is not None:
                synced = (row for row in range(first, first + count) if sync_source[row] != row)
                self._add_states(record, sorted({*rows, *synced}), first)

    def _add_states(self, record: Record, rows: list[int], first: int) -> None:
        states = record.setdefault("kv", [])
        for group, state in self._sketcher.states(rows):
            states.append({"branches": [row - first for row in group], "state": state})

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


def open_recorder(session: Session, config: DecodeConfig) -> TraceRecorder | None:
    """What records a session as its settings ask for; None if they ask for no trace."""
    if not config.trace:
        return None
    return TraceRecorder(session.state, session.cache if config.trace_kv else None)


def replay(trace: list[Record], num_branches: int, gen_length: int, mask_token_id: int) -> list[list[int]]:
    """The canvas of every branch after the last record: [num_branches][gen_length] token ids."""
    canvases = [[mask_token_id] * gen_length for _ in range(num_branches)]
    for record in trace:
        for change in record["commits"] + record["merges"]:
            for position, token in zip(change["positions"], change["tokens"], strict=True):
                canvases[change["branch"]][position] = token
        for sync in record["syncs"]:
            canvases[sync["branch"]] = list(canvases[sync["leader"]])
    return canvases


def trace_header(model: Model, prompt_ids: Sequence[int], config: DecodeConfig, result: Result) -> Record:
    """What pictures need besides the records of a decode, and where the records come from.

    Returns:
        the header of a trace file: model, method, settings, gen_length, block_sizes (of the branches, in
        their order), winner_block_size, prompt (text; None without a tokenizer), prompt_tokens,
        mask_token_id, eos_token_ids, canvas (of the winner), text, pieces (the text of every token id that
        occurs, the ids as decimal strings; empty without a tokenizer), nfe, seconds, stop_reason.
    """
    tokenizer = model.tokenizer
    eos_token_ids = model.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
    changes = [change for record in result.trace or () for change in record["commits"] + record["merges"]]
    ids = {model.spec.mask_token_id, *eos_token_ids, *prompt_ids, *result.canvas}
    ids.update(token for change in changes for token in change["tokens"])
    return {
        "model": model.name,
        "method": config.method,
        "settings": decode_settings(config),
        "gen_length": config.gen_length,
        "block_sizes": [branch.block_size for branch in result.branches],
        "winner_block_size": result.block_size,
        "prompt": None if tokenizer is None else tokenizer.decode(list(prompt_ids), skip_special=False),
        "prompt_tokens": list(prompt_ids),
        "mask_token_id": model.spec.mask_token_id,
        "eos_token_ids": list(eos_token_ids),
        "canvas": result.canvas,
        "text": result.text,
        "pieces": {} if tokenizer is None else _pieces(tokenizer, ids),
        "nfe": {**asdict(result.nfe), "total": result.nfe.total},
        "seconds": result.seconds,
        "stop_reason": result.stop_reason,
    }


def decode_settings(config: DecodeConfig) -> Record:
    """The options that the method has, as they were used."""
    from blockbatch.config import METHOD_OPTIONS

    names = ("gen_length", *METHOD_OPTIONS[config.method], "eos_token_ids", "stop")
    return {name: getattr(config, name) for name in names}


def _pieces(tokenizer: Tokenizer, ids: set[int]) -> dict[str, str]:
    return {str(token): tokenizer.decode([token], skip_special=False) for token in sorted(ids)}


def save_trace(path: str | os.PathLike, trace: list[Record], **header: Any) -> None:
    """Writes `{**header, "trace": trace}` as JSON; the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps({**header, "trace": trace}), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
