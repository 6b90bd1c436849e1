"""Operators of the fused multi-branch denoise step of masked diffusion language models.

The operators work on plain tensors and know no checkpoint, tokenizer or decoding method::

    import blockbatch_kernels as bbk

    packed = bbk.pack_windows(...)
    out = bbk.varlen_attention(q, k_cache, v_cache, page_table, packed.cu_seqlens_q, seqlens_k)

`operators` is the table of what each takes, writes and returns, `ops` says what they mean and picks the
backend, `reference` holds the semantics in plain torch.
"""

from blockbatch_kernels import ops
from blockbatch_kernels.library import traceable
from blockbatch_kernels.ops import backend_of
from blockbatch_kernels.policy_params import EOS_EXITS, POLICIES, QUERY_SPANS, PolicyParams
from blockbatch_kernels.shapes import CONFIDENCES, NUM_LIKELY, map_entries
from blockbatch_kernels.structs import (
    PHASES,
    STOP_REASONS,
    AttentionPlan,
    BranchState,
    PackedQueries,
    PagePool,
    PolicyEvents,
    Predictions,
    SamplingRules,
    StepPlan,
)

# Plain calls of `ops`; while PyTorch traces, calls of the registered operators.
attention_plan = traceable(ops.attention_plan)
copy_pages = traceable(ops.copy_pages)
decode_policy = traceable(ops.decode_policy)
initial_plan = traceable(ops.initial_plan)
linear = traceable(ops.linear)
linear_fp8 = traceable(ops.linear_fp8)
linear_rope_kv_write = traceable(ops.linear_rope_kv_write)
linear_rope_kv_write_fp8 = traceable(ops.linear_rope_kv_write_fp8)
linear_swiglu = traceable(ops.linear_swiglu)
linear_swiglu_fp8 = traceable(ops.linear_swiglu_fp8)
lm_head_confidence = traceable(ops.lm_head_confidence)
lm_head_confidence_fp8 = traceable(ops.lm_head_confidence_fp8)
lm_head_likely = traceable(ops.lm_head_likely)
lm_head_likely_fp8 = traceable(ops.lm_head_likely_fp8)
lm_head_sample = traceable(ops.lm_head_sample)
lm_head_sample_fp8 = traceable(ops.lm_head_sample_fp8)
pack_windows = traceable(ops.pack_windows)
quantize_rows = traceable(ops.quantize_rows)
rms_norm = traceable(ops.rms_norm)
rms_norm_fp8 = traceable(ops.rms_norm_fp8)
rope_kv_write = traceable(ops.rope_kv_write)
rope_kv_write_fp8 = traceable(ops.rope_kv_write_fp8)
share_pages = traceable(ops.share_pages)
swiglu = traceable(ops.swiglu)
swiglu_fp8 = traceable(ops.swiglu_fp8)
varlen_attention = traceable(ops.varlen_attention)
varlen_attention_fp8 = traceable(ops.varlen_attention_fp8)

__version__ = "0.1.0"

__all__ = [
    "CONFIDENCES",
    "EOS_EXITS",
    "NUM_LIKELY",
    "PHASES",
    "POLICIES",
    "QUERY_SPANS",
    "STOP_REASONS",
    "AttentionPlan",
    "BranchState",
    "PackedQueries",
    "PagePool",
    "PolicyEvents",
    "PolicyParams",
    "Predictions",
    "SamplingRules",
    "StepPlan",
    "attention_plan",
    "backend_of",
    "copy_pages",
    "decode_policy",
    "initial_plan",
    "linear",
    "linear_fp8",
    "linear_rope_kv_write",
    "linear_rope_kv_write_fp8",
    "linear_swiglu",
    "linear_swiglu_fp8",
    "lm_head_confidence",
    "lm_head_confidence_fp8",
    "lm_head_likely",
    "lm_head_likely_fp8",
    "lm_head_sample",
    "lm_head_sample_fp8",
    "map_entries",
    "pack_windows",
    "quantize_rows",
    "rms_norm",
    "rms_norm_fp8",
    "rope_kv_write",
    "rope_kv_write_fp8",
    "share_pages",
    "swiglu",
    "swiglu_fp8",
    "varlen_attention",
    "varlen_attention_fp8",
]
