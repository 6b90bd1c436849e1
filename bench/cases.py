"""A block step of a real batch that can be run again and again from the same state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields

import torch
from random_models import random_prompt

import blockbatch_kernels as bbk
from blockbatch.config import DecodeConfig
from blockbatch.decoding import Method, Session
from blockbatch.decoding.batch import Batch, HostPlan
from blockbatch.decoding.forward import block_denoise
from blockbatch.decoding.graphs import StepGraphs
from blockbatch.decoding.rule import CommitRule
from blockbatch.decoding.sampling import request_sampling, sampling_kind
from blockbatch.decoding.session import Runner, new_runner
from blockbatch.models import Model
from blockbatch_kernels.reference.plan import next_plan, write


class Snapshot:
    """The state, plan and page table of a batch at one moment. The pages themselves are not kept: a step
    computes anew all that it reads of its own writing."""

    def __init__(self, batch: Batch) -> None:
        tensors = [getattr(batch.state, field.name) for field in fields(batch.state)]
        plan = batch.plan
        tensors += [plan.host_part(), plan.predict, plan.query_position]
        tensors += [batch.cache.page_table, batch.seqlens_k]
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        self._pairs = [(live, [tensor.clone() for tensor in live]) for live in by_dtype.values()]

    def restore(self) -> None:
        for live, kept in self._pairs:
            torch._foreach_copy_(live, kept)


class RecordedGraphs:
    """The graphs of a batch, with events around every step while `spans` is a list."""

    def __init__(self, graphs: StepGraphs) -> None:
        self._graphs = graphs
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None

    def run(self, tokens: int) -> None:
        if self.spans is None:
            self._graphs.run(tokens)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graphs.run(tokens)
        end.record()
        self.spans.append((start, end))


class StepCase:
    """One request before its first block step: the prompt and the masked canvas are computed, every branch
    has committed one token, and the pages of every window are the branch's own.

    Args:
        model: random weights.
        block_sizes: one branch each; equal ones are allowed.
        prompt_length, gen_length: tokens; the canvas is both.
        separate_pages: gives every branch pages of its own over its whole canvas; else all branches share
            the pages outside their windows.
        known: this share of the generation region holds tokens before the step, at the same scattered places
            in every branch.
        rule: what commits in the place of the policy, which then has a threshold of `CHOSEN`.
        drawing: settings whose sampling options say how tokens are drawn; None: the top tokens.
        settings: of the policy, beside its defaults; without them nothing is refreshed, so that block steps
            follow each other for as long as they are timed.
    """

    def __init__(
        self,
        model: Model,
        block_sizes: tuple[int, ...],
        prompt_length: int,
        gen_length: int,
        *,
        separate_pages: bool = False,
        known: float = 0.0,
        rule: CommitRule | None = None,
        drawing: DecodeConfig | None = None,
        **settings,
    ) -> None:
        self.model, self.canvas_length = model, prompt_length + gen_length
        ends = model.spec.eos_token_ids
        kind = None if drawing is None else sampling_kind(drawing, model.spec.vocab_size, ends)
        drawn = None if kind is None else [request_sampling(drawing, kind, ends, 0)]
        params = policy(model, **{"refresh_interval": None} | settings)
        self.method = Method(block_sizes, params, rule, kind)
        runner = new_runner(model, 1, self.method, gen_length, prompt_length)
        self.graphs = RecordedGraphs(runner.graphs) if runner.graphs is not None else None
        self.runner, self.batch = Runner(runner.batch, self.graphs), runner.batch
        prompt = random_prompt(model.spec, prompt_length)
        self.session = Session(model, [prompt], self.method, gen_length, runner=self.runner, sampling=drawn)
        self.session.step()
        if known:
            self._scatter(known)
        self.plan = host_plan(self.batch)
        self.tokens, self.predictions = self.plan.query_tokens, self.plan.predictions
        if separate_pages:
            canvas = self.batch.seqlens_k
            self.batch.cache.make_private(torch.zeros_like(canvas), canvas)
            self.batch.note_sources(list(range(self.batch.state.num_rows)))
        plan, scattered = self.batch.plan, self.method.params.query_span == "open"
        positions = plan.query_position if scattered else None
        self.batch.cache.make_private(plan.query_start, plan.query_end, positions)
        self.snapshot = Snapshot(self.batch)

    def _scatter(self, known: float) -> None:
        """Writes tokens to that share of the positions, computed as they stand there, and plans anew."""
        state = self.batch.state
        text = torch.tensor(random_prompt(self.model.spec, state.gen_length, seed=1), dtype=torch.int32)
        order = torch.randperm(state.gen_length, generator=torch.Generator().manual_seed(0))
        places = order[: int(known * state.gen_length)].sort().values
        state.tokens[:, places] = text[places].to(state.tokens)
        state.cached_token.copy_(state.tokens)
        write(next_plan(state, self.method.params), self.batch.plan)

    def restore(self) -> None:
        self.snapshot.restore()

    def run(self) -> None:
        """The step as the engine runs it, without the wait that follows."""
        if self.graphs is not None:
            self.graphs.run(self.tokens)
        else:
            block_denoise(self.model, self.batch, self.tokens, self.predictions)

    def by(self, model: Model) -> Callable[[], HostPlan]:
        """The same step of the same batch by the model on another backend, launch by launch."""
        batch = as_backend(self.batch, model.backend)

        def run() -> HostPlan:
            block_denoise(model, batch, self.tokens, self.predictions)
            return batch.host_plan()

        return run

    def run_and_wait(self) -> HostPlan:
        """The step and the wait of the loop."""
        self.run()
        return self.batch.host_plan()

    def distinct_page_bytes(self) -> int:
        """Bytes of K and V that attention must read at least: every page in use once, in all layers."""
        table, kv = self.batch.cache.page_table, self.batch.cache.kv
        return int(table[table >= 0].unique().numel()) * kv[:, :, 0].nbytes


def policy(model: Model, **settings) -> bbk.PolicyParams:
    return bbk.PolicyParams(
        mask_token_id=model.spec.mask_token_id,
        eos_token_ids=model.spec.eos_token_ids,
        eos_exit="none",
        prediction_offset=model.spec.prediction_offset,
        **settings,
    )


def host_plan(batch: Batch) -> HostPlan:
    batch.copy_plan_to_host()
    return batch.host_plan()


def as_backend(batch: Batch, backend: str | None) -> Batch:
    """The same batch, its state and its cache, served by another backend."""
    other = copy.copy(batch)
    other.backend = backend
    other.cache = copy.copy(batch.cache)
    other.cache.backend = backend
    return other
