"""The operators: one contract each, whatever computes them.

Every function checks its arguments once, picks the backend and calls it. `backend=None` takes the fastest
backend that runs the given tensors; a named one that cannot run them raises and says why. What an operator
changes in place is called *written*. Integer results are the same bits on every backend.

Raises, in every operator: `ValueError` for a wrong shape, value or device, `TypeError` for a wrong dtype,
`RuntimeError` for a named backend that cannot run. Each message names the argument, what was expected and
what came.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from blockbatch_kernels import cuda, reference, triton, tuning
from blockbatch_kernels.checks import check_events, check_plan, check_predictions, check_state
from blockbatch_kernels.checks import check_tensor as _check
from blockbatch_kernels.library import traceable
from blockbatch_kernels.structs import (
    EOS_EXITS,
    QUERY_SPANS,
    AttentionPlan,
    BranchState,
    PackedQueries,
    PolicyEvents,
    PolicyParams,
    Predictions,
    StepPlan,
)

_MODULES = {"reference": reference, "triton": triton, "cuda": cuda}
BACKENDS = tuple(_MODULES)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _backend(
    name: str | None, op: str, example: Tensor, *, excluded: tuple[str, ...] = (), **sizes: int
) -> ModuleType:
    """The module that runs `op` on tensors like `example`; `tuning.preference` has the order.

    excluded: backends that refuse the call for another reason than the sizes, passed over by default.
    """
    if name is None:
        for module in tuning.preference(op, **sizes) if example.is_cuda else ():
            if module in excluded or not hasattr(_MODULES[module], op):
                continue
            if _MODULES[module].why_unavailable(example.device) is None:
                return _MODULES[module]
        return reference
    if name not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(BACKENDS)}, got {name!r}")
    module = _MODULES[name]
    if not hasattr(module, op):
        raise RuntimeError(f"backend: {op} has no {name} version")
    if name == "reference":
        return reference
    reason = module.why_unavailable(example.device)
    if name == "cuda" and not example.is_cuda:
        reason = "the tensors are not on a GPU"
    if reason is not None:
        raise RuntimeError(f"backend: {name} cannot run {op}: {reason}")
    return module


def backend_of(op: str, device: torch.device, backend: str | None = None, **sizes: int) -> str:
    """Name of the backend that runs the operator `op` on tensors of `device`; raises as `op` would.

    Args:
        sizes: what the default choice of some operators depends on, as far as it is known: num_tokens,
            num_keys, head_dim and element_size of `varlen_attention`; num_branches of `copy_pages`, and with
            num_eos_tokens of `initial_plan` and `decode_policy`.
    """
    module = _backend(backend, op, torch.empty(0, device=device), **sizes)
    return next(name for name, candidate in _MODULES.items() if candidate is module)


@traceable
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Root mean square norm over the last dimension, with the residual add in front of it fused.

    Equivalent to `residual += x; x = residual` (if given), then `weight * (x / rms(x)).to(x.dtype)`, in fp32
    up to the rounding before the weight.

    Args:
        x: [tokens, dim], fp32, bf16 or fp16.
        weight: [dim], same dtype.
        eps: added to the mean square.
        residual: [tokens, dim], same dtype; *written*: the sum, which the next layer adds to.

    Returns:
        [tokens, dim], same dtype.
    """
    _check("x", x, (None, None), _FLOATS)
    _check("weight", weight, (x.shape[1],), (x.dtype,), x.device)
    if residual is not None:
        _check("residual", residual, tuple(x.shape), (x.dtype,), x.device)
    return _backend(backend, "rms_norm", x).rms_norm(x, weight, eps=eps, residual=residual)


@traceable
def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """`silu(gate) * up` in fp32, rounded once.

    Args:
        gate_up: [tokens, 2 * intermediate], gate first; fp32, bf16 or fp16.

    Returns:
        [tokens, intermediate], same dtype.
    """
    _check("gate_up", gate_up, (None, None), _FLOATS)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension (gate and up), got {gate_up.shape[1]}")
    return _backend(backend, "swiglu", gate_up).swiglu(gate_up)


