"""Inputs and versions of the operators around the model for `ops.py`: packing, policy, pages and plan."""

from __future__ import annotations

import torch
from cases import StepCase
from op_cases import Case, Outputs, Version, backends
from random_models import random_model

import blockbatch_kernels as bbk
from blockbatch.kv_cache import PAGE_SIZE
from blockbatch.models.spec import ModelSpec

STEP_OPS = ("pack_windows", "decode_policy", "attention_plan", "share_pages")


def step_case(op: str, spec: ModelSpec, length: int, device: torch.device) -> Case:
    """An integer operator around a block step (STEP_OPS), on the state of a real batch of a small model."""
    gen_length = min(256, length // 2)
    sizes = tuple(size for size in (4, 8, 16, 32, 64, 128) if size <= gen_length)
    small = random_model("small-llada", device, torch.float32)
    case = StepCase(small, sizes, length - gen_length, gen_length)
    batch, cache = case.batch, case.batch.cache
    rows = batch.state.num_rows
    state_bytes = 3 * batch.state.tokens.nbytes + batch.plan.predict.nbytes
    predictions = bbk.pack_windows(
        batch.state,
        batch.plan,
        cache.page_table,
        page_size=cache.page_size,
        capacity=case.tokens,
        predict_capacity=case.predictions,
        backend="reference",
    ).predict_target
    top_token = torch.randint(1000, predictions.shape, dtype=torch.int32, device=device)
    confidence = torch.rand(predictions.shape, device=device) * 0.5
    values = bbk.Predictions(predictions, top_token, confidence)

    def pack(backend: str) -> Version:
        return lambda index: tuple(
            bbk.pack_windows(
                batch.state,
                batch.plan,
                cache.page_table,
                page_size=cache.page_size,
                capacity=case.tokens,
                predict_capacity=case.predictions,
                backend=backend,
            )
        )

    def policy(backend: str) -> Version:
        def run(index: int) -> Outputs:
            plan, events = bbk.decode_policy(
                batch.state,
                values,
                batch.plan,
                batch.method.params,
                out=(batch.plan, batch.events),
                backend=backend,
            )
            return (*plan, *events, batch.state.tokens, batch.state.window_start, batch.state.window_end)

        return run

    def attention_plan(backend: str) -> Version:
        bounds = torch.tensor([0, *sizes]).cumsum(0).int().to(device)
        return lambda index: tuple(
            bbk.attention_plan(
                cache.page_table,
                bounds,
                batch.seqlens_k,
                page_size=cache.page_size,
                num_tokens=case.tokens,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                distinct_rows=cache.distinct_rows,
                backend=backend,
            )[:5]
        )

    source_row = torch.zeros(rows, dtype=torch.int32, device=device)

    def share(backend: str) -> Version:
        def run(index: int) -> Outputs:
            bbk.share_pages(cache.page_table, source_row, backend=backend)
            return (cache.page_table,)

        return run

    make = {
        "pack_windows": pack,
        "decode_policy": policy,
        "attention_plan": attention_plan,
        "share_pages": share,
    }[op]
    table_bytes = cache.page_table.nbytes
    changes_state = op in ("decode_policy", "share_pages")
    return Case(
        op,
        f"{rows} rows, {case.tokens} tokens, {length} positions",
        {"attention_plan": table_bytes, "share_pages": 2 * table_bytes}.get(op, state_bytes),
        0,
        1,
        {**{name: make(name) for name in backends(op, device)}, "torch": make("reference")},
        None,
        reset=lambda index: case.restore(),
        reset_each=changes_state,
    )


def copy_case(spec: ModelSpec, length: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Copy on write of a page in the middle of a shared canvas by every row, in all layers."""
    rows, columns = 6, -(-length // PAGE_SIZE)
    kv = torch.zeros(
        spec.num_layers,
        2,
        rows * columns,
        PAGE_SIZE,
        spec.num_kv_heads,
        spec.head_dim,
        dtype=dtype,
        device=device,
    )
    kv[:, :, :columns].normal_()
    first = torch.arange(columns, dtype=torch.int32, device=device).repeat(rows, 1)
    table = first.clone()
    # Half of a page: its contents must move.
    start = torch.full((rows,), length // 2, dtype=torch.int32, device=device)
    end = start + PAGE_SIZE // 2
    page_bytes = spec.num_layers * 2 * PAGE_SIZE * spec.num_kv_heads * spec.head_dim * dtype.itemsize

    def copy(backend: str) -> Version:
        def run(index: int) -> Outputs:
            bbk.copy_pages(kv, table, start, end, num_branches=rows, backend=backend)
            return (table,)

        return run

    return Case(
        "copy_pages",
        f"{rows - 1} pages of {spec.num_layers} layers, {page_bytes / 2**20:.1f} MiB each",
        (rows - 1) * 2 * page_bytes,
        0,
        1,
        {**{name: copy(name) for name in backends("copy_pages", device)}, "torch": copy("reference")},
        None,
        reset=lambda index: table.copy_(first),
        reset_each=True,
        also_written=lambda: (kv[:, :, table[:, length // 2 // PAGE_SIZE].long()],),
    )
