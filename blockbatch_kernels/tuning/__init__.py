"""Launch choices and default backends as tables: each row names the result in bench/results that decides it.

`rows` is written by `python bench/tuning_rows.py --write` from these results.
"""

from blockbatch_kernels.shapes import STRETCH_INTEGERS, UNIT_INTEGERS, UNIT_KEYS
from blockbatch_kernels.tuning.attention import (
    MAX_HEAD_DIM,
    MAX_PARTIALS,
    MIN_STRETCH_UNITS,
    AttentionShape,
    attention_shape,
    plans_units,
)
from blockbatch_kernels.tuning.backends import PROGRAMMATIC_LAUNCH, preference
from blockbatch_kernels.tuning.devices import device_kind, num_processors
from blockbatch_kernels.tuning.gemm import (
    GATED_TILES,
    LINEAR_TILES,
    LM_HEAD_LOGITS_BYTES,
    LM_HEAD_TILES,
    ROTATED_TILES,
    UNMEASURED_TILES,
    candidates,
    linear_parts,
    linear_rule,
    lm_head_tile,
    name_of,
)
from blockbatch_kernels.tuning.gemm_fp8 import FP8_PIECE, LINEAR_FP8_TILES, fp8_candidates, linear_fp8_tile
from blockbatch_kernels.tuning.records import H100, DeviceKind, LinearPart, LinearTile
from blockbatch_kernels.tuning.triton import (
    TRITON_ATTENTION_PROGRAMS,
    TRITON_COMBINE,
    TRITON_ELEMENTWISE,
    TRITON_FP8_TOKENS,
    TRITON_LM_HEAD,
    TRITON_ROPE,
    TritonAttention,
    TritonBlock,
    TritonCombine,
    TritonLinearFp8,
    TritonLmHead,
    triton_attention,
    triton_linear_fp8,
    triton_row_warps,
)

__all__ = [
    "FP8_PIECE",
    "GATED_TILES",
    "H100",
    "LINEAR_FP8_TILES",
    "LINEAR_TILES",
    "LM_HEAD_LOGITS_BYTES",
    "LM_HEAD_TILES",
    "MAX_HEAD_DIM",
    "MAX_PARTIALS",
    "MIN_STRETCH_UNITS",
    "PROGRAMMATIC_LAUNCH",
    "ROTATED_TILES",
    "STRETCH_INTEGERS",
    "TRITON_ATTENTION_PROGRAMS",
    "TRITON_COMBINE",
    "TRITON_ELEMENTWISE",
    "TRITON_FP8_TOKENS",
    "TRITON_LM_HEAD",
    "TRITON_ROPE",
    "UNIT_INTEGERS",
    "UNIT_KEYS",
    "UNMEASURED_TILES",
    "AttentionShape",
    "DeviceKind",
    "LinearPart",
    "LinearTile",
    "TritonAttention",
    "TritonBlock",
    "TritonCombine",
    "TritonLinearFp8",
    "TritonLmHead",
    "attention_shape",
    "candidates",
    "device_kind",
    "fp8_candidates",
    "linear_fp8_tile",
    "linear_parts",
    "linear_rule",
    "lm_head_tile",
    "name_of",
    "num_processors",
    "plans_units",
    "preference",
    "triton_attention",
    "triton_linear_fp8",
    "triton_row_warps",
]
