"""Which compiled backend runs an operator by default, and sizes that one refuses."""

from __future__ import annotations

from blockbatch_kernels.tuning.attention import MAX_HEAD_DIM, cuda_attention_is_faster

# Sizes beyond which a compiled backend refuses an operator.
_POLICY_LIMITS = {"cuda": {"num_branches": 32, "num_eos_tokens": 32}}
_LIMITS: dict[str, dict[str, dict[str, int]]] = {
    "varlen_attention": {"cuda": {"head_dim": MAX_HEAD_DIM}, "triton": {"head_dim": MAX_HEAD_DIM}},
    "initial_plan": _POLICY_LIMITS,
    "decode_policy": _POLICY_LIMITS,
    "copy_pages": {"cuda": {"num_branches": 32}},
}
# Kernels between two products wait on the device for their predecessor instead of being launched after it.
PROGRAMMATIC_LAUNCH = True


def preference(op: str, **sizes: int) -> tuple[str, ...]:
    """The compiled backends that take `op` in these sizes, fastest first. A size not given is no obstacle."""
    order = ("cuda", "triton")
    if op == "varlen_attention" and not cuda_attention_is_faster(**sizes):
        order = ("triton", "cuda")
    limits = _LIMITS.get(op, {})
    return tuple(
        name
        for name in order
        if all(sizes.get(size, 0) <= most for size, most in limits.get(name, {}).items())
    )
