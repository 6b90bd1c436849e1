"""Traces: what every forward of a decode did, as plain records that can be saved as JSON and replayed.

A trace is a list with one record for each forward of the request::

    {"kind": "block", "seconds": 0.03, "rows": [0, 1], "windows": [[4, 8], [0, 8]], "queries": [4, 8],
     "packed_tokens": 12, "distinct_rows": 2,
     "commits": [{"branch": 0, "positions": [4], "tokens": [17], "confidence": [0.98]}],
     "merges": [{"branch": 1, "positions": [2], "tokens": [9]}],
     "syncs": [{"branch": 1, "leader": 0}]}

`rows` are the branches that the forward served (init and refresh compute equal ones once: `distinct_rows`),
`windows` their windows during it, in positions of the generation region, `queries` the positions that were
computed for each (0: it took another row's result), `packed_tokens` those of the whole forward. Within a
record commits come first, then merges, then syncs.

A block step with open queries also says, for each of `rows`, which positions it computed, and which of them
because their K/V was that of another token; -1 is the last position of the prompt::

    "query_positions": [[-1, 4, 6], [0, 5]], "query_stale": [[4], [0]]

With drafts the only branch is 0. Its record also holds the drafts that the forward computed beside it, with
what each holds that the branch did not::

    "drafts": [{"length": 1, "queries": 32, "positions": [7], "tokens": [17]}],
    "adopted": 1, "adopted_length": 1

`adopted` of them were the branch's next forwards, the last of these that of `adopted_length` (None: there is
none); the commits are those of all these forwards together.

Of a block-causal model the kind is "prefill", "denoise", "store", "fused" (a store with the next block's
first denoise forward), or Fast-dLLM v2's "block" and "sub". A record then also says what went in::

    "stored": 64, "input_ids": [17, 126, 126, 126]

`stored` positions were final before the forward, `input_ids` are all its tokens, row by row. A sync at the
end of a block is a branch that goes on from the winner's ids.

Files from before open queries and drafts lack these fields, and `queries`.

With K/V (`DecodeConfig(trace_kv=True)`) a record also holds the cache states of the branches that it changed:
``"kv": [{"branches": [0, 2], "state": [...]}]``, branches with the same cache together, the states as
`blockbatch.tracing.kv_states` makes them. Of several states of a branch in one record the last holds.
"""

from blockbatch.tracing.file import load_trace, phase, save_trace
from blockbatch.tracing.header import trace_header
from blockbatch.tracing.record import Record, TraceRecorder, open_recorder, replay

__all__ = [
    "Record",
    "TraceRecorder",
    "load_trace",
    "open_recorder",
    "phase",
    "replay",
    "save_trace",
    "trace_header",
]
