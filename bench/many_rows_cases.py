"""Operators around the model for `ops.py` at hundreds of rows: the step of a server that is full."""

from __future__ import annotations

from collections.abc import Callable

import torch
from op_cases import Case, Outputs, Version, backends
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.kv_cache import PAGE_SIZE
from blockbatch.models.spec import ModelSpec

OPS = ("pack_windows", "decode_policy", "attention_plan", "copy_pages", "share_pages")
REQUESTS = 64
_WINDOWS = (4, 8, 16, 32, 64, 128)


class ManyRows:
    """64 requests of a branch for each window, each before a block step.

    Args:
        length: prompt and generation region.
        gen_length: of it.
    """

    def __init__(self, spec: ModelSpec, length: int, gen_length: int, device: torch.device) -> None:
        sizes = [size for size in _WINDOWS if size <= gen_length]
        ints = dict(dtype=torch.int32, device=device)
        prompt = length - gen_length
        self.params = bbk.PolicyParams(spec.mask_token_id, tuple(spec.eos_token_ids), eos_exit="none")
        self.state = bbk.BranchState.create(
            torch.ones(REQUESTS, prompt, **ints),
            torch.full((REQUESTS,), prompt, **ints),
            torch.tensor(sizes, **ints),
            gen_length,
            spec.mask_token_id,
        )
        self.rows, self.branches, columns = REQUESTS * len(sizes), len(sizes), -(-length // PAGE_SIZE)
        self.windows = torch.tensor(sizes, **ints).repeat(REQUESTS)
        self.tokens, self.seqlens = int(self.windows.sum()), torch.full((self.rows,), length, **ints)
        self.bounds = torch.cat((self.windows.new_zeros(1), self.windows.cumsum(0).int()))
        # Rows share the pages of the first of their request, but for those of their windows.
        own = torch.arange(self.rows * columns, **ints).view(self.rows, columns)
        first = own[torch.arange(self.rows, device=device) // self.branches * self.branches]
        column = torch.arange(columns, device=device)
        written = (column >= prompt // PAGE_SIZE) & (
            column < (prompt + self.windows.unsqueeze(1) + PAGE_SIZE - 1) // PAGE_SIZE
        )
        self.table = torch.where(written, own, first)
        self.shared = first.contiguous()
        self.start, self.end = torch.full_like(self.windows, prompt), prompt + self.windows
        self.pool = torch.arange(2 * own.numel(), **ints)
        self.plan = bbk.initial_plan(self.state, self.params, backend="reference")
        self.plan = self._after(self.plan)
        self._kept = [tensor.clone() for tensor in self._changed()]

    def _after(self, plan: bbk.StepPlan) -> bbk.StepPlan:
        values = self.predictions(plan, int(plan.flags[2]))
        return bbk.decode_policy(self.state, values, plan, self.params, backend="reference")[0]

    def pack(self, plan: bbk.StepPlan, capacity: int, backend: str) -> tuple[Tensor, ...]:
        return tuple(
            bbk.pack_windows(
                self.state,
                plan,
                self.table,
                page_size=PAGE_SIZE,
                capacity=capacity,
                predict_capacity=capacity,
                backend=backend,
            )
        )

    def predictions(self, plan: bbk.StepPlan, capacity: int) -> bbk.Predictions:
        target = bbk.PackedQueries(*self.pack(plan, capacity, "reference")).predict_target
        generator = torch.Generator().manual_seed(0)
        confidence = (torch.rand(target.shape, generator=generator) * 0.5).to(target.device)
        return bbk.Predictions(target, torch.full_like(target, 7, dtype=torch.int32), confidence)

    def _changed(self) -> list[Tensor]:
        names = ("tokens", "window_start", "window_end", "decoded", "done", "finished", "needs_refresh")
        return [*(getattr(self.state, name) for name in names), self.state.nfe]

    def restore(self) -> None:
        for live, kept in zip(self._changed(), self._kept, strict=True):
            live.copy_(kept)


def many_rows_case(op: str, spec: ModelSpec, length: int, device: torch.device) -> Case:
    """One of OPS at 64 requests of up to six branches."""
    case = ManyRows(spec, length, min(256, length // 2), device)
    plan, held = case.plan, case.shared.clone()
    values = case.predictions(plan, case.tokens)
    kv = torch.zeros(1, 2, len(case.pool), PAGE_SIZE, 1, 8, dtype=torch.bfloat16, device=device)

    def pack(backend: str) -> Version:
        return lambda index: case.pack(plan, case.tokens, backend)

    def policy(backend: str) -> Version:
        def run(index: int) -> Outputs:
            made, events = bbk.decode_policy(case.state, values, plan, case.params, backend=backend)
            return (*made, *events, case.state.tokens)

        return run

    def attention_plan(backend: str) -> Version:
        return lambda index: tuple(
            bbk.attention_plan(
                case.table,
                case.bounds,
                case.seqlens,
                page_size=PAGE_SIZE,
                num_tokens=case.tokens,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                num_branches=case.branches,
                backend=backend,
            )[:5]
        )

    def copy(backend: str) -> Version:
        pool = bbk.PagePool.of(case.pool)

        def run(index: int) -> Outputs:
            bbk.copy_pages(kv, held, case.start, case.end, num_branches=1, pool=pool, backend=backend)
            return (held,)

        return run

    source = torch.arange(case.rows, dtype=torch.int32, device=device) // case.branches * case.branches

    def share(backend: str) -> Version:
        def run(index: int) -> Outputs:
            bbk.share_pages(held, source, backend=backend)
            return (held,)

        return run

    make: dict[str, Callable[[str], Version]] = dict(zip(OPS, (pack, policy, attention_plan, copy, share)))

    def reset(index: int) -> None:
        held.copy_(case.shared)
        if op == "decode_policy":
            case.restore()

    state_bytes = 3 * case.state.tokens.nbytes + plan.predict.nbytes
    return Case(
        op,
        f"{REQUESTS} requests, {case.rows} rows, {case.tokens} tokens, {length} positions",
        case.table.nbytes if op in OPS[2:] else state_bytes,
        0,
        1,
        {**{name: make[op](name) for name in backends(op, device)}, "torch": make[op]("reference")},
        None,
        reset=reset,
        reset_each=op in ("decode_policy", "copy_pages", "share_pages"),
    )
