"""Operators of the fused multi-branch denoise step of masked diffusion language models.

The operators work on plain tensors and know no checkpoint, tokenizer or decoding method::

    import blockbatch_kernels as bbk

    packed = bbk.pack_windows(...)
    out = bbk.varlen_attention(q, k_cache, v_cache, page_table, packed.cu_seqlens_q, seqlens_k)

`ops` holds the contracts (shapes, dtypes, what is written in place, errors) and picks the backend,
`reference` the semantics in plain torch.
"""

from blockbatch_kernels.ops import (
    attention_plan,
    backend_of,
    copy_pages,
    decode_policy,
    initial_plan,
    linear,
    linear_rope_kv_write,
    linear_swiglu,
    lm_head_confidence,
    pack_windows,
    rms_norm,
    rope_kv_write,
    share_pages,
    swiglu,
    varlen_attention,
)
from blockbatch_kernels.structs import (
    EOS_EXITS,
    PHASES,
    QUERY_SPANS,
    STOP_REASONS,
    AttentionPlan,
    BranchState,
    PackedQueries,
    PolicyEvents,
    PolicyParams,
    Predictions,
    StepPlan,
)

__version__ = "0.1.0"

__all__ = [
    "EOS_EXITS",
    "PHASES",
    "QUERY_SPANS",
    "STOP_REASONS",
    "AttentionPlan",
    "BranchState",
    "PackedQueries",
    "PolicyEvents",
    "PolicyParams",
    "Predictions",
    "StepPlan",
    "attention_plan",
    "backend_of",
    "copy_pages",
    "decode_policy",
    "initial_plan",
    "linear",
    "linear_rope_kv_write",
    "linear_swiglu",
    "lm_head_confidence",
    "pack_windows",
    "rms_norm",
    "rope_kv_write",
    "share_pages",
    "swiglu",
    "varlen_attention",
]