@traceable
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    static_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with sums in fp32, rounded once: torch's product, but for packs of few tokens.

    On compute capability 9.0 up to 256 tokens in bf16 or fp16 run on a kernel of our own where it is faster
    (`tuning.linear_parts` says for which sizes; rows of the weight must be aligned to 16 bytes); all else
    goes to torch. Which of the two computes depends on sizes and alignment alone.

    Args:
        x: [tokens, in], fp32, bf16 or fp16.
        weight: [out, in], same dtype.
        bias: [out], same dtype.
        static_weight: a promise that no work which may still be running writes `weight`: it is then read
            ahead of the end of the kernels in front.

    Returns:
        [tokens, out], same dtype.
    """
    _check_product(x, weight, bias, static_weight)
    module = _backend(backend, "linear", x)
    return module.linear(x, weight, bias, static_weight=static_weight)


@traceable
def linear_swiglu(
    x: Tensor, weight: Tensor, *, static_weight: bool = False, backend: str | None = None
) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`: the product and `swiglu` in one where that is faster.

    Where the kernel of our own serves the sizes (see `linear`; up to 192 tokens and more), the product is not
    rounded before the activation; elsewhere it is, as by `swiglu(linear(x, weight))`.

    Args:
        x: [tokens, in], fp32, bf16 or fp16.
        weight: [2 * intermediate, in], gate rows first, same dtype.
        static_weight: see `linear`.

    Returns:
        [tokens, intermediate], same dtype.
    """
    _check_product(x, weight, None, static_weight)
    if weight.shape[0] % 2:
        raise ValueError(f"weight: expected an even number of rows (gate and up), got {weight.shape[0]}")
    module = _backend(backend, "linear_swiglu", x)
    return module.linear_swiglu(x, weight, static_weight=static_weight)


def _check_product(x: Tensor, weight: Tensor, bias: Tensor | None, static_weight: bool) -> None:
    _check("x", x, (None, None), _FLOATS)
    _check("weight", weight, (None, x.shape[1]), (x.dtype,), x.device)
    if bias is not None:
        _check("bias", bias, (weight.shape[0],), (x.dtype,), x.device)
    if not isinstance(static_weight, bool):
        raise TypeError(f"static_weight: expected True or False, got {static_weight!r}")


@traceable
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Rotates q and k at their positions (halves, in fp32) and stores k and v in their cache slots.

    Args:
        q: [tokens, num_heads, head_dim]; *written*: rotated.
        k, v: [tokens, num_kv_heads, head_dim].
        positions: [tokens] int32.
        slot_mapping: [tokens] int64, page * page_size + offset; -1: not stored.
        cos, sin: [max positions, head_dim / 2] fp32.
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim]; *written* at the slots, k after
            rotation.
    """
    _check("q", q, (None, None, None), _FLOATS)
    tokens, _, head_dim = q.shape
    _check("k", k, (tokens, None, head_dim), (q.dtype,), q.device)
    _check("v", v, tuple(k.shape), (q.dtype,), q.device)
    _check_rope(q, positions, slot_mapping, cos, sin, k_cache, v_cache, heads=(k.shape[1], head_dim))
    module = _backend(backend, "rope_kv_write", q)
    module.rope_kv_write(q, k, v, positions, slot_mapping, cos, sin, k_cache, v_cache)


@traceable
def linear_rope_kv_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    num_heads: int,
    static_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The heads of q, k and v from one product, then `rope_kv_write` on them; returns q.

    The results are those of the two operators bit for bit: the product is rounded before the rotation. Where
    the kernel of our own serves the sizes (see `linear`; heads of 64 or 128 elements), all happens in one
    launch; elsewhere it is the two operators.

    Args:
        x: [tokens, in], fp32, bf16 or fp16.
        weight: [(num_heads + 2 * num_kv_heads) * head_dim, in], the rows of q first, then of k, then of v;
            same dtype.
        bias: [(num_heads + 2 * num_kv_heads) * head_dim], same dtype; None: none.
        positions: [tokens] int32.
        slot_mapping: [tokens] int64, page * page_size + offset; -1: not stored.
        cos, sin: [max positions, head_dim / 2] fp32.
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim], same dtype as x; *written* at the slots,
            k after rotation.
        num_heads: of q.
        static_weight: see `linear`.

    Returns:
        [tokens, num_heads, head_dim], q after rotation, same dtype; may be a view of the whole product.
    """
    _check_product(x, weight, bias, static_weight)
    _check_rope(x, positions, slot_mapping, cos, sin, k_cache, v_cache)
    if not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {num_heads!r}")
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    num_kv_heads, head_dim = k_cache.shape[2:]
    rows = (num_heads + 2 * num_kv_heads) * head_dim
    if weight.shape[0] != rows:
        raise ValueError(
            f"weight: expected {rows} rows ({num_heads} heads of q and {num_kv_heads} each of k and v, of "
            f"{head_dim}), got {weight.shape[0]}"
        )
    module = _backend(backend, "linear_rope_kv_write", x)
    return module.linear_rope_kv_write(
        x,
        weight,
        bias,
        positions,
        slot_mapping,
        cos,
        sin,
        k_cache,
        v_cache,
        num_heads=num_heads,
        static_weight=static_weight,
    )


