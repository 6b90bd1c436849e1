"""One batch of requests from the first forward to the last: plan, pack, forward, policy, share."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

import blockbatch_kernels as bbk
from blockbatch import branches, devices
from blockbatch.decoding import forward
from blockbatch.decoding.batch import Batch
from blockbatch.decoding.graph_pool import GraphPool
from blockbatch.decoding.graphs import StepGraphs
from blockbatch.decoding.method import Method
from blockbatch.decoding.non_finite import refuse_non_finite
from blockbatch.decoding.row_graphs import RowGraphs, new_row_graphs
from blockbatch.decoding.sampling import RequestSampling
from blockbatch.parallel import share_of
from blockbatch.steps import HostPlan, OpenQueries, Step

# Tokens of whole rows that run at once. On a GPU 2048 keep the products at full speed, and their activations
# small beside the cache; a CPU gains by fewer, larger products.
ROW_TOKENS = {"cuda": 2048, "cpu": 8192}


class Stops(Protocol):
    """What ends requests before the policy does."""

    def ended(self, prefixes: Sequence[Sequence[int]]) -> list[int]:
        """The requests that end now; `prefixes` holds the final prefix of every request."""


class Runner(NamedTuple):
    """A batch with the graphs of its steps and of its whole rows (None: they run as they are)."""

    batch: Batch
    graphs: StepGraphs | None
    row_graphs: RowGraphs | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the K/V cache and of the graphs."""
        # They share one memory.
        graphs = self.graphs or self.row_graphs
        return self.batch.cache.kv.nbytes + (graphs.pool_bytes if graphs else 0)


def new_runner(model, num_requests: int, method: Method, gen_length: int, max_prompt: int) -> Runner:
    with devices.turn(model.device):
        batch = Batch(model, num_requests, method, gen_length, max_prompt)
        if not StepGraphs.possible(model):
            return Runner(batch, None)
        pool = GraphPool(model.device)
        # Runners are kept on the model: a strong reference back would keep both alive.
        possible = batch.rule is None or batch.rule.can_capture
        graphs = StepGraphs(weakref.proxy(model), batch, pool) if possible else None
        return Runner(batch, graphs, new_row_graphs(model, pool))


