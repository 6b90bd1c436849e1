"""Which compiled backend runs an operator by default, and sizes that one refuses."""

from __future__ import annotations

from blockbatch_kernels.tuning.attention import MAX_HEAD_DIM, cuda_attention_is_faster
from blockbatch_kernels.tuning.records import BackendRow

# Sizes beyond which a compiled backend refuses an operator.
_POLICY_LIMITS = {"cuda": {"num_branches": 32, "num_eos_tokens": 32}}
_LIMITS: dict[str, dict[str, dict[str, int]]] = {
    "varlen_attention": {"cuda": {"head_dim": MAX_HEAD_DIM}, "triton": {"head_dim": MAX_HEAD_DIM}},
    "varlen_attention_fp8": {"cuda": {"head_dim": MAX_HEAD_DIM}, "triton": {"head_dim": MAX_HEAD_DIM}},
    "initial_plan": _POLICY_LIMITS,
    "decode_policy": _POLICY_LIMITS,
    "copy_pages": {"cuda": {"num_branches": 32}},
}
# Kernels between two products wait on the device for their predecessor instead of being launched after it.
PROGRAMMATIC_LAUNCH = True

_CUDA_FIRST = ("cuda", "triton")
# CUDA C++ stays in front where Triton wins less than this a call: it needs no compiler where it runs, and its
# kernels wait on the device for their predecessor, which the time of a call alone does not show.
WORTH_US = 1.0
# Every operator that was measured but attention, which goes by its sizes. A plan's kernel is the one whose
# attention it is for: it is made once and read by every layer.
DEFAULTS = (
    BackendRow("rms_norm", _CUDA_FIRST, "ops.json: rms_norm"),
    BackendRow("swiglu", _CUDA_FIRST, "ops.json: swiglu"),
    BackendRow("rope_kv_write", _CUDA_FIRST, "ops.json: rope_kv_write"),
    BackendRow("linear_rope_kv_write", _CUDA_FIRST, "ops_rotated.json: linear_rope_kv_write"),
    BackendRow("lm_head_confidence", _CUDA_FIRST, "ops.json: lm_head_confidence"),
    BackendRow("lm_head_sample", ("triton", "cuda"), "ops_lm_head.json: lm_head_sample"),
    BackendRow("pack_windows", _CUDA_FIRST, "ops.json: pack_windows"),
    BackendRow("decode_policy", _CUDA_FIRST, "ops.json: decode_policy"),
    BackendRow("attention_plan", _CUDA_FIRST, "ops.json: attention_plan"),
    BackendRow("share_pages", _CUDA_FIRST, "ops.json: share_pages"),
    BackendRow("copy_pages", _CUDA_FIRST, "ops.json: copy_pages"),
)
_ORDER = {row.op: row.order for row in DEFAULTS}


def preference(op: str, **sizes: int) -> tuple[str, ...]:
    """The compiled backends that take `op` in these sizes, fastest first. A size not given is no obstacle."""
    order = _ORDER.get(op, _CUDA_FIRST)
    e4m3 = op == "varlen_attention_fp8"
    if (e4m3 or op == "varlen_attention") and not cuda_attention_is_faster(**sizes, e4m3=e4m3):
        order = ("triton", "cuda")
    limits = _LIMITS.get(op)
    if limits is None:
        return order
    kept = []
    for name in order:  # no comprehensions: every layer's attention asks
        for size, most in limits.get(name, {}).items():
            if sizes.get(size, 0) > most:
                break
        else:
            kept.append(name)
    return tuple(kept)
