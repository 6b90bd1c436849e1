"""The operators: one contract each, whatever computes them.

Every function checks its arguments once, picks the backend and calls it. `backend=None` takes the fastest
backend that runs the given tensors; a named one that cannot run them raises and says why. What an operator
changes in place is called *written*. Integer results are the same bits on every backend.

Raises, in every operator: `ValueError` for a wrong shape, value or device, `TypeError` for a wrong dtype,
`RuntimeError` for a named backend that cannot run. Each message names the argument, what was expected and
what came.
"""

from blockbatch_kernels.ops.attention import attention_plan, varlen_attention
from blockbatch_kernels.ops.dispatch import BACKENDS, backend_of
from blockbatch_kernels.ops.kv_fp8 import rope_kv_write_fp8, varlen_attention_fp8
from blockbatch_kernels.ops.layer import (
    linear,
    linear_rope_kv_write,
    linear_swiglu,
    lm_head_confidence,
    lm_head_likely,
    rms_norm,
    rope_kv_write,
    swiglu,
)
from blockbatch_kernels.ops.linear_rope import linear_rope_kv_write_fp8
from blockbatch_kernels.ops.lm_head_fp8 import (
    lm_head_confidence_fp8,
    lm_head_likely_fp8,
    lm_head_sample_fp8,
)
from blockbatch_kernels.ops.quantized import (
    linear_fp8,
    linear_swiglu_fp8,
    quantize_rows,
    rms_norm_fp8,
    swiglu_fp8,
)
from blockbatch_kernels.ops.sampling import lm_head_sample
from blockbatch_kernels.ops.step import (
    copy_pages,
    decode_policy,
    initial_plan,
    pack_windows,
    share_pages,
)

__all__ = [
    "BACKENDS",
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
