"""The compiled backend: one thin line per operator over the extension `blockbatch_kernels._C`.

Callers go through `blockbatch_kernels.ops`, which states the contracts and checks the tensors; here the tile
is chosen, outputs are allocated, and what a kernel cannot read where it is gets copied.
"""

from blockbatch_kernels.cuda.activation import swiglu
from blockbatch_kernels.cuda.attention import attention_plan, varlen_attention, varlen_attention_fp8
from blockbatch_kernels.cuda.extension import build_info, is_available, why_unavailable
from blockbatch_kernels.cuda.gemm import linear, linear_swiglu
from blockbatch_kernels.cuda.gemm_fp8 import linear_fp8, linear_swiglu_fp8
from blockbatch_kernels.cuda.linear_rope import linear_rope_kv_write, linear_rope_kv_write_fp8
from blockbatch_kernels.cuda.lm_head import lm_head_confidence, lm_head_likely
from blockbatch_kernels.cuda.lm_head_fp8 import (
    lm_head_confidence_fp8,
    lm_head_likely_fp8,
    lm_head_sample_fp8,
)
from blockbatch_kernels.cuda.norm import rms_norm
from blockbatch_kernels.cuda.pack import pack_windows
from blockbatch_kernels.cuda.pages import copy_pages, share_pages
from blockbatch_kernels.cuda.policy import decode_policy, initial_plan
from blockbatch_kernels.cuda.quantized import quantize_rows, rms_norm_fp8, swiglu_fp8
from blockbatch_kernels.cuda.rope import rope_kv_write, rope_kv_write_fp8
from blockbatch_kernels.cuda.sampling import lm_head_sample

__all__ = [
    "attention_plan",
    "build_info",
    "copy_pages",
    "decode_policy",
    "initial_plan",
    "is_available",
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
    "why_unavailable",
]
