"""Forwards of the slots of one layout: windows of some requests, whole rows of others, and what follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.decoding.confidences import Confidences
from blockbatch.decoding.graph_pool import MAX_GRAPH_TOKENS, GraphPool
from blockbatch.decoding.graphs import StepGraphs, packed_capacity
from blockbatch.decoding.row_graphs import RowSizes, new_row_graphs, row_sizes
from blockbatch.decoding.rule import RuleRun
from blockbatch.decoding.sampling import BatchSampling
from blockbatch.decoding.slot_layout import HostView, Layout, WholeRows
from blockbatch.decoding.slot_packs import joined, side_by_side
from blockbatch.decoding.slot_pages import PagesView, SlotPages
from blockbatch.decoding.slot_plans import Group, SlotPlans
from blockbatch.decoding.slots import STATUS, Sizes, Slots
from blockbatch_kernels import tuning
from blockbatch_kernels.structs import PHASE_BLOCK, PHASE_INIT, PHASE_REFRESH

# Captured steps of one layout that are kept, and captured forwards of windows with whole rows.
_MOST_GRAPHS, _MOST_MIXED_GRAPHS = 64, 32
# Of the latter, those of more tokens keep the GPU busy for longer than the host needs to launch them. Tokens
# and predictions are rounded up to few sizes.
_MOST_MIXED, _TOKEN_STEP, _PREDICTION_STEP = 1280, 64, 128


class SlotForward:
    """
    Args:
        model: see `Session`.
        pages: shared by all layouts.
        layout: of the slots.
        sizes: of the slots at first.
        fixed_tokens: see `Model.predict`.

    Attributes:
        slots, plans: the requests and what they ask for.
        rows: of the page table; set by whoever lays the table out.
        groups: settings in use, of numbers that `Slots.group` has.
        sampling: how the tokens of each request are drawn; None: they are not.
        confidences: what commits were sure of, kept while `recording`; None: nobody asked so far.
    """

    def __init__(
        self, model, pages: SlotPages, layout: Layout, sizes: Sizes, fixed_tokens: int | None = None
    ) -> None:
        self._model, self.pages, self.layout, self._fixed_tokens = model, pages, layout, fixed_tokens
        self.device, self._backend = model.device, model.backend
        self.rows = slice(0, 0)
        self.groups: list[Group] = []
        self._parts: list[bbk.Predictions] = []  # of full forwards that are not complete
        self.confidences: Confidences | None = None
        self.recording = False
        self._use(Slots(sizes, model.spec.mask_token_id, layout.map_entries, self.device))

    def _use(self, slots: Slots) -> None:
        self.slots, kind = slots, self.layout.sampling
        self.sampling = None if kind is None else BatchSampling(slots.sizes.requests, kind, self.device)
        rule = None
        if self.layout.rule is not None:
            rule = RuleRun(self.layout.rule, self.layout.params, slots.state)
        self._possible = StepGraphs.possible(self._model)
        self._can_capture = self._possible and (rule is None or rule.can_capture)
        self._chosen_rows = torch.zeros(slots.num_rows, dtype=torch.bool, device=self.device)
        self.plans = SlotPlans(slots, rule, self._backend)
        self._sync_source = torch.full_like(self.plans.block.source_row, -1)
        self.forget_graphs()
        size = self._host_part().numel()
        self._host = torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=self.device.type == "cuda")

    def forget_graphs(self) -> None:
        """What captured steps refer to has moved."""
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._pool = GraphPool(self.device)
        self._row_graphs = self._mixed_graphs = None
        if self._possible:
            self._row_graphs = new_row_graphs(self._model, self._pool)
        if self._can_capture:
            self._mixed_graphs = new_row_graphs(self._model, self._pool, _MOST_MIXED_GRAPHS)

    def grow(self, sizes: Sizes) -> Tensor:
        """Makes room; gives the new number of each old row, for the page table."""
        old = self.slots
        rows = torch.arange(old.num_rows, device=self.device)
        number = rows // old.sizes.num_branches * sizes.num_branches + rows % old.sizes.num_branches
        self._parts = [
            part._replace(
                target=torch.where(
                    part.target < 0,
                    -1,
                    number[part.target.clamp(min=0) // old.state.gen_length] * sizes.gen_length
                    + part.target % old.state.gen_length,
                )
            )
            for part in self._parts
        ]
        before, drawn = self.plans.rule, self.sampling
        self._use(old.grown(sizes))
        if before is not None:
            for name, values in before.memory.items():
                self.plans.rule.memory[name][number] = values
        if drawn is not None:
            self.sampling.take_over(drawn)
        if self.confidences is not None:
            self.confidences = self.confidences.moved(self.slots.state, number)
        self.plans.next(self.groups)
        return number

    def run(self, tokens: int, predictions: int, whole: WholeRows, distinct_rows: int) -> None:
        """One forward; returns while the device works.

        Args:
            tokens: of the planned block step.
            predictions: of it, at most.
            distinct_rows: of the block step, see `bbk.attention_plan`.
        """
        if whole.rows:
            self._run_with(tokens, predictions, whole, distinct_rows)
        elif self._can_capture and 0 < tokens <= MAX_GRAPH_TOKENS:
            self._run_captured(self._whole_pieces(packed_capacity(tokens)), distinct_rows, whole.inits_left)
        else:
            self._run_windows(tokens, predictions, distinct_rows, whole.inits_left)

    def read(self) -> HostView:
        """What the last `run` left for the host, which has waited for the device before."""
        rows, requests = self.slots.num_rows, self.slots.sizes.requests
        sizes = [
            *[rows] * 8,
            requests,
            requests,
            requests * len(STATUS),
            requests * self.slots.state.gen_length,
        ]
        *parts, tokens, usage = self._host.split([*sizes, self._host.numel() - sum(sizes)])
        *plans, status = (part.tolist() for part in parts)
        lines = [status[at : at + len(STATUS)] for at in range(0, len(status), len(STATUS))]
        return HostView(*plans, lines, tokens.view(requests, -1), usage.tolist())

    def record(self, wanted: bool) -> None:
        """Whether the confidences of commits are kept from now on."""
        self.recording = wanted
        if wanted and self.confidences is None:
            drafts = self.layout.params is not None and bool(self.layout.params.drafts)
            self.confidences = Confidences(self.slots.state, self.slots.mask_token_id, drafts)

    def refresh_host(self) -> None:
        """Starts the copy that `read` reads."""
        self._host.copy_(self._host_part(), non_blocking=True)
        if self.recording:
            self.confidences.refresh_host()

    def _host_part(self) -> Tensor:
        block, full, slots = self.plans.block, self.plans.full, self.slots
        parts = (block.query_start, block.query_end, full.query_start, full.query_end, full.source_row)
        # Of windows nearly all tokens might predict, of whole rows the generation region: often few do.
        predicted = (block.predict.sum(1, dtype=torch.int32), full.predict.sum(1, dtype=torch.int32))
        masks = (self.plans.blocking.int(), self.plans.refreshing.int())
        status, tokens = slots.status().flatten(), slots.first_rows().flatten()
        return torch.cat((*parts, *predicted, self._sync_source, *masks, status, tokens, self.pages.usage()))

    def _run_windows(self, capacity: int, predict_capacity: int, distinct_rows: int, inits: bool) -> None:
        """A block step alone. Sizes decide what is launched, so that it can be captured."""
        predictions = self._windows(capacity, predict_capacity, distinct_rows)
        self._follow_block(predictions)
        self.plans.next(self.groups, inits=inits)
        self.refresh_host()

    def _run_captured(self, capacity: int, distinct_rows: int, inits: bool) -> None:
        units = self._plans_units(capacity, distinct_rows)
        # With the settings: a group's number is given again, and a graph has its settings inside.
        key = capacity, units, inits, tuple(self.groups), self.recording
        if key in self._graphs:
            self._graphs[key].replay()
            return
        # This step is real work and warms up what a capture must not do: loading kernels, choosing
        # algorithms.
        self._run_windows(capacity, capacity, distinct_rows, inits)
        if len(self._graphs) >= _MOST_GRAPHS:
            self.forget_graphs()

        def step() -> None:
            self._run_windows(capacity, capacity, distinct_rows, inits)

        self._graphs[key], _ = self._pool.capture(step)

    def _plans_units(self, capacity: int, distinct_rows: int) -> bool:
        spec, pages = self._model.spec, self.pages
        sizes = spec.num_heads, spec.num_kv_heads, pages.page_size, pages.page_table.shape[1]
        options = dict(num_tokens=capacity, e4m3=pages.kv.dtype == torch.float8_e4m3fn)
        return tuning.plans_units(*sizes, distinct_rows, self.device, **options)

    def _run_with(self, tokens: int, predictions: int, whole: WholeRows, distinct_rows: int) -> None:
        now = self._mask(whole.rows, self.slots.num_rows)
        if whole.starting:
            self._give_up_pages(whole.starting)
        if tokens == 0:
            block, own = self.plans.no_predictions(), self._whole_rows(now, whole)
        else:
            together = self._together if self.layout.is_open else self._mixed
            block = own = together(tokens, predictions, now, whole, distinct_rows + len(whole.rows))
        self._parts.append(self.plans.of_rows(now, own))
        self._follow_block(block)
        if any(whole.ending.values()):
            self._follow_full(whole.ending)
        self.plans.next(self.groups, inits=whole.inits_left)
        self.refresh_host()

    def _mixed(
        self, tokens: int, predictions: int, now: Tensor, whole: WholeRows, distinct_rows: int
    ) -> bbk.Predictions:
        """Windows of some requests and the rows that `now` [R] marks in one plan."""
        together = tokens + whole.tokens
        most = min(together, whole.predictions + predictions)
        captured = self._mixed_graphs is not None and together <= _MOST_MIXED
        if captured:
            now, together = self._chosen_rows.copy_(now), _up(together, _TOKEN_STEP)
            most = min(_up(most, _PREDICTION_STEP), together)

        def compute() -> bbk.Predictions:
            plan = self.plans.mixed(now)
            self.pages.make_private(self.rows, plan.query_start, plan.query_end)
            return self._predict(plan, together, most, distinct_rows, scattered=False)

        return self._by_graph((together, most), distinct_rows, compute) if captured else compute()

    def _together(
        self, tokens: int, predictions: int, now: Tensor, whole: WholeRows, distinct_rows: int
    ) -> bbk.Predictions:
        """The same with open queries, whose positions are no range: packed apart, computed as one."""
        size, most = whole.tokens, min(whole.predictions, whole.tokens)
        captured = self._mixed_graphs is not None and tokens + size <= _MOST_MIXED
        if captured:
            now, tokens, size = self._chosen_rows.copy_(now), _up(tokens, _TOKEN_STEP), _up(size, _TOKEN_STEP)
            predictions, most = tokens, min(_up(most, _PREDICTION_STEP), size)
        room = (
            self._whole_pieces(tokens + size) - tokens,
            self._whole_pieces(predictions + most) - predictions,
        )

        def compute() -> bbk.Predictions:
            block, alone = self.plans.block, self.plans.whole(now)
            self.pages.make_private(self.rows, block.query_start, block.query_end, block.query_position)
            self.pages.make_private(self.rows, alone.query_start, alone.query_end)
            windows = self._pack(block, tokens, predictions, scattered=True)
            rows = self._pack(alone, *room, scattered=False)
            view = self._view(distinct_rows)
            return self._forward(*side_by_side(windows, rows, view, self.slots.seqlens_k))

        return self._by_graph((tokens, predictions, *room), distinct_rows, compute) if captured else compute()

    def _by_graph(
        self, sizes: tuple[int, ...], distinct_rows: int, compute: Callable[[], bbk.Predictions]
    ) -> bbk.Predictions:
        units = self._plans_units(sizes[0] + (sizes[2] if self.layout.is_open else 0), distinct_rows)
        # With the settings: those of some ask for probabilities of EOS.
        return self._mixed_graphs.run((sizes, units, tuple(self.groups)), compute)

    def _whole_rows(self, now: Tensor, whole: WholeRows) -> bbk.Predictions:
        """The forward of whole rows alone, which `now` [R] marks."""
        count = len(whole.rows)
        most = count * self.slots.state.gen_length
        sizes = RowSizes(whole.tokens, min(whole.predictions, whole.tokens), count, captured=False)
        if self._row_graphs is not None:
            sizes = row_sizes(whole.tokens, whole.predictions, count, most)
        if sizes.captured:
            now = self._chosen_rows.copy_(now)

        def compute() -> bbk.Predictions:
            plan = self.plans.whole(now)
            self.pages.make_private(self.rows, plan.query_start, plan.query_end)
            return self._predict(plan, sizes.tokens, sizes.predictions, count, scattered=False)

        # With the settings: those of some ask for probabilities of EOS.
        return self._row_graphs.run((sizes, tuple(self.groups)), compute) if sizes.captured else compute()

    def _windows(self, capacity: int, predict_capacity: int, distinct_rows: int) -> bbk.Predictions:
        if capacity == 0:
            return self.plans.no_predictions()
        plan, scattered = self.plans.block, self.layout.is_open
        positions = plan.query_position if scattered else None
        self.pages.make_private(self.rows, plan.query_start, plan.query_end, positions)
        return self._predict(plan, capacity, predict_capacity, distinct_rows, scattered=scattered)

    def _predict(
        self,
        plan: bbk.StepPlan,
        capacity: int,
        predict_capacity: int,
        distinct_rows: int,
        *,
        scattered: bool,
    ) -> bbk.Predictions:
        capacity, predict_capacity = (self._whole_pieces(size) for size in (capacity, predict_capacity))
        packed = self._pack(plan, capacity, predict_capacity, scattered=scattered)
        return self._forward(packed, self._view(distinct_rows), self.slots.seqlens_k)

    def _view(self, distinct_rows: int) -> PagesView:
        return self.pages.view(self.rows, distinct_rows, self.slots.sizes.num_branches)

    def _pack(
        self, plan: bbk.StepPlan, capacity: int, predict_capacity: int, *, scattered: bool
    ) -> bbk.PackedQueries:
        return bbk.pack_windows(
            self.slots.state,
            plan,
            self.pages.page_table[self.rows],
            page_size=self.pages.page_size,
            capacity=capacity,
            predict_capacity=predict_capacity,
            prediction_offset=self._model.spec.prediction_offset,
            scattered=scattered,
            backend=self._backend,
        )

    def _forward(self, packed: bbk.PackedQueries, view: PagesView, seqlens_k: Tensor) -> bbk.Predictions:
        slots, model = self.slots, self._model
        options = {} if self._fixed_tokens is None else dict(fixed_tokens=self._fixed_tokens)
        if self.sampling is not None:
            options["sampling"] = self.sampling.draw(slots.state, packed.predict_target)
        if self.layout.map_entries:
            return model.predict(packed, view, seqlens_k, likely=True, **options)
        probe_tokens = None
        if any(params.eos_exit == "window" for _, params in self.groups):
            probe_tokens = slots.state.tokens.flatten()[packed.predict_target.clamp(min=0)]
        return model.predict(packed, view, seqlens_k, probe_tokens, **options)

    def _whole_pieces(self, tokens: int) -> int:
        """Room for so many tokens in pieces of `fixed_tokens`."""
        size = self._fixed_tokens
        return tokens if size is None else -(-max(tokens, 1) // size) * size

    def _follow_block(self, predictions: bbk.Predictions) -> None:
        plans = self.plans
        sources = self._policy(plans.blocking, predictions, plans.block, PHASE_BLOCK)
        self._sync_source.copy_(sources)

    def _policy(
        self, members: Tensor, predictions: bbk.Predictions, plan: bbk.StepPlan, phase: int
    ) -> Tensor:
        """Goes on with requests; gives the rows of syncs, whose pages are shared."""
        masked = self.confidences.before() if self.recording else None
        sources = self.plans.policy(members, predictions, plan, phase, self.groups)
        if masked is not None:
            self.confidences.after(masked, sources)
        self.pages.share(self.rows, sources)
        return sources

    def _follow_full(self, ending: dict[int, list[int]]) -> None:
        """Goes on with requests whose init or refresh is complete."""
        plans, slots = self.plans, self.slots
        predictions = joined(self._parts)
        everyone = [slot for ended in ending.values() for slot in ended]
        rows = slots.by_row(self._mask(everyone, slots.sizes.requests))
        self.pages.share(self.rows, torch.where(rows, plans.full.source_row, -1))
        for phase in (PHASE_INIT, PHASE_REFRESH):
            if not ending.get(phase):
                continue
            members = self._mask(ending[phase], slots.sizes.requests)
            sources = self._policy(members, predictions, plans.full, phase)
            self._sync_source.copy_(torch.where(sources < 0, self._sync_source, sources))
            if phase == PHASE_INIT:
                slots.begun.logical_or_(members)
        self.forget_parts(everyone)

    def forget_parts(self, slots: list[int]) -> None:
        """Lets go of what rows of these requests predicted so far."""
        if not self._parts or not slots:
            return
        kept = self.slots.by_row(~self._mask(slots, self.slots.sizes.requests))
        self._parts = [self.plans.of_rows(kept, part) for part in self._parts]

    def forget_all_parts(self) -> None:
        """The same where no full forward is left half done."""
        self._parts = []

    def _give_up_pages(self, starting: list[int]) -> None:
        """Rows that will take over another row's result give up their pages first, so that the row they copy
        does not leave a page only because of them."""
        source, own = self.plans.full.source_row, self.plans.row
        starts = self.slots.by_row(self._mask(starting, self.slots.sizes.requests))
        self.pages.forget(self.rows, starts & (source >= 0) & (source != own))

    def _mask(self, members: list[int], size: int) -> Tensor:
        """[size] bool, True at the numbers."""
        mask = torch.zeros(size, dtype=torch.bool, device="cpu", pin_memory=self.device.type == "cuda")
        mask[members] = True
        return mask.to(self.device, non_blocking=True)


def _up(size: int, step: int) -> int:
    """The next multiple."""
    return -(-size // step) * step