def _check_rope(
    tokens: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: tuple[int | None, int | None] = (None, None),
) -> None:
    """Against `tokens` [tokens, ...] and `heads` (num_kv_heads, head_dim), None: those of the cache."""
    dtype, device = tokens.dtype, tokens.device
    _check("k_cache", k_cache, (None, None, *heads), (dtype,), device)
    _check("v_cache", v_cache, tuple(k_cache.shape), (dtype,), device)
    head_dim = k_cache.shape[3]
    if head_dim % 2:
        raise ValueError(f"k_cache: expected an even head_dim, got {head_dim}")
    _check("positions", positions, tokens.shape[:1], (torch.int32,), device)
    _check("slot_mapping", slot_mapping, tokens.shape[:1], (torch.int64,), device)
    _check("cos", cos, (None, head_dim // 2), (torch.float32,), device)
    _check("sin", sin, tuple(cos.shape), (torch.float32,), device)


@traceable
def attention_plan(
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    page_size: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    distinct_rows: int | None = None,
    backend: str | None = None,
) -> AttentionPlan:
    """Cuts the attention of a step into work, without a host wait; all layers of the step use the same plan.

    Rows whose pages are the same over a stretch of keys are computed together there. Keys are cut finer while
    there are too few tiles to fill the GPU. `reference/attention_plan.py` fixes the result bit for bit.
    A plan serves one stream at a time.

    Args:
        page_table: [rows, pages_per_row] int32.
        cu_seqlens_q: [rows + 1] int32.
        seqlens_k: [rows] int32.
        page_size: keys a page.
        num_tokens: packed queries including padding.
        num_heads, num_kv_heads: of the attention; they decide the size of a tile.
        distinct_rows: how many rows with queries are expected to read pages of their own, where those that
            share most of theirs count once; None: all rows. The result of the attention does not depend on
            it, its speed does.
    """
    _check("page_table", page_table, (None, None), (torch.int32,))
    rows, device = page_table.shape[0], page_table.device
    _check("cu_seqlens_q", cu_seqlens_q, (rows + 1,), (torch.int32,), device)
    _check("seqlens_k", seqlens_k, (rows,), (torch.int32,), device)
    if distinct_rows is None:
        distinct_rows = rows
    for name, value, least in (
        ("page_size", page_size, 1),
        ("num_tokens", num_tokens, 0),
        ("num_heads", num_heads, 1),
        ("distinct_rows", distinct_rows, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of {num_heads}, got {num_kv_heads}")
    module = _backend(backend, "attention_plan", page_table)
    heads, pages_per_row = (num_heads, num_kv_heads), page_table.shape[1]
    shape = tuning.attention_shape(
        num_tokens,
        *heads,
        page_size,
        pages_per_row,
        tuning.num_processors(device),
        units=module is cuda and tuning.plans_units(*heads, page_size, pages_per_row, distinct_rows, device),
    )
    return module.attention_plan(
        page_table, cu_seqlens_q, seqlens_k, page_size=page_size, num_tokens=num_tokens, shape=shape
    )


@traceable
def varlen_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """Non-causal attention of the packed queries of every row over all keys of that row's pages.

    Args:
        q: [tokens, num_heads, head_dim], fp32, bf16 or fp16; tokens may exceed cu_seqlens_q[-1] (padding).
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim]; num_kv_heads divides num_heads.
        page_table: [rows, pages_per_row] int32; page j of a row holds its positions from j * page_size on.
        cu_seqlens_q: [rows + 1] int32, first packed token of each row.
        seqlens_k: [rows] int32, keys of each row.
        softmax_scale: defaults to head_dim ** -0.5.
        plan: `attention_plan` of these very tensors, to be made once for all layers; None makes one here.

    Returns:
        [tokens, num_heads, head_dim]; padding tokens and rows without keys are zero.
    """
    _check("q", q, (None, None, None), _FLOATS)
    head_dim = q.shape[2]
    _check("k_cache", k_cache, (None, None, None, head_dim), (q.dtype,), q.device)
    _check("v_cache", v_cache, tuple(k_cache.shape), (q.dtype,), q.device)
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(
            f"k_cache: expected a number of kv heads that divides {q.shape[1]}, got {k_cache.shape[2]}"
        )
    _check("page_table", page_table, (None, None), (torch.int32,), q.device)
    _check("cu_seqlens_q", cu_seqlens_q, (page_table.shape[0] + 1,), (torch.int32,), q.device)
    _check("seqlens_k", seqlens_k, (page_table.shape[0],), (torch.int32,), q.device)
    if plan is not None:
        heads = q.shape[1], k_cache.shape[2]
        if (plan.num_heads, plan.num_kv_heads) != heads:
            raise ValueError(
                "plan: expected one for {} heads and {} kv heads, got one for {} and {}".format(
                    *heads, plan.num_heads, plan.num_kv_heads
                )
            )
        _check("plan.tiles", plan.tiles, (None, 4), (torch.int32,), q.device)
        _check("plan.token_row", plan.token_row, (q.shape[0],), (torch.int32,), q.device)
        _check("plan.pieces", plan.pieces, (None, 2), (torch.int32,), q.device)
        _check(
            "plan.query_order", plan.query_order, (plan.pieces.shape[0], q.shape[0]), (torch.int32,), q.device
        )
        _check("plan.counts", plan.counts, (2,), (torch.int32,), q.device)
        _check("plan.units", plan.units, (None, tuning.UNIT_INTEGERS), (torch.int32,), q.device)
        _check("plan.stretches", plan.stretches, (None, tuning.STRETCH_INTEGERS), (torch.int32,), q.device)
        processors = plan.stretches.shape[0]
        _check("plan.arrivals", plan.arrivals, (2 * processors,), (torch.int32,), q.device)
        if plan.units.shape[0] > 0 and processors == 0:
            raise ValueError(
                "plan.stretches: expected one for each processor, since the plan has units, got none"
            )
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5
    if plan is None:
        rows, pages_per_row = page_table.shape
        heads, page_size = (q.shape[1], k_cache.shape[2]), k_cache.shape[1]
        units = tuning.plans_units(*heads, page_size, pages_per_row, rows, q.device)
    else:
        units = plan.units.shape[0] > 0
    module = _backend(
        backend,
        "varlen_attention",
        q,
        excluded=() if _cuda_takes(k_cache, v_cache, softmax_scale) else ("cuda",),
        units=int(units),
        num_tokens=q.shape[0],
        num_keys=page_table.shape[1] * k_cache.shape[1],
        head_dim=head_dim,
        element_size=q.element_size(),
    )
    if plan is None and module is not reference:
        plan = attention_plan(
            page_table,
            cu_seqlens_q,
            seqlens_k,
            page_size=k_cache.shape[1],
            num_tokens=q.shape[0],
            num_heads=q.shape[1],
            num_kv_heads=k_cache.shape[2],
            backend=backend,
        )
    return module.varlen_attention(
        q,
        k_cache,
        v_cache,
        page_table,
        cu_seqlens_q,
        seqlens_k,
        softmax_scale=softmax_scale,
        plan=plan,
    )


def _cuda_takes(k_cache: Tensor, v_cache: Tensor, softmax_scale: float) -> bool:
    """What only the CUDA attention refuses."""
    return k_cache.stride(-1) == 1 and v_cache.stride(-1) == 1 and 0 < softmax_scale < float("inf")


@traceable
def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Top token of each hidden state and its softmax probability over the whole vocabulary.

    Equivalent to `softmax((hidden @ weight.T).float(), -1).max(-1)`, with the lowest id on a tie.

    Args:
        hidden: [predictions, dim], fp32, bf16 or fp16.
        weight: [vocabulary, dim], same dtype.
        probe_tokens: [predictions] int32, a token of each row whose probability is wanted as well.
        suppress_token: its logit counts as minus infinity.

    Returns:
        top_token [predictions] int32, confidence [predictions] fp32, probe_probability [predictions] fp32 or
        None.
    """
    _check("hidden", hidden, (None, None), _FLOATS)
    _check("weight", weight, (None, hidden.shape[1]), (hidden.dtype,), hidden.device)
    if probe_tokens is not None:
        _check("probe_tokens", probe_tokens, (hidden.shape[0],), (torch.int32,), hidden.device)
    if suppress_token is not None and not 0 <= suppress_token < weight.shape[0]:
        raise ValueError(f"suppress_token: expected an id below {weight.shape[0]}, got {suppress_token}")
    return _backend(backend, "lm_head_confidence", hidden).lm_head_confidence(
        hidden, weight, probe_tokens=probe_tokens, suppress_token=suppress_token
    )


@traceable
def pack_windows(
    state: BranchState,
    plan: StepPlan,
    page_table: Tensor,
    *,
    page_size: int,
    capacity: int,
    predict_capacity: int,
    prediction_offset: int = 0,
    backend: str | None = None,
) -> PackedQueries:
    """Gathers the query tokens of all rows of a plan into fixed-capacity tensors, without a host wait.

    Args:
        state: the branches; its tokens are read.
        plan: which rows compute which canvas positions; `plan.flags[2:4]` hold the exact sizes.
        page_table: [R, pages_per_row] int32.
        page_size: positions a page.
        capacity: packed tokens to make room for, at least the plan's query tokens.
        predict_capacity: predictions to make room for, at least the plan's.
        prediction_offset: a query at position p predicts p + prediction_offset.
    """
    check_state(state)
    check_plan("plan", plan, state)
    _check("page_table", page_table, (state.num_rows, None), (torch.int32,), state.tokens.device)
    for name, value, least in (
        ("page_size", page_size, 1),
        ("capacity", capacity, 0),
        ("predict_capacity", predict_capacity, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    return _backend(backend, "pack_windows", state.tokens).pack_windows(
        state,
        plan,
        page_table,
        page_size=page_size,
        capacity=capacity,
        predict_capacity=predict_capacity,
        prediction_offset=prediction_offset,
    )


@traceable
def share_pages(page_table: Tensor, source_row: Tensor, *, backend: str | None = None) -> None:
    """Lets each row use the pages of its source row: no K or V moves.

    Args:
        page_table: [R, pages_per_row] int32; *written*. All rows read the table as it was before.
        source_row: [R] int32; the row itself or -1 leaves the row as it is.
    """
    _check("page_table", page_table, (None, None), (torch.int32,))
    _check("source_row", source_row, (page_table.shape[0],), (torch.int32,), page_table.device)
    _backend(backend, "share_pages", page_table).share_pages(page_table, source_row)


@traceable
def copy_pages(
    kv_cache: Tensor,
    page_table: Tensor,
    write_start: Tensor,
    write_end: Tensor,
    *,
    num_branches: int,
    backend: str | None = None,
) -> None:
    """Copy on write: gives each row its own page wherever it is about to change one that another row uses
    too.

    The pages of a request come from a pool of `num_branches` pages for every column of its page tables, page
    id (request * num_branches + k) * pages_per_row + column, so a free one always exists. The contents are
    copied, in all layers, where the write does not cover the page whole.

    Args:
        kv_cache: [layers, 2, pages, page_size, num_kv_heads, head_dim]; *written* in the new pages.
        page_table: [R, pages_per_row] int32, -1 where a row has no page yet; *written*.
        write_start, write_end: [R] int32, positions that the row will write; equal: none.
        num_branches: rows per request.
    """
    _check("page_table", page_table, (None, None), (torch.int32,))
    _check("kv_cache", kv_cache, (None, 2, None, None, None, None), _FLOATS, page_table.device)
    rows = page_table.shape[0]
    _check("write_start", write_start, (rows,), (torch.int32,), page_table.device)
    _check("write_end", write_end, (rows,), (torch.int32,), page_table.device)
    if num_branches < 1 or rows % num_branches:
        raise ValueError(f"num_branches: expected a divisor of the {rows} rows, got {num_branches}")
    if kv_cache.shape[2] < page_table.numel():
        raise ValueError(f"kv_cache: expected at least {page_table.numel()} pages, got {kv_cache.shape[2]}")
    module = _backend(backend, "copy_pages", page_table, num_branches=num_branches)
    module.copy_pages(kv_cache, page_table, write_start, write_end, num_branches=num_branches)


@traceable
def initial_plan(
    state: BranchState, params: PolicyParams, *, out: StepPlan | None = None, backend: str | None = None
) -> StepPlan:
    """The first forward: one full row for each request, whose results belong to all its branches.

    `out` (`StepPlan.allocate`) is *written* and returned if given.
    """
    _check_policy(state, params)
    if out is not None:
        check_plan("out", out, state)
    module = _backend(backend, "initial_plan", state.tokens, **_policy_sizes(state, params))
    return module.initial_plan(state, params, out=out)


@traceable
def decode_policy(
    state: BranchState,
    predictions: Predictions,
    plan: StepPlan,
    params: PolicyParams,
    *,
    out: tuple[StepPlan, PolicyEvents] | None = None,
    backend: str | None = None,
) -> tuple[StepPlan, PolicyEvents]:
    """Everything between two forwards: commit, EOS check, advance, merge, sync, and the plan of the next
    forward.

    Source of the method: arXiv 2605.29233; LocalLeap's commit rule: arXiv 2510.07081.

    Args:
        state: *written*.
        predictions: of the forward that `plan` asked for.
        plan: what `initial_plan` or the previous call returned.
        params: the settings.
        out: *written* and returned if given (`StepPlan.allocate`, `PolicyEvents.allocate`); its plan may be
            `plan` itself.

    Returns:
        the plan of the next forward, and what changed (for traces; `sync_source` also tells `share_pages`
        which rows to repoint).
    """
    _check_policy(state, params)
    check_plan("plan", plan, state)
    if out is not None:
        check_plan("out[0]", out[0], state)
        check_events("out[1]", out[1], state)
    check_predictions(predictions, state.tokens.device)
    if predictions.probe_probability is None and params.eos_exit == "window":
        raise ValueError('predictions.probe_probability: expected a tensor with eos_exit="window", got None')
    module = _backend(backend, "decode_policy", state.tokens, **_policy_sizes(state, params))
    return module.decode_policy(state, predictions, plan, params, out=out)


def _policy_sizes(state: BranchState, params: PolicyParams) -> dict[str, int]:
    return dict(num_branches=state.num_branches, num_eos_tokens=len(params.eos_token_ids))


def _check_policy(state: BranchState, params: PolicyParams) -> None:
    check_state(state)
    if params.eos_exit not in EOS_EXITS:
        raise ValueError(f"eos_exit: expected one of {', '.join(EOS_EXITS)}, got {params.eos_exit!r}")
    if params.query_span not in QUERY_SPANS:
        raise ValueError(f"query_span: expected one of {', '.join(QUERY_SPANS)}, got {params.query_span!r}")
    if params.prediction_offset not in (0, 1):
        raise ValueError(f"prediction_offset: expected 0 or 1, got {params.prediction_offset}")
    if not 0.5 <= params.merge_threshold <= 1.0:
        # Below one half two different tokens could pass, and the rule would need the whole distribution.
        raise ValueError(f"merge_threshold: expected a value from 0.5 to 1, got {params.merge_threshold}")
    if (params.threshold is None) == (params.steps_per_block is None):
        raise ValueError("threshold: expected either threshold or steps_per_block, got both or neither")
    if params.tail_threshold is not None:
        if params.threshold is None:
            raise ValueError(
                f"tail_threshold: expected None without a threshold, got {params.tail_threshold}"
            )
        if not params.tail_threshold >= params.threshold:
            raise ValueError(
                f"tail_threshold: expected at least threshold = {params.threshold}, got "
                f"{params.tail_threshold}"
            )
