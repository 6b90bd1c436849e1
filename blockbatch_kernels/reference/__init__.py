"""Every operator in plain torch, on any device: the semantics that compiled versions are compared with."""

from blockbatch_kernels.reference.attention import rope_kv_write, varlen_attention
from blockbatch_kernels.reference.attention_plan import attention_plan
from blockbatch_kernels.reference.gemm import (
    linear,
    linear_rope_kv_write,
    linear_rope_kv_write_fp8,
    linear_swiglu,
)
from blockbatch_kernels.reference.kv_fp8 import rope_kv_write_fp8, varlen_attention_fp8
from blockbatch_kernels.reference.lm_head import lm_head_confidence, lm_head_likely
from blockbatch_kernels.reference.lm_head_fp8 import (
    lm_head_confidence_fp8,
    lm_head_likely_fp8,
    lm_head_sample_fp8,
)
from blockbatch_kernels.reference.norm import rms_norm, swiglu
from blockbatch_kernels.reference.pack import pack_windows
from blockbatch_kernels.reference.pages import copy_pages, share_pages
from blockbatch_kernels.reference.plan import initial_plan
from blockbatch_kernels.reference.policy import decode_policy
from blockbatch_kernels.reference.quantized import (
    linear_fp8,
    linear_swiglu_fp8,
    quantize_rows,
    rms_norm_fp8,
    swiglu_fp8,
)
from blockbatch_kernels.reference.sampling import lm_head_sample

__all__ = [
    "attention_plan",
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