class Session:
    """Decodes a batch of prompts; `step()` runs one forward and returns None when every request is finished.

    Once a forward gives NaN or infinity for any request, `step()` raises NonFiniteLogitsError, at no wait for
    the device but the one that every step has.

    Args:
        model: anything with the attributes `spec`, `device` and `backend` and the methods `new_cache` and
            `predict` of `blockbatch.models.Model`.
        prompts: token ids, one list for each request.
        method: what to run.
        gen_length: tokens to generate.
        runner: of this very model, method, number of prompts and gen_length, with room for the prompts; it
            serves one session at a time. None makes one.
        observed: whether steps tell their windows and open queries, which costs copies from the device.
        stops: asked before every forward, which costs a wait for the device; None: the policy alone ends
            requests.
        regions: what the generation region of each request holds before the first forward, gen_length ids,
            the first of them MASK. Tokens among them stand as decoded ones do. None: MASK everywhere.
        sampling: of each request, where the method draws tokens; else None.
    """

    # Whether steps come with trace records, rather than with what they are made of.
    tells_records = False

    def __init__(
        self,
        model,
        prompts: list[list[int]],
        method: Method,
        gen_length: int,
        *,
        runner: Runner | None = None,
        observed: bool = False,
        stops: Stops | None = None,
        regions: Sequence[Sequence[int]] | None = None,
        sampling: Sequence[RequestSampling] | None = None,
    ) -> None:
        self.model, self.params, self.observed, self.stops = model, method.params, observed, stops
        if runner is None:
            runner = new_runner(
                model, len(prompts), method, gen_length, max(len(prompt) for prompt in prompts)
            )
        self._batch, self._graphs, self._row_graphs = runner
        self._started = time.perf_counter()
        with devices.turn(self._batch.device):
            self._batch.join_stream()
            self._batch.start(prompts, regions, sampling)
            self._batch.copy_plan_to_host()
            self._plan = self._batch.host_plan()
        self._phase = self._plan.phase  # of the last forward
        settings = (prompts, regions, method.block_sizes, method.params, gen_length)
        self._ranks = share_of(model).decode(self._batch.state, settings)
        self.seconds: list[float | None] = [None] * len(prompts)

    @property
    def state(self) -> bbk.BranchState:
        return self._batch.state

    @property
    def cache(self):
        return self._batch.cache

    @torch.inference_mode()
    def step(self) -> Step | None:
        """One forward, in a turn of the device.

        Raises:
            MemoryError: the device ran out of memory although what a decode needs was there before it began.
            NonFiniteLogitsError: the forward before gave NaN or infinity.
        """
        device = self._batch.device
        with devices.turn(device), devices.memory_errors(device, "the next forward"):
            self._batch.join_stream()
            return self._step()

    def _step(self) -> Step | None:
        self._refuse_non_finite()
        if self.stops is not None and self._plan.running:
            self._end(self.stops.ended(self.final_prefixes()))
        plan = self._plan
        if not plan.running:
            return None
        if plan.stalled:
            raise RuntimeError(
                f"model: expected predictions other than MASK (id {self.params.mask_token_id}), got more "
                "commits than positions: the model keeps predicting its own MASK token"
            )
        begun = time.perf_counter()
        self._phase = plan.phase
        phase = bbk.PHASES[plan.phase]
        windows = self._windows() if self.observed else None
        open_queries = None
        if self.observed and phase == "block" and self.params.query_span == "open":
            open_queries = self._open_queries(plan)
        with self._ranks:
            if phase != "block":
                most = ROW_TOKENS[self._batch.device.type]
                forward.whole_rows(self.model, self._batch, plan, most, self._row_graphs)
            elif self._graphs is not None and plan.query_tokens:
                self._graphs.run(plan.query_tokens)
            else:
                forward.block_denoise(self.model, self._batch, plan.query_tokens, plan.predictions)
            self._ranks.sample()
            self._plan = self._batch.host_plan()
        self._ranks.compare(self._plan.running)
        self._refuse_non_finite()
        now = time.perf_counter()
        if self._plan.running != plan.running:
            finished = self._batch.finished() if self._plan.running else [True] * len(self.seconds)
            for request, ended in enumerate(finished):
                if ended and self.seconds[request] is None:
                    self.seconds[request] = now - self._started
        return Step(phase, plan, windows, self._batch.events, now - begun, open_queries)

    def final_prefixes(self) -> list[list[int]]:
        """For each request the tokens that are final, up to the first position that is not."""
        return branches.final_prefixes(self.state, self.params)

    def outcome(self, request: int) -> branches.RequestOutcome:
        """The end of a finished request."""
        return branches.read_outcome(self.state, request, len(self.params.drafts))

    def run(self) -> None:
        while self.step() is not None:
            pass

    def _refuse_non_finite(self) -> None:
        """Raises NonFiniteLogitsError if the predictions of the last forward have no softmax."""
        if self._plan.stalled:
            refuse_non_finite(self.state, self._phase, self.model.dtype)

    def _end(self, requests: list[int]) -> None:
        """Ends those of `requests` that still run; the next forward is made for the others."""
        requests = [request for request in requests if self.seconds[request] is None]
        if not requests:
            return
        branches.end_requests(self.state, requests, len(self.params.drafts))
        forward.replan(self._batch)
        self._plan = self._batch.host_plan()
        for request in requests:
            self.seconds[request] = time.perf_counter() - self._started

    def _windows(self) -> list[tuple[int, int]]:
        return list(zip(self.state.window_start.tolist(), self.state.window_end.tolist(), strict=True))

    def _open_queries(self, plan: HostPlan) -> OpenQueries:
        """Of the planned step, which has not run yet."""
        state = self.state
        differs = (state.tokens != self.params.mask_token_id) & (state.tokens != state.cached_token)
        prompt_lengths, positions, stale = state.prompt_length.tolist(), [], []
        for row, (places, length) in enumerate(
            zip(self._batch.plan.query_position.tolist(), plan.query_lengths, strict=True)
        ):
            prompt = prompt_lengths[row // state.num_branches]
            positions.append([place - prompt for place in places[:length]])
            # Every position that is stale is a query of a row that has any.
            stale.append(differs[row].nonzero().flatten().tolist() if length else [])
        return OpenQueries(positions, stale)
