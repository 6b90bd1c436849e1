"""The records of a decode: made while it runs, and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import blockbatch_kernels as bbk
    from blockbatch.config import DecodeConfig
    from blockbatch.decoding import BlockStep
    from blockbatch.kv_cache import KVCache
    from blockbatch.steps import Step

Record = dict[str, Any]


class TraceRecorder:
    """Collects the trace of each request of a session.

    Args:
        state: of the session.
        cache: of the session, to record where K and V go; None: they are left out.
        drafts: of the method: the last rows of each request, which are no branches.
    """

    def __init__(
        self, state: bbk.BranchState, cache: KVCache | None = None, drafts: Sequence[int] = ()
    ) -> None:
        self._state, self._drafts = state, tuple(drafts)
        # What the policy writes over when it writes new drafts.
        self._before = (state.tokens.clone(), state.adopted.clone()) if drafts else None
        lengths = (state.prompt_length + state.gen_length).tolist()
        self._sketcher = None
        if cache is not None:
            from blockbatch.tracing.kv_states import KVSketcher  # it needs torch, which replaying does not

            self._sketcher = KVSketcher(cache, lengths)
        self.traces: list[list[Record]] = [[] for _ in range(state.num_requests)]

    def add(self, step: Step) -> None:
        stride = self._state.num_branches
        count = stride - len(self._drafts)
        source_row, lengths, windows = step.plan.source_row, step.plan.query_lengths, step.windows
        commits = self._changes(step.events.committed, with_confidence=True)
        merges = self._changes(step.events.merged)
        sync_source = step.events.sync_source.tolist()
        for request, trace in enumerate(self.traces):
            first = request * stride
            rows = [row for row in range(first, first + count) if source_row[row] >= 0]
            if rows:
                trace.append(
                    {
                        "kind": step.phase,
                        "seconds": step.seconds,
                        "rows": [row - first for row in rows],
                        "windows": [list(windows[row]) for row in rows],
                        "queries": [lengths[row] for row in rows],
                        "packed_tokens": sum(lengths[first : first + stride]),
                        "distinct_rows": len({source_row[row] for row in rows}),
                        "commits": [],
                        "merges": [],
                        "syncs": [],
                    }
                )
                if step.open_queries is not None:
                    for name, of_rows in step.open_queries._asdict().items():
                        trace[-1][f"query_{name}"] = [of_rows[row] for row in rows]
                if self._drafts:
                    trace[-1] |= self._draft_rows(first, lengths, sync_source[first])
            if not trace:
                continue
            # A turn without a forward (every window was already complete) belongs to the forward before it.
            record = trace[-1]
            for row in range(first, first + count):
                if row in commits:
                    record["commits"].append({"branch": row - first, **commits[row]})
                if row in merges:
                    record["merges"].append({"branch": row - first, **merges[row]})
                if sync_source[row] != row and not self._drafts:
                    record["syncs"].append({"branch": row - first, "leader": sync_source[row] - first})
            if self._sketcher is not None:
                synced = (row for row in range(first, first + count) if sync_source[row] != row)
                self._add_states(record, sorted({*rows, *synced}), first)
        if self._drafts:
            self._before = self._state.tokens.clone(), self._state.adopted.clone()

    def _draft_rows(self, first: int, lengths: list[int], source: int) -> Record:
        """What the drafts of a request were in the forward, and which became the branch's next one."""
        tokens, adopted = (values[first:] for values in self._before)
        rows = []
        for draft, length in enumerate(self._drafts, start=1):
            if lengths[first + draft] == 0:
                continue
            positions = (tokens[draft] != tokens[0]).nonzero().flatten()
            rows.append(
                {
                    "length": length,
                    "queries": lengths[first + draft],
                    "positions": positions.tolist(),
                    "tokens": tokens[draft][positions].tolist(),
                }
            )
        return {
            "drafts": rows,
            "adopted": int(self._state.adopted[first] - adopted[0]),
            "adopted_length": self._drafts[source - first - 1] if source != first else None,
        }

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


class BlockRecorder:
    """Collects the records that a session of a block-causal model makes itself.

    Args:
        num_requests: of the session.
    """

    def __init__(self, num_requests: int) -> None:
        self.traces: list[list[Record]] = [[] for _ in range(num_requests)]

    def add(self, step: BlockStep) -> None:
        for request, record in step.records.items():
            self.traces[request].append(record)


class Observed(Protocol):
    """What a session shows to a recorder: its state and its cache, both read only."""

    tells_records: bool
    seconds: list[float | None]

    @property
    def state(self) -> bbk.BranchState: ...

    @property
    def cache(self) -> KVCache: ...


def open_recorder(session: Observed, config: DecodeConfig) -> TraceRecorder | BlockRecorder | None:
    """What records a session as its settings ask for; None if they ask for no trace."""
    if not config.trace:
        return None
    if session.tells_records:
        return BlockRecorder(len(session.seconds))
    return TraceRecorder(session.state, session.cache if config.trace_kv else None, config.drafts or ())


def replay(
    trace: list[Record],
    num_branches: int,
    gen_length: int,
    mask_token_id: int,
    given: Sequence[int] | None = None,
) -> list[list[int]]:
    """The canvas of every branch after the last record: [num_branches][gen_length] token ids.

    Args:
        given: the canvas before the first, of a fill; None: MASK.
    """
    canvases = [list(given or [mask_token_id] * gen_length) for _ in range(num_branches)]
    for record in trace:
        for change in record["commits"] + record["merges"]:
            for position, token in zip(change["positions"], change["tokens"], strict=True):
                canvases[change["branch"]][position] = token
        for sync in record["syncs"]:
            canvases[sync["branch"]] = list(canvases[sync["leader"]])
    return canvases
