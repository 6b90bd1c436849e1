"""The operators as `torch.ops.blockbatch_kernels.*`: what `torch.compile` and `torch.export` trace.

`traceable` decorates a function of `ops` with a second way in: where PyTorch traces, the call becomes one
registered operator, whose fake implementation says what comes out; everywhere else it stays the plain
function call that it was, without the dispatcher's cost.

Registered operators take tensors, lists of tensors, numbers and strings alone, so the records of `structs`
are taken apart on the way in and put together again inside. Their outputs are contiguous and share no memory
with anything. None has a derivative.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from blockbatch_kernels import tuning
from blockbatch_kernels.structs import (
    AttentionPlan,
    BranchState,
    PackedQueries,
    PolicyEvents,
    PolicyParams,
    Predictions,
    StepPlan,
)

NAMESPACE = "blockbatch_kernels"


def traceable(function: Callable) -> Callable:
    """Registers the operator `function` (by its name) and routes calls to it while PyTorch traces."""
    traced = _TRACED[function.__name__](function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Besides compilation, dispatch modes (fake tensors, make_fx, counters) must see one operator.
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return traced(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _register(name: str, schema: str, run: Callable, fake: Callable, mutates: Sequence[str] = ()) -> Callable:
    definition: CustomOpDef = custom_op(
        f"{NAMESPACE}::{name}", run, mutates_args=tuple(mutates), schema=schema
    )
    definition.register_fake(fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _pin(*tensors: Tensor) -> None:
    """Makes all sizes and strides but the number of rows constants of the traced program.

    Inductor takes the storage offset of a view that an operator writes for zero when the offset is an
    expression of symbolic sizes (pytorch/pytorch#198068): V would land on K. Widths of the model and sizes of
    the cache never change from step to step, so nothing is lost; the number of tokens stays symbolic.
    """
    for tensor in tensors:
        for size in (*tensor.shape[1:], *tensor.stride()):
            operator.index(size)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The fake of an operator that only writes."""


def _separate(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors contiguous, with a copy of each that is only a part of its memory."""

    def own(tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()

    return tuple(own(tensor) for tensor in tensors)


# One function for every operator: its schema, what runs, what comes out, and how a call of the public
# function becomes one of the registered operator.


def _rms_norm(function: Callable) -> Callable:
    def run(x, weight, residual, *, eps, backend=None):
        return function(x, weight, eps=eps, residual=residual, backend=backend).contiguous()

    def fake(x, weight, residual, *, eps, backend=None):
        return x.new_empty(x.shape)

    schema = "(Tensor x, Tensor weight, Tensor(a!)? residual, *, float eps, str? backend=None) -> Tensor"
    op = _register("rms_norm", schema, run, fake, mutates=["residual"])

    def traced(x, weight, *, eps, residual=None, backend=None):
        if residual is not None:
            _pin(residual)
        return op(x, weight, residual, eps=eps, backend=backend)

    return traced


def _swiglu(function: Callable) -> Callable:
    def run(gate_up, *, backend=None):
        return function(gate_up, backend=backend).contiguous()

    def fake(gate_up, *, backend=None):
        return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)

    return _register("swiglu", "(Tensor gate_up, *, str? backend=None) -> Tensor", run, fake)


def _linear(function: Callable) -> Callable:
    def run(x, weight, bias=None, *, static_weight=False, backend=None):
        return function(x, weight, bias, static_weight=static_weight, backend=backend).contiguous()

    def fake(x, weight, bias=None, *, static_weight=False, backend=None):
        return x.new_empty(x.shape[0], weight.shape[0])

    schema = (
        "(Tensor x, Tensor weight, Tensor? bias=None, *, bool static_weight=False, "
        "str? backend=None) -> Tensor"
    )
    return _register("linear", schema, run, fake)


def _linear_swiglu(function: Callable) -> Callable:
    def run(x, weight, *, static_weight=False, backend=None):
        return function(x, weight, static_weight=static_weight, backend=backend).contiguous()

    def fake(x, weight, *, static_weight=False, backend=None):
        return x.new_empty(x.shape[0], weight.shape[0] // 2)

    schema = "(Tensor x, Tensor weight, *, bool static_weight=False, str? backend=None) -> Tensor"
    return _register("linear_swiglu", schema, run, fake)


def _rope_kv_write(function: Callable) -> Callable:
    schema = (
        "(Tensor(a!) q, Tensor k, Tensor v, Tensor positions, Tensor slot_mapping, Tensor cos, Tensor sin, "
        "Tensor(b!) k_cache, Tensor(c!) v_cache, *, str? backend=None) -> ()"
    )
    op = _register("rope_kv_write", schema, function, _nothing, mutates=["q", "k_cache", "v_cache"])

    def traced(q, k, v, positions, slot_mapping, cos, sin, k_cache, v_cache, *, backend=None):
        _pin(q, k, v, k_cache, v_cache)
        operator.index(k_cache.shape[0])  # the number of pages, on which the place of v_cache may depend
        op(q, k, v, positions, slot_mapping, cos, sin, k_cache, v_cache, backend=backend)

    return traced


def _linear_rope_kv_write(function: Callable) -> Callable:
    def run(*tensors, **options):
        return function(*tensors, **options).contiguous()

    def fake(x, weight, bias, positions, slot_mapping, cos, sin, k_cache, v_cache, *, num_heads, **options):
        return x.new_empty(x.shape[0], num_heads, k_cache.shape[3])

    schema = (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor positions, Tensor slot_mapping, Tensor cos, "
        "Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, *, int num_heads, bool static_weight=False, "
        "str? backend=None) -> Tensor"
    )
    op = _register("linear_rope_kv_write", schema, run, fake, mutates=["k_cache", "v_cache"])

    def traced(x, weight, bias, positions, slot_mapping, cos, sin, k_cache, v_cache, **options):
        _pin(k_cache, v_cache)
        operator.index(k_cache.shape[0])  # as for rope_kv_write
        return op(x, weight, bias, positions, slot_mapping, cos, sin, k_cache, v_cache, **options)

    return traced


# Without the caches of these functions: sizes that are symbols cannot be looked up.
_attention_shape = tuning.attention_shape.__wrapped__
_num_processors = tuning.num_processors.__wrapped__


# Of an AttentionPlan; integers follow.
_PLAN_TENSORS = 8


def _attention_plan(function: Callable) -> Callable:
    def shape_of(
        page_table, *, page_size, num_tokens, num_heads, num_kv_heads, distinct_rows=None, compiled=False
    ):
        heads, (rows, pages_per_row) = (num_heads, num_kv_heads), page_table.shape
        rows = rows if distinct_rows is None else distinct_rows
        device = page_table.device
        units = compiled and tuning.plans_units(*heads, page_size, pages_per_row, rows, device)
        return _attention_shape(
            num_tokens, *heads, page_size, pages_per_row, _num_processors(device), units=units
        )

    def run(*tensors, **options):
        return _separate(function(*tensors, **options)[:_PLAN_TENSORS])

    def fake(page_table, cu_seqlens_q, seqlens_k, *, backend=None, **sizes):
        from blockbatch_kernels import ops  # which imports this module first

        compiled = ops.backend_of("attention_plan", page_table.device, backend) == "cuda"
        shape = shape_of(page_table, compiled=compiled, **sizes)
        rows, num_tokens, page_size = page_table.shape[0], sizes["num_tokens"], sizes["page_size"]
        return (
            page_table.new_empty(shape.max_tiles + shape.max_pieces * rows, 4),  # tiles
            page_table.new_empty(shape.max_pieces, num_tokens),  # query_order
            page_table.new_empty(shape.max_pieces, 2),  # pieces
            page_table.new_empty(num_tokens),  # token_row
            page_table.new_empty(2),  # counts
            page_table.new_empty(shape.max_units(num_tokens, rows, page_size), tuning.UNIT_INTEGERS),
            page_table.new_empty(shape.processors, tuning.STRETCH_INTEGERS),
            page_table.new_empty(2 * shape.processors),  # arrivals
        )

    schema = (
        "(Tensor page_table, Tensor cu_seqlens_q, Tensor seqlens_k, *, SymInt page_size, SymInt num_tokens, "
        "int num_heads, int num_kv_heads, SymInt? distinct_rows=None, str? backend=None) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    op = _register("attention_plan", schema, run, fake)

    def traced(page_table, cu_seqlens_q, seqlens_k, *, backend=None, **sizes):
        tensors = op(page_table, cu_seqlens_q, seqlens_k, **sizes, backend=backend)
        tile_tokens = shape_of(page_table, **sizes).tile_tokens
        return AttentionPlan(*tensors, tile_tokens, sizes["num_heads"], sizes["num_kv_heads"])

    return traced


def _varlen_attention(function: Callable) -> Callable:
    def run(*tensors, plan_sizes, **options):
        *tensors, plan = tensors
        plan = AttentionPlan(*plan, *plan_sizes) if plan else None
        return function(*tensors, plan=plan, **options).contiguous()

    def fake(q, *tensors, **options):
        return q.new_empty(q.shape)

    schema = (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor cu_seqlens_q, "
        "Tensor seqlens_k, Tensor[] plan, *, int[] plan_sizes, float? softmax_scale=None, "
        "str? backend=None) -> Tensor"
    )
    op = _register("varlen_attention", schema, run, fake)

    def traced(q, k_cache, v_cache, page_table, cu_seqlens_q, seqlens_k, *, plan=None, **options):
        tensors, sizes = ((), ()) if plan is None else (plan[:_PLAN_TENSORS], plan[_PLAN_TENSORS:])
        return op(
            q,
            k_cache,
            v_cache,
            page_table,
            cu_seqlens_q,
            seqlens_k,
            list(tensors),
            plan_sizes=list(sizes),
            **options,
        )

    return traced


def _lm_head_confidence(function: Callable) -> Callable:
    def run(hidden, weight, probe_tokens=None, *, suppress_token=None, backend=None):
        top_token, confidence, probe_probability = function(
            hidden, weight, probe_tokens=probe_tokens, suppress_token=suppress_token, backend=backend
        )
        # A registered operator returns no None.
        probe_probability = confidence.new_empty(0) if probe_probability is None else probe_probability
        return _separate((top_token, confidence, probe_probability))

    def fake(hidden, weight, probe_tokens=None, *, suppress_token=None, backend=None):
        def floats(size):
            return hidden.new_empty(size, dtype=torch.float32)

        rows = hidden.shape[0]
        top_token = hidden.new_empty(rows, dtype=torch.int32)
        return top_token, floats(rows), floats(0 if probe_tokens is None else rows)

    schema = (
        "(Tensor hidden, Tensor weight, Tensor? probe_tokens=None, *, int? suppress_token=None, "
        "str? backend=None) -> (Tensor, Tensor, Tensor)"
    )
    op = _register("lm_head_confidence", schema, run, fake)

    def traced(hidden, weight, *, probe_tokens=None, suppress_token=None, backend=None):
        top_token, confidence, probe_probability = op(
            hidden, weight, probe_tokens, suppress_token=suppress_token, backend=backend
        )
        return top_token, confidence, None if probe_tokens is None else probe_probability

    return traced


def _share_pages(function: Callable) -> Callable:
    schema = "(Tensor(a!) page_table, Tensor source_row, *, str? backend=None) -> ()"
    op = _register("share_pages", schema, function, _nothing, mutates=["page_table"])

    def traced(page_table, source_row, *, backend=None):
        _pin(page_table)
        op(page_table, source_row, backend=backend)

    return traced


def _copy_pages(function: Callable) -> Callable:
    schema = (
        "(Tensor(a!) kv_cache, Tensor(b!) page_table, Tensor write_start, Tensor write_end, *, "
        "int num_branches, str? backend=None) -> ()"
    )
    op = _register("copy_pages", schema, function, _nothing, mutates=["kv_cache", "page_table"])

    def traced(kv_cache, page_table, write_start, write_end, *, num_branches, backend=None):
        _pin(kv_cache, page_table)
        op(kv_cache, page_table, write_start, write_end, num_branches=num_branches, backend=backend)

    return traced


# A BranchState goes in as two lists: what the policy reads alone, and what it writes.
_READ = ("prompt_tokens", "prompt_length", "block_size")
_WRITTEN = tuple(field.name for field in fields(BranchState) if field.name not in _READ)
_SETTINGS = tuple(field.name for field in fields(PolicyParams))
_SETTINGS_SCHEMA = (
    "int mask_token_id, int[] eos_token_ids, float? threshold, int? steps_per_block, int leap_radius, "
    "float leap_threshold, float? tail_threshold, float merge_threshold, int sync_threshold, "
    "int? refresh_interval, str eos_exit, str query_span, int prediction_offset"
)


def _tensors(state: BranchState, names: Sequence[str]) -> list[Tensor]:
    return [getattr(state, name) for name in names]


def _state(read: Sequence[Tensor], written: Sequence[Tensor]) -> BranchState:
    return BranchState(**dict(zip(_READ, read)), **dict(zip(_WRITTEN, written)))


def _settings(params: PolicyParams) -> dict[str, Any]:
    settings = {name: getattr(params, name) for name in _SETTINGS}
    return {**settings, "eos_token_ids": list(params.eos_token_ids)}


def _params(settings: dict[str, Any]) -> PolicyParams:
    return PolicyParams(**{**settings, "eos_token_ids": tuple(settings["eos_token_ids"])})


def _pack_windows(function: Callable) -> Callable:
    def run(read, written, plan, page_table, **options):
        return _separate(function(_state(read, written), StepPlan(*plan), page_table, **options))

    def fake(read, written, plan, page_table, *, capacity, predict_capacity, **options):
        def int64(size):
            return page_table.new_empty(size, dtype=torch.int64)

        tokens = [page_table.new_empty(capacity) for _ in range(3)]  # input_ids, positions, row_index
        cu_seqlens_q = page_table.new_empty(page_table.shape[0] + 1)
        return (*tokens, cu_seqlens_q, int64(capacity), int64(predict_capacity), int64(predict_capacity))

    schema = (
        "(Tensor[] read, Tensor[] written, Tensor[] plan, Tensor page_table, *, SymInt page_size, "
        "SymInt capacity, SymInt predict_capacity, int prediction_offset=0, str? backend=None) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    op = _register("pack_windows", schema, run, fake)

    def traced(state, plan, page_table, **options):
        read, written = _tensors(state, _READ), _tensors(state, _WRITTEN)
        return PackedQueries(*op(read, written, list(plan), page_table, **options))

    return traced


_PLAN = len(StepPlan._fields)


def _fake_plan(read: Sequence[Tensor], written: Sequence[Tensor]) -> tuple[Tensor, ...]:
    tokens = _state(read, written).tokens
    rows, gen_length = tokens.shape
    row_values = [tokens.new_empty(rows) for _ in range(3)]  # query_start, query_end, source_row
    return (*row_values, tokens.new_empty(rows, gen_length, dtype=torch.bool), tokens.new_empty(5))


def _initial_plan(function: Callable) -> Callable:
    def run(read, written, *, backend=None, **settings):
        return _separate(function(_state(read, written), _params(settings), backend=backend))

    def fake(read, written, *, backend=None, **settings):
        return _fake_plan(read, written)

    def run_out(read, written, out, *, backend=None, **settings):
        function(_state(read, written), _params(settings), out=StepPlan(*out), backend=backend)

    op = _register(
        "initial_plan",
        f"(Tensor[] read, Tensor[] written, *, {_SETTINGS_SCHEMA}, str? backend=None) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        run,
        fake,
    )
    op_out = _register(
        "initial_plan_out",
        f"(Tensor[] read, Tensor[] written, Tensor(a!)[] out, *, {_SETTINGS_SCHEMA}, str? backend=None) "
        "-> ()",
        run_out,
        _nothing,
        mutates=["out"],
    )

    def traced(state, params, *, out=None, backend=None):
        read, written = _tensors(state, _READ), _tensors(state, _WRITTEN)
        if out is None:
            return StepPlan(*op(read, written, **_settings(params), backend=backend))
        op_out(read, written, list(out), **_settings(params), backend=backend)
        return out

    return traced


def _decode_policy(function: Callable) -> Callable:
    def run(read, written, predictions, plan, *, backend=None, **settings):
        step, events = function(
            _state(read, written),
            Predictions(*predictions),
            StepPlan(*plan),
            _params(settings),
            backend=backend,
        )
        return _separate((*step, *events))

    def fake(read, written, predictions, plan, *, backend=None, **settings):
        step = _fake_plan(read, written)
        committed, merged = (step[3].new_empty(step[3].shape) for _ in range(2))
        return (*step, committed, merged, step[0].new_empty(step[0].shape))

    def run_out(read, written, predictions, plan, out, *, backend=None, **settings):
        function(
            _state(read, written),
            Predictions(*predictions),
            StepPlan(*plan),
            _params(settings),
            out=(StepPlan(*out[:_PLAN]), PolicyEvents(*out[_PLAN:])),
            backend=backend,
        )

    inputs = "Tensor[] read, Tensor(a!)[] written, Tensor[] predictions, Tensor[] plan"
    op = _register(
        "decode_policy",
        f"({inputs}, *, {_SETTINGS_SCHEMA}, str? backend=None) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        run,
        fake,
        mutates=["written"],
    )
    op_out = _register(
        "decode_policy_out",
        f"({inputs}, Tensor(b!)[] out, *, {_SETTINGS_SCHEMA}, str? backend=None) -> ()",
        run_out,
        _nothing,
        mutates=["written", "out"],
    )

    def traced(state, predictions, plan, params, *, out=None, backend=None):
        args = (
            _tensors(state, _READ),
            _tensors(state, _WRITTEN),
            [tensor for tensor in predictions if tensor is not None],
            list(plan),
        )
        if out is None:
            tensors = op(*args, **_settings(params), backend=backend)
            return StepPlan(*tensors[:_PLAN]), PolicyEvents(*tensors[_PLAN:])
        op_out(*args, [*out[0], *out[1]], **_settings(params), backend=backend)
        return out

    return traced


_TRACED: dict[str, Callable[[Callable], Callable]] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "linear": _linear,
    "linear_swiglu": _linear_swiglu,
    "rope_kv_write": _rope_kv_write,
    "linear_rope_kv_write": _linear_rope_kv_write,
    "attention_plan": _attention_plan,
    "varlen_attention": _varlen_attention,
    "lm_head_confidence": _lm_head_confidence,
    "pack_windows": _pack_windows,
    "share_pages": _share_pages,
    "copy_pages": _copy_pages,
    "initial_plan": _initial_plan,
    "decode_policy": _decode_policy,
}
