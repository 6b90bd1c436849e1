"""Where trace files used to be; they are in `blockbatch.tracing.file`."""

from blockbatch.tracing.file import KINDS, check_trace, load_trace

__all__ = ["KINDS", "check_trace", "load_trace"]
