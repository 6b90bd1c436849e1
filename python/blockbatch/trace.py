"""Where traces used to be; they are in `blockbatch.tracing`."""

from blockbatch.config import decode_settings
from blockbatch.tracing import (
    Record,
    TraceRecorder,
    load_trace,
    open_recorder,
    replay,
    save_trace,
    trace_header,
)

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
