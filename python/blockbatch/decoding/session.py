"""One batch of requests from the first forward to the last: plan, pack, forward, policy, share."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

import blockbatch_kernels as bbk
from blockbatch import branches
from blockbatch.decoding.method import Method
from blockbatch.models.model import Model


class Step(NamedTuple):
    """One turn of the loop, for observers.

    Attributes:
        phase: one of `blockbatch_kernels.PHASES`.
        plan: the forward that ran.
        query_tokens: packed tokens; 0: no row had anything to compute and no forward ran.
        window_start, window_end: [R] int32, the windows during the forward.
        events: what the policy changed.
        seconds: of the whole turn.
    """

    phase: str
    plan: bbk.StepPlan
    query_tokens: int
    window_start: torch.Tensor
    window_end: torch.Tensor
    events: bbk.PolicyEvents
    seconds: float


class Session:
    """Decodes a batch of prompts; `step()` runs one forward and returns None when every request is finished.

    Args:
        model: anything with the attributes `spec`, `device` and `backend` and the methods `new_cache` and
            `predict` of `blockbatch.models.Model`.
        prompts: token ids, one list for each request.
        method: what to run.
        gen_length: tokens to generate.
    """

    def __init__(self, model: Model, prompts: list[list[int]], method: Method, gen_length: int) -> None:
        self.model, self.params = model, method.params
        self.state = branches.create_state(
            prompts, method.block_sizes, gen_length, self.params.mask_token_id, model.device
        )
        canvas_lengths = self.state.prompt_length + gen_length
        self._seqlens_k = canvas_lengths.repeat_interleave(len(method.block_sizes))
        longest = max(len(prompt) for prompt in prompts) + gen_length
        self.cache = model.new_cache(len(prompts), len(method.block_sizes), longest)
        self._plan = bbk.initial_plan(self.state, self.params, backend=model.backend)
        self._flags = self._plan.flags.tolist()
        self._started = time.perf_counter()
        self.seconds: list[float | None] = [None] * len(prompts)

    @torch.inference_mode()
    def step(self) -> Step | None:
        running, phase, query_tokens, predictions, stalled = self._flags
        if not running:
            return None
        if stalled:
            raise RuntimeError(
                f"model: expected predictions other than MASK (id {self.params.mask_token_id}), got more "
                "commits than positions: the model keeps predicting its own MASK token"
            )
        begun = time.perf_counter()
        plan, backend = self._plan, self.model.backend
        windows = self.state.window_start.clone(), self.state.window_end.clone()
        predicted = self._forward(plan, phase, query_tokens, predictions)
        self._plan, events = bbk.decode_policy(self.state, predicted, plan, self.params, backend=backend)
        self.cache.share(events.sync_source)
        self._flags = self._plan.flags.tolist()  # the one wait for the device in a step
        now = time.perf_counter()
        if self._flags[0] != running:
            for request, finished in enumerate(self.state.finished.tolist()):
                if finished and self.seconds[request] is None:
                    self.seconds[request] = now - self._started
        return Step(bbk.PHASES[phase], plan, query_tokens, *windows, events, now - begun)

    def run(self) -> None:
        while self.step() is not None:
            pass

    def _forward(
        self, plan: bbk.StepPlan, phase: int, query_tokens: int, predictions: int
    ) -> bbk.Predictions:
        if query_tokens == 0:
            nothing = torch.zeros(0, dtype=torch.int32, device=self.model.device)
            confidence = nothing.float()
            return bbk.Predictions(nothing.long(), nothing, confidence, confidence)
        self.cache.prepare(plan)
        packed = bbk.pack_windows(
            self.state,
            plan,
            self.cache.page_table,
            page_size=self.cache.page_size,
            capacity=query_tokens,
            predict_capacity=predictions,
            prediction_offset=self.params.prediction_offset,
            backend=self.model.backend,
        )
        probe_tokens = None
        if self.params.eos_exit == "window":
            probe_tokens = self.state.tokens.flatten()[packed.predict_target.clamp(min=0)]
        predicted = self.model.predict(packed, self.cache, self._seqlens_k, probe_tokens)
        if bbk.PHASES[phase] != "block":
            self.cache.share(plan.source_row)
        return predicted
