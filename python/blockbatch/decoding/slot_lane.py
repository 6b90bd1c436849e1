"""Requests of a model with full attention in the engine: windows and whole rows in one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import blockbatch_kernels as bbk
from blockbatch import devices, kv_cache
from blockbatch.branches import NFE, RequestOutcome
from blockbatch.config import DecodeConfig
from blockbatch.decoding.admission import rows_within
from blockbatch.decoding.choice import sampling_for
from blockbatch.decoding.graph_pool import MAX_GRAPH_TOKENS, pool_bytes
from blockbatch.decoding.lane import Counts, Seat
from blockbatch.decoding.method import Method
from blockbatch.decoding.non_finite import NonFiniteLogitsError
from blockbatch.decoding.slot_forward import SlotForward
from blockbatch.decoding.slot_layout import HostView, Layout, WholeRows, layout_of
from blockbatch.decoding.slot_pages import SlotPages
from blockbatch.decoding.slots import Sizes
from blockbatch.models import transformer
from blockbatch.parallel import share_of
from blockbatch_kernels import PolicyParams
from blockbatch_kernels.structs import PHASE_BLOCK, PHASE_INIT, PHASE_REFRESH

# Slots of a layout at first; they double until there are as many as may run.
_FIRST_SLOTS = 8
# On a GPU sizes are rounded up, so that slots seldom grow and graphs are seldom captured anew.
_GPU_STEPS = Sizes(1, 1, 64, 64)
# Layouts that are kept for requests to come; more are there as long as requests use them.
_MOST_LAYOUTS = 4
# Tokens of a forward beyond which whole rows wait. On a GPU 1024 instead of 2048 costs 3% of the tokens a
# second at 32 requests, and windows wait for 29 ms at most in place of 43 (serve_budgets.json, serve.json).
STEP_TOKENS = {"cuda": 1024, "cpu": 8192}
# Tokens of every product of an engine whose bits do not depend on the batch: as many as cost little more
# than the reading of the weights.
FIXED_TOKENS = 256
# Of what is free, the cache's part; the rest is for decodes beside the engine.
_CACHE_SHARE = 0.9
# Branches that the cache is made for.
_USUAL_BRANCHES = 6


@dataclass
class Place:
    """Where a request is, as the host knows it.

    Attributes:
        forward, slot: what holds its state.
        rows: of its slots that it uses, branches first.
        group: number of its settings among those in use.
        windows: tokens of its planned block step; None: it waits for a full forward.
        phase: of the forward that it waits for.
        predictions: of its planned block step.
        waiting: rows that its full forward still has to compute, with their tokens and predictions.
        since: turn of the engine in which it came to wait.
        started: whether some of them are computed.
        sources: of each row, whose K/V it shared behind the last full forward.
    """

    forward: SlotForward
    slot: int
    rows: list[int]
    group: int
    windows: int | None = None
    phase: int = PHASE_INIT
    predictions: int = 0
    waiting: list[tuple[int, int, int]] = field(default_factory=list)
    since: int = 0
    started: bool = False
    sources: dict[int, int] = field(default_factory=dict)


class SlotLane:
    """See `lane.Lane`.

    Args:
        max_requests: that run at a time.
        max_tokens_per_step: whole rows beyond it wait for the next forward; None: STEP_TOKENS.
        deterministic: whether a request's bits are to be the same in any company.
        cache_tokens: positions of the cache; None: what the device has free.
    """

    def __init__(
        self,
        model,
        *,
        max_requests: int,
        max_tokens_per_step: int | None,
        deterministic: bool,
        cache_tokens: int | None,
    ) -> None:
        self._model, self._device, self._max_requests = model, model.device, max_requests
        self._fixed_tokens = FIXED_TOKENS if deterministic else None
        self._budget = max_tokens_per_step or STEP_TOKENS[model.device.type]
        with devices.turn(model.device), devices.memory_errors(model.device, "the K/V cache"):
            devices.reclaim(model.device)
            self.num_pages = self._affordable_pages(cache_tokens)
            on_gpu = model.device.type == "cuda"
            # Captured steps refer to the cache, so on a GPU it is made whole; a CPU's grows.
            self._pages = SlotPages(model, self.num_pages if on_gpu else 0)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._forwards: dict[Layout, SlotForward] = {}
        self._seats: list[Seat] = []
        self._turn = 0
        self._stream = None
        self.counts = Counts(dict.fromkeys(bbk.PHASES, 0))

    def pages_of(self, method: Method, config: DecodeConfig, prompt: int) -> int:
        return len(method.block_sizes) * kv_cache.pages_per_row(prompt + config.gen_length)

    @torch.inference_mode()
    def join(self, seat: Seat) -> None:
        with devices.turn(self._device), devices.memory_errors(self._device, "a request"):
            self._join_stream()
            self._join(seat)

    def _join(self, seat: Seat) -> None:
        method, prompt, gen_length = seat.method, seat.request.prompt, seat.config.gen_length
        needed = Sizes(1, len(method.block_sizes), gen_length, max(len(prompt), 1))
        layout = layout_of(method, gen_length)
        forward = self._forward_of(layout, needed, len(prompt) + gen_length)
        reserved = seat.pages + sum(other.pages for other in self._seats)
        if reserved > self._pages.num_pages:
            self._pages.grow_pages(min(self.num_pages, max(reserved, 2 * self._pages.num_pages)))
        slot = min(set(range(forward.slots.sizes.requests)) - self._taken(forward))
        group = self._group_of(forward, method.params)
        seat.place = Place(forward, slot, list(range(len(method.block_sizes))), group, since=self._turn)
        self._seats.append(seat)
        forward.slots.join(slot, prompt, method, gen_length, group)
        if forward.plans.rule is not None:
            forward.plans.rule.reset(forward.slots.rows_of(slot))
        if forward.sampling is not None:
            drawn = sampling_for(self._model, seat.config, 0)
            forward.sampling.write(slot, [drawn], [len(prompt)])
        self._set_groups(forward)
        forward.plans.plan_inits(forward.groups)
        seat.place.waiting = [(0, len(prompt) + gen_length, gen_length)]
        seat.place.sources = dict.fromkeys(seat.place.rows, 0)

    @torch.inference_mode()
    def step(self, meanwhile: Callable[[], None]) -> list[Seat]:
        with devices.turn(self._device), devices.memory_errors(self._device, "the next forward"):
            self._join_stream()
            self._turn += 1
            chosen = self._choose_rows()
            ran = []
            for forward in self._forwards.values():
                seats = [seat for seat in self._seats if seat.place.forward is forward]
                blocking = [seat for seat in seats if seat.place.windows is not None]
                picked = {seat: chosen[seat] for seat in seats if chosen.get(seat)}
                if blocking or picked:
                    ran.append((forward, blocking, picked, self._run(forward, blocking, picked)))
            if self._copied is not None:
                self._copied.record()
            meanwhile()
            if self._copied is not None:
                self._copied.synchronize()
            took_part = []
            for forward, blocking, picked, ending in ran:
                view = forward.read()
                self.counts.shared_pages = max(0, view.usage[0] - view.usage[1])
                took_part += self._note(forward, view, blocking, picked, ending)
            return took_part

    def _choose_rows(self) -> dict[Seat, int]:
        """How many of its waiting rows each request computes in the next forward."""
        waiting = sorted(
            (seat for seat in self._seats if seat.place.windows is None),
            key=lambda seat: (seat.place.since, seat.request.id),
        )
        windows = sum(seat.place.windows or 0 for seat in self._seats)
        tokens = [[tokens for _, tokens, _ in seat.place.waiting] for seat in waiting]
        return dict(zip(waiting, rows_within(tokens, self._budget - windows), strict=True))

    def _run(self, forward: SlotForward, blocking: list[Seat], picked: dict[Seat, int]) -> list[Seat]:
        """Starts a forward; gives the seats whose full forward it completes."""
        rows, ending, by_phase = [], [], {PHASE_INIT: [], PHASE_REFRESH: []}
        tokens = predictions = 0
        starting = [seat.place.slot for seat in picked if not seat.place.started]
        for seat, count in picked.items():
            place = seat.place
            first = forward.slots.rows_of(place.slot).start
            rows += [first + row for row, _, _ in place.waiting[:count]]
            tokens += sum(size for _, size, _ in place.waiting[:count])
            predictions += sum(number for _, _, number in place.waiting[:count])
            if count == len(place.waiting):
                ending.append(seat)
                by_phase[place.phase].append(place.slot)
        windows = sum(seat.place.windows for seat in blocking)
        predicted = sum(seat.place.predictions for seat in blocking)
        distinct = sum(len(set(seat.place.sources.values())) for seat in blocking)
        inits_left = any(
            seat.place.windows is None and seat.place.phase == PHASE_INIT and seat not in ending
            for seat in self._of(forward)
        )
        whole = WholeRows(rows, starting, by_phase, tokens, predictions, inits_left)
        forward.run(windows, predicted, whole, distinct)
        for seat, count in picked.items():
            seat.place.waiting, seat.place.started = seat.place.waiting[count:], True
        if not any(seat.place.started and seat.place.waiting for seat in self._of(forward)):
            forward.forget_all_parts()
        phases = {seat.place.phase for seat in picked} | ({PHASE_BLOCK} if blocking else set())
        for phase in phases:
            self.counts.forwards[bbk.PHASES[phase]] += 1
        self.counts.steps += 1
        self.counts.tokens += windows + tokens
        refreshing = [count for seat, count in picked.items() if seat.place.phase == PHASE_REFRESH]
        self.counts.refreshes += sum(refreshing)
        return ending

    def _note(
        self,
        forward: SlotForward,
        view: HostView,
        blocking: list[Seat],
        picked: dict[Seat, int],
        ending: list[Seat],
    ) -> list[Seat]:
        """Takes over what the forward left for the host; gives the requests that went on."""
        for seat in ending:
            place = seat.place
            place.started = False
        for seat in (*blocking, *ending):
            place, last = seat.place, seat.place.phase if seat in picked else PHASE_BLOCK
            status = view.status[place.slot]
            finished, stalled, non_finite, final, *nfe = status
            if final != len(seat.prefix):  # it only grows
                seat.prefix = view.tokens[place.slot, :final].tolist()
            seat.nfe = NFE(*nfe)
            if seat.wants_confidences:
                seat.confidences = forward.confidences.first_row(place.slot, final)
            if non_finite:
                seat.error = NonFiniteLogitsError(
                    "prompt", 0, bbk.PHASES[last], nfe[last], sum(nfe), self._model.dtype
                )
            elif stalled and not finished:
                seat.error = RuntimeError(
                    f"model: expected predictions other than MASK (id {seat.method.params.mask_token_id}), "
                    "got more commits than positions: the model keeps predicting its own MASK token"
                )
            seat.done = bool(finished) and seat.error is None
            if not finished:
                self._plan(forward, view, seat)
        return [*blocking, *ending]

    def _plan(self, forward: SlotForward, view: HostView, seat: Seat) -> None:
        """What the next plan asks of a request."""
        place = seat.place
        rows = forward.slots.rows_of(place.slot)
        own = [rows.start + row for row in place.rows]
        if view.blocking[place.slot]:
            place.windows = sum(view.block_end[row] - view.block_start[row] for row in own)
            place.predictions = sum(view.block_predictions[row] for row in own)
            place.phase = PHASE_BLOCK
            return
        place.windows, place.phase, place.since = None, PHASE_REFRESH, self._turn
        place.waiting = [
            (row - rows.start, view.full_end[row] - view.full_start[row], view.full_predictions[row])
            for row in own
            if view.full_end[row] > view.full_start[row]
        ]
        for row in own:
            if view.full_source[row] >= 0:
                place.sources[row - rows.start] = view.full_source[row] - rows.start

    def end(self, seat: Seat) -> RequestOutcome:
        place = seat.place
        with devices.turn(self._device), torch.inference_mode():
            self._join_stream()
            return place.forward.slots.outcome(place.slot, seat.method, seat.config.gen_length)

    @torch.inference_mode()
    def confidences(self, seat: Seat, branch: int) -> list[float]:
        place = seat.place
        row = place.forward.slots.rows_of(place.slot).start + branch
        return place.forward.confidences.values[row, : seat.config.gen_length].tolist()

    @torch.inference_mode()
    def leave(self, seat: Seat) -> None:
        if seat not in self._seats:
            return
        place, forward = seat.place, seat.place.forward
        self._seats.remove(seat)
        with devices.turn(self._device):
            self._join_stream()
            rows = self._table_rows(place)
            if seat.error is not None:
                self._pages.clear(rows)
            self._pages.page_table[rows] = -1
            forward.forget_parts([place.slot])
            forward.slots.leave(place.slot)
            forward.plans.drop(place.slot)
            self._set_groups(forward)

    def states(self) -> list[bbk.BranchState]:
        return [forward.slots.state for forward in self._forwards.values()]

    def pages_in_use(self) -> int:
        """Pages that stand in the page table. Waits for the device."""
        return int(self._pages.usage()[1])

    def _table_rows(self, place: Place) -> slice:
        own = place.forward.slots.rows_of(place.slot)
        return slice(place.forward.rows.start + own.start, place.forward.rows.start + own.stop)

    def _of(self, forward: SlotForward) -> list[Seat]:
        return [seat for seat in self._seats if seat.place.forward is forward]

    def _taken(self, forward: SlotForward) -> set[int]:
        return {seat.place.slot for seat in self._of(forward)}

    def _set_groups(self, forward: SlotForward) -> None:
        present = {seat.place.group: seat.method.params for seat in self._of(forward)}
        forward.groups = sorted(present.items())
        forward.record(any(seat.wants_confidences for seat in self._of(forward)))

    def _group_of(self, forward: SlotForward, params: PolicyParams) -> int:
        """The number of these settings: that of requests that have them, or one that is free."""
        numbers = {seat.method.params: seat.place.group for seat in self._of(forward)}
        free = set(range(len(numbers) + 1)) - set(numbers.values())
        return numbers.get(params, min(free))

    def _forward_of(self, layout: Layout, needed: Sizes, canvas: int) -> SlotForward:
        """The slots of a layout, with one free and large enough, and a page table for them."""
        if self._device.type == "cuda":
            exact = layout.gen_length is not None
            steps = _GPU_STEPS._replace(gen_length=1) if exact else _GPU_STEPS
            needed = Sizes(*(-(-size // step) * step for size, step in zip(needed, steps)))
            canvas = needed.max_prompt + needed.gen_length
        columns = max(kv_cache.pages_per_row(canvas), self._pages.page_table.shape[1])
        forward = self._forwards.get(layout)
        numbers: dict[SlotForward, torch.Tensor] = {}
        if forward is None:
            idle = [key for key, other in self._forwards.items() if not self._of(other)]
            for key in idle[: max(0, len(self._forwards) + 1 - _MOST_LAYOUTS)]:
                del self._forwards[key]
            sizes = needed._replace(requests=min(_FIRST_SLOTS, self._max_requests))
            forward = self._forwards[layout] = SlotForward(
                self._model, self._pages, layout, sizes, self._fixed_tokens
            )
        else:
            sizes = forward.slots.sizes
            if len(self._taken(forward)) == sizes.requests:
                needed = needed._replace(requests=min(2 * sizes.requests, self._max_requests))
            if sizes.covering(needed) != sizes:
                numbers[forward] = forward.grow(sizes.covering(needed))
        num_rows = sum(other.slots.num_rows for other in self._forwards.values())
        if numbers or forward.rows.stop == 0 or self._pages.page_table.shape != (num_rows, columns):
            self._lay_out(numbers, num_rows, columns)
        return forward

    def _lay_out(self, numbers: dict[SlotForward, torch.Tensor], num_rows: int, columns: int) -> None:
        """A larger page table."""
        moves, start = [], 0
        for forward in self._forwards.values():
            old = torch.arange(forward.rows.start, forward.rows.stop, device=self._device)
            local = numbers.get(forward, old - forward.rows.start)
            moves.append((old, start + local))
            forward.rows = slice(start, start + forward.slots.num_rows)
            start += forward.slots.num_rows
        self._pages.lay_out(moves, num_rows, columns)
        for forward in self._forwards.values():
            forward.forget_graphs()

    def _affordable_pages(self, cache_tokens: int | None) -> int:
        """Pages for what may run at most, as far as memory goes."""
        model, spec = self._model, self._model.spec
        each = kv_cache.cache_bytes(
            1,
            kv_cache.PAGE_SIZE,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=model.kv_dtype,
        )
        if cache_tokens is not None:
            return kv_cache.pages_per_row(cache_tokens)
        limit = model.cache_bytes
        if limit is None:
            # Of whole rows, of windows as they are and as they are captured, and what the state takes.
            most, kind = max(self._budget, MAX_GRAPH_TOKENS), model.quantization
            work = 4 * transformer.activation_bytes(spec, model.dtype, most, quantization=kind)
            free = devices.free_bytes(self._device) - pool_bytes(self._device) - work
            limit = int(free * _CACHE_SHARE)
        most = self._max_requests * _USUAL_BRANCHES * kv_cache.pages_per_row(spec.max_length)
        return share_of(model).least("pages of an engine's cache", max(0, min(limit // each, most)))

    def _join_stream(self) -> None:
        """Work of the current stream comes behind what another one may still run on these buffers."""
        if self._device.type != "cuda":
            return
        current = torch.cuda.current_stream(self._device)
        if self._stream is not None and self._stream != current:
            current.wait_stream(self._stream)
        self._stream = current
