"""Where the K/V states of traces used to be; they are in `blockbatch.tracing.kv_states`."""

from blockbatch.tracing.kv_states import SKETCH_SIZE, KVSketcher

__all__ = ["SKETCH_SIZE", "KVSketcher"]
