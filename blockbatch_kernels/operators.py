"""The table of operators: what each takes, writes and returns.

Checks (`checks`), registration with PyTorch (`library`) and the contract tests read it. What a row cannot
say, such as a number of heads that must divide another, stands in `ops`; what an operator means stands in
its docstring there.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from blockbatch_kernels import tuning
from blockbatch_kernels.contracts import Operator, RecordArg, Result, Scalar, SettingsArg, TensorArg
from blockbatch_kernels.policy_params import PolicyParams
from blockbatch_kernels.shapes import E4M3, NUM_LIKELY
from blockbatch_kernels.structs import (
    AttentionPlan,
    BranchState,
    PackedQueries,
    PagePool,
    PolicyEvents,
    Predictions,
    SamplingRules,
    StepPlan,
)

# Of everything that a model computes with.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT = (torch.float32,)
INT = (torch.int32,)
LONG = (torch.int64,)
FP8 = (E4M3,)


def _attention_plan_symbols(
    sizes: dict[str, int], device: torch.device, backend: str | None
) -> dict[str, int]:
    """Sizes of a plan, which follow from how the work may be cut."""
    heads, page_size = (sizes["num_heads"], sizes["num_kv_heads"]), sizes["page_size"]
    rows, pages_per_row = sizes["rows"], sizes["pages_per_row"]
    distinct_rows = rows if sizes.get("distinct_rows") is None else sizes["distinct_rows"]
    # Without the cache of attention_shape: sizes that are symbols cannot be looked up.
    processors = tuning.num_processors(device)
    shape = tuning.attention_shape.__wrapped__(
        sizes["num_tokens"],
        *heads,
        page_size,
        pages_per_row,
        processors,
        fixed_cut=bool(sizes.get("fixed_cut")),
        units=backend == "cuda"
        and not sizes.get("fixed_cut")
        and tuning.plans_units(
            *heads, page_size, pages_per_row, distinct_rows, device, num_tokens=sizes["num_tokens"]
        ),
    )
    return dict(
        tokens=sizes["num_tokens"],
        max_tiles=shape.max_tiles + shape.max_pieces * rows,
        max_pieces=shape.max_pieces,
        max_units=shape.max_units(sizes["num_tokens"], rows, page_size),
        processors=shape.processors,
        tile_tokens=shape.tile_tokens,
    )


# Of the LM head: hidden states and weights, in 16 or 32 bits or in e4m3; what else it takes; what it says.
_HEAD = (
    TensorArg("hidden", "predictions dim", FLOATS),
    TensorArg("weight", "vocabulary dim", "hidden"),
)
_HEAD_FP8 = (
    TensorArg("hidden", "predictions dim", FLOATS),
    TensorArg("weight", "vocabulary dim", FP8),
    TensorArg("weight_scale", "vocabulary", FLOAT),
)
_SUPPRESSED = Scalar("suppress_token", int, None)
_PROBED = (TensorArg("probe_tokens", "predictions", INT, optional=True), _SUPPRESSED)
_DRAWN = (
    RecordArg("rules", SamplingRules),
    TensorArg("request", "predictions", INT),
    TensorArg("positions", "predictions", INT),
)
_CONFIDENCE = Scalar("confidence", str, "probability")
_PREDICTED = (
    Result("predictions", torch.int32),
    Result("predictions", torch.float32),
    Result("predictions", torch.float32, given="probe_tokens"),
)
_LIKELY = (
    Result("predictions", torch.int32),
    Result("predictions", torch.float32),
    Result(f"predictions {NUM_LIKELY}", torch.int32),
    Result(f"predictions {NUM_LIKELY}", torch.float32),
)

_ROPE = (
    TensorArg("positions", "tokens", INT),
    TensorArg("slot_mapping", "tokens", LONG),
    TensorArg("cos", "max_positions head_dim/2", FLOAT),
    TensorArg("sin", "max_positions head_dim/2", FLOAT),
)


_SCALES = (TensorArg("k_scale", "num_kv_heads", FLOAT), TensorArg("v_scale", "num_kv_heads", FLOAT))


# Of a cache in e4m3; a cache in the dtype of the model has none.
_OPTIONAL_SCALES = tuple(replace(scale, optional=True) for scale in _SCALES)


def _caches(dtype: str | tuple[torch.dtype, ...], **options) -> tuple[TensorArg, TensorArg]:
    shape = "pages page_size num_kv_heads head_dim"
    return TensorArg("k_cache", shape, dtype, **options), TensorArg("v_cache", shape, dtype, **options)


def _any_caches(**options) -> tuple[TensorArg, TensorArg]:
    """In e4m3, or in the dtype of the model, which `ops` compares with that of the results."""
    k_cache, v_cache = _caches((*FLOATS, E4M3), **options)
    return k_cache, replace(v_cache, dtype="k_cache")


_TABLE = (
    Operator(
        "rms_norm",
        (
            TensorArg("x", "tokens dim", FLOATS),
            TensorArg("weight", "dim", "x"),
            Scalar("eps", float),
            TensorArg("residual", "tokens dim", "x", optional=True, written=True, pinned=True),
        ),
        (Result("tokens dim", "x"),),
    ),
    Operator(
        "swiglu",
        (TensorArg("gate_up", "tokens 2*intermediate", FLOATS),),
        (Result("tokens intermediate", "gate_up"),),
    ),
    Operator(
        "linear",
        (
            TensorArg("x", "tokens in_features", FLOATS),
            TensorArg("weight", "out_features in_features", "x"),
            TensorArg("bias", "out_features", "x", optional=True),
            Scalar("static_weight", bool, False),
        ),
        (Result("tokens out_features", "x"),),
    ),
    Operator(
        "linear_swiglu",
        (
            TensorArg("x", "tokens in_features", FLOATS),
            TensorArg("weight", "2*intermediate in_features", "x"),
            Scalar("static_weight", bool, False),
        ),
        (Result("tokens intermediate", "x"),),
    ),
    Operator(
        "quantize_rows",
        (TensorArg("x", "tokens dim", FLOATS),),
        (Result("tokens dim", E4M3), Result("tokens", torch.float32)),
    ),
    Operator(
        "rms_norm_fp8",
        (
            TensorArg("x", "tokens dim", FLOATS),
            TensorArg("weight", "dim", "x"),
            Scalar("eps", float),
            TensorArg("residual", "tokens dim", "x", optional=True, written=True, pinned=True),
        ),
        (Result("tokens dim", E4M3), Result("tokens", torch.float32)),
    ),
    Operator(
        "swiglu_fp8",
        (TensorArg("gate_up", "tokens 2*intermediate", FLOATS),),
        (Result("tokens intermediate", E4M3), Result("tokens", torch.float32)),
    ),
    Operator(
        "linear_fp8",
        (
            TensorArg("x", "tokens in_features", FP8),
            TensorArg("x_scale", "tokens", FLOAT),
            TensorArg("weight", "out_features in_features", FP8),
            TensorArg("weight_scale", "out_features", FLOAT),
            TensorArg("bias", "out_features", FLOATS, optional=True),
            Scalar("out_dtype", torch.dtype),
            Scalar("static_weight", bool, False),
        ),
        (Result("tokens out_features", "out_dtype"),),
    ),
    Operator(
        "linear_swiglu_fp8",
        (
            TensorArg("x", "tokens in_features", FP8),
            TensorArg("x_scale", "tokens", FLOAT),
            TensorArg("weight", "weight_rows in_features", FP8),
            TensorArg("weight_scale", "weight_rows", FLOAT),
            Scalar("out_dtype", torch.dtype),
            Scalar("static_weight", bool, False),
        ),
        (Result("tokens weight_rows/2", E4M3), Result("tokens", torch.float32)),
    ),
    Operator(
        "rope_kv_write",
        (
            TensorArg("q", "tokens num_heads head_dim", FLOATS, written=True, pinned=True),
            TensorArg("k", "tokens num_kv_heads head_dim", "q", pinned=True),
            TensorArg("v", "tokens num_kv_heads head_dim", "q", pinned=True),
            *_ROPE,
            *_caches("q", written=True, pinned="whole"),
            TensorArg("q_norm", "head_dim", "q", optional=True),
            TensorArg("k_norm", "head_dim", "q", optional=True),
            Scalar("norm_eps", float, 1e-6),
        ),
    ),
    Operator(
        "rope_kv_write_fp8",
        (
            TensorArg("q", "tokens num_heads head_dim", FLOATS, written=True, pinned=True),
            TensorArg("k", "tokens num_kv_heads head_dim", "q", pinned=True),
            TensorArg("v", "tokens num_kv_heads head_dim", "q", pinned=True),
            *_ROPE,
            *_caches(FP8, written=True, pinned="whole"),
            *_SCALES,
            TensorArg("q_norm", "head_dim", "q", optional=True),
            TensorArg("k_norm", "head_dim", "q", optional=True),
            Scalar("norm_eps", float, 1e-6),
        ),
    ),
    Operator(
        "linear_rope_kv_write",
        (
            TensorArg("x", "tokens in_features", FLOATS),
            TensorArg("weight", "out_features in_features", "x"),
            TensorArg("bias", "out_features", "x", optional=True),
            *_ROPE,
            *_any_caches(written=True, pinned="whole"),
            *_OPTIONAL_SCALES,
            Scalar("num_heads", int, least=1),
            Scalar("static_weight", bool, False),
        ),
        (Result("tokens num_heads head_dim", "x"),),
    ),
    Operator(
        "linear_rope_kv_write_fp8",
        (
            TensorArg("x", "tokens in_features", FP8),
            TensorArg("x_scale", "tokens", FLOAT),
            TensorArg("weight", "out_features in_features", FP8),
            TensorArg("weight_scale", "out_features", FLOAT),
            TensorArg("bias", "out_features", FLOATS, optional=True),
            *_ROPE,
            *_any_caches(written=True, pinned="whole"),
            *_OPTIONAL_SCALES,
            Scalar("num_heads", int, least=1),
            Scalar("out_dtype", torch.dtype),
            Scalar("static_weight", bool, False),
        ),
        (Result("tokens num_heads head_dim", "out_dtype"),),
    ),
    Operator(
        "attention_plan",
        (
            TensorArg("page_table", "rows pages_per_row", INT),
            TensorArg("cu_seqlens_q", "rows+1", INT),
            TensorArg("seqlens_k", "rows", INT),
            Scalar("page_size", int, least=1, symbolic=True),
            Scalar("num_tokens", int, least=0, symbolic=True),
            Scalar("num_heads", int, least=1),
            Scalar("num_kv_heads", int),
            Scalar("distinct_rows", int, None, least=0, symbolic=True),
            Scalar("fixed_cut", bool, False),
            Scalar("num_branches", int, None, least=1),
        ),
        (AttentionPlan,),
        symbols=_attention_plan_symbols,
    ),
    Operator(
        "varlen_attention",
        (
            TensorArg("q", "tokens num_heads head_dim", FLOATS),
            *_caches("q"),
            TensorArg("page_table", "rows pages_per_row", INT),
            TensorArg("cu_seqlens_q", "rows+1", INT),
            TensorArg("seqlens_k", "rows", INT),
            Scalar("softmax_scale", float, None),
            RecordArg("plan", AttentionPlan, optional=True),
        ),
        (Result("tokens num_heads head_dim", "q"),),
    ),
    Operator(
        "varlen_attention_fp8",
        (
            TensorArg("q", "tokens num_heads head_dim", FLOATS),
            *_caches(FP8),
            *_SCALES,
            TensorArg("page_table", "rows pages_per_row", INT),
            TensorArg("cu_seqlens_q", "rows+1", INT),
            TensorArg("seqlens_k", "rows", INT),
            Scalar("softmax_scale", float, None),
            RecordArg("plan", AttentionPlan, optional=True),
        ),
        (Result("tokens num_heads head_dim", "q"),),
    ),
    Operator("lm_head_confidence", (*_HEAD, *_PROBED), _PREDICTED),
    Operator("lm_head_confidence_fp8", (*_HEAD_FP8, *_PROBED), _PREDICTED),
    Operator("lm_head_likely", (*_HEAD, _SUPPRESSED), _LIKELY),
    Operator("lm_head_likely_fp8", (*_HEAD_FP8, _SUPPRESSED), _LIKELY),
    Operator("lm_head_sample", (*_HEAD, *_DRAWN, *_PROBED, _CONFIDENCE), _PREDICTED),
    Operator("lm_head_sample_fp8", (*_HEAD_FP8, *_DRAWN, *_PROBED, _CONFIDENCE), _PREDICTED),
    Operator(
        "pack_windows",
        (
            RecordArg("state", BranchState),
            RecordArg("plan", StepPlan),
            TensorArg("page_table", "rows pages_per_row", INT),
            Scalar("page_size", int, least=1, symbolic=True),
            Scalar("capacity", int, least=0, symbolic=True),
            Scalar("predict_capacity", int, least=0, symbolic=True),
            Scalar("prediction_offset", int, 0),
            Scalar("scattered", bool, False),
        ),
        (PackedQueries,),
    ),
    Operator(
        "share_pages",
        (
            TensorArg("page_table", "rows pages_per_row", INT, written=True, pinned=True),
            TensorArg("source_row", "rows", INT),
        ),
    ),
    Operator(
        "copy_pages",
        (
            TensorArg(
                "kv_cache",
                "layers 2 pages page_size num_kv_heads head_dim",
                (*FLOATS, E4M3),
                written=True,
                pinned=True,
            ),
            TensorArg("page_table", "rows pages_per_row", INT, written=True, pinned=True),
            TensorArg("write_start", "rows", INT),
            TensorArg("write_end", "rows", INT),
            Scalar("num_branches", int),
            TensorArg("write_positions", "rows *", INT, optional=True),
            RecordArg("pool", PagePool, optional=True, written=True),
        ),
    ),
    Operator(
        "initial_plan",
        (
            RecordArg("state", BranchState),
            SettingsArg("params", PolicyParams),
            RecordArg("out", StepPlan, optional=True, written=True),
        ),
        (StepPlan,),
    ),
    Operator(
        "decode_policy",
        (
            RecordArg("state", BranchState, written=True),
            RecordArg("predictions", Predictions),
            RecordArg("plan", StepPlan),
            SettingsArg("params", PolicyParams),
            RecordArg("out", (StepPlan, PolicyEvents), optional=True, written=True),
        ),
        (StepPlan, PolicyEvents),
    ),
)

OPERATORS = {operator.name: operator for operator in _TABLE}
