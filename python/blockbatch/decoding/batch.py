"""Everything that decoding a batch of requests keeps on the device, at addresses that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import blockbatch_kernels as bbk
from blockbatch import branches
from blockbatch.decoding.method import Method
from blockbatch.decoding.rule import RuleRun
from blockbatch.decoding.sampling import BatchSampling, RequestSampling
from blockbatch.steps import HostPlan


def most_tokens(method: Method, num_requests: int, max_prompt: int, gen_length: int) -> int:
    """Packed tokens of the largest block step of a batch."""
    rows, region = len(method.block_sizes), gen_length + method.params.prediction_offset
    each = {
        "window": sum(min(size, gen_length) for size in method.block_sizes),
        "suffix": rows * region,
        "open": rows * region,
        "canvas": rows * (max_prompt + gen_length),
    }
    return num_requests * each[method.params.query_span]


class Batch:
    """State, plan and K/V cache of `num_requests` requests that are decoded together.

    One batch serves any number of decodes of its shape, one after the other: `start` puts it back to the
    beginning. Nothing is allocated after its construction, so captured steps can refer to it.

    Args:
        model: see `Session`.
        num_requests: prompts at a time.
        method: what to run.
        gen_length: tokens to generate.
        max_prompt: the longest prompt that fits.
    """

    def __init__(self, model, num_requests: int, method: Method, gen_length: int, max_prompt: int) -> None:
        self.method, self.backend, self.device = method, model.backend, model.device
        num_branches = len(method.block_sizes)
        num_rows = num_requests * num_branches
        self.state = branches.empty_state(
            num_requests,
            max_prompt,
            method.block_sizes,
            gen_length,
            method.params,
            self.device,
        )
        self.rule = RuleRun(method.rule, method.params, self.state) if method.rule else None
        self.plan = bbk.StepPlan.allocate(num_rows, gen_length, self.device)
        self.events = bbk.PolicyEvents.allocate(num_rows, gen_length, self.device)
        kind = method.sampling
        self.sampling = None if kind is None else BatchSampling(num_requests, kind, self.device)
        self.seqlens_k = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        # Those that a part of a full forward computes.
        self.chosen_rows = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        self.cache = model.new_cache(num_requests, num_branches, max_prompt + gen_length)
        on_gpu = self.device.type == "cuda"
        host = dict(device="cpu", pin_memory=on_gpu)
        self._host = torch.zeros(5 + 3 * num_rows, dtype=torch.int32, **host)
        self._finished = torch.zeros(num_requests, dtype=torch.bool, **host)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._stream: torch.cuda.Stream | None = None
        self._sources = list(range(num_rows))

    def most_tokens(self) -> int:
        """Packed tokens of the largest block step that can come up."""
        max_prompt = self.state.prompt_tokens.shape[1]
        return most_tokens(self.method, self.state.num_requests, max_prompt, self.state.gen_length)

    def join_stream(self) -> None:
        """Work of the current stream comes behind what another one may still run on these buffers."""
        if self.device.type != "cuda":
            return
        current = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != current:
            current.wait_stream(self._stream)
        self._stream = current

    def start(
        self,
        prompts: list[list[int]],
        regions: Sequence[Sequence[int]] | None = None,
        sampling: Sequence[RequestSampling] | None = None,
    ) -> None:
        """Puts new prompts, no longer than the longest that fits, in front of generation regions.

        Args:
            regions: what they hold before the first forward, see `Session`; None: MASK.
            sampling: of each request, where the method draws tokens.
        """
        if (sampling is None) != (self.sampling is None):
            expected = "none" if self.sampling is None else f"{len(prompts)} requests'"
            raise ValueError(f"sampling: expected {expected} for this method, got {sampling!r:.80}")
        if self.sampling is not None:
            self.sampling.write(0, sampling, [len(prompt) for prompt in prompts])
        tokens, lengths = branches.pad_prompts(prompts)
        self.state.reset(tokens.to(self.device), lengths.to(self.device), self.method.params.mask_token_id)
        if regions is not None:
            held = torch.tensor(regions, dtype=torch.int32, device="cpu").to(self.device)
            self.state.tokens.copy_(held.repeat_interleave(self.state.num_branches, 0))
        canvas = self.state.prompt_length + self.state.gen_length
        self.seqlens_k.copy_(canvas.repeat_interleave(self.state.num_branches))
        self.cache.reset()
        if self.rule:
            self.rule.reset()
        self._sources = list(range(self.state.num_rows))
        bbk.initial_plan(self.state, self.method.params, out=self.plan, backend=self.backend)

    def note_sources(self, source_row: list[int]) -> None:
        """Keeps in mind which rows share what a full forward computed, all but their windows from then on."""
        for row, source in enumerate(source_row):
            if source >= 0:
                self._sources[row] = source
        self.cache.distinct_rows = len(set(self._sources))

    def copy_plan_to_host(self) -> None:
        """Starts the copy that `host_plan` waits for."""
        self._host.copy_(self.plan.host_part(), non_blocking=True)

    def host_plan(self) -> HostPlan:
        """The plan as the host sees it: the one wait for the device in a step."""
        self._wait()
        return HostPlan(self._host.tolist(), self.state.num_rows)

    def finished(self) -> list[bool]:
        """Which requests are finished."""
        self._finished.copy_(self.state.finished, non_blocking=True)
        self._wait()
        return self._finished.tolist()

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.record()
            self._copied.synchronize()
