"""Requests of a block-causal model in the engine: a program for each, whose forwards go together."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from blockbatch import devices, kv_cache
from blockbatch.branches import RequestOutcome
from blockbatch.config import DecodeConfig
from blockbatch.decoding.admission import rows_within
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.block_pool import GROWTH, page_bytes, scratch_pages, shared_forward
from blockbatch.decoding.block_session import BlockSession
from blockbatch.decoding.block_text import Forward
from blockbatch.decoding.choice import sampling_for
from blockbatch.decoding.confidences import TextConfidences
from blockbatch.decoding.graph_pool import pool_bytes
from blockbatch.decoding.lane import Counts, Seat
from blockbatch.decoding.session import ROW_TOKENS
from blockbatch.models import transformer
from blockbatch.parallel import HostDigest, share_of


class BlockLane:
    """See `lane.Lane`. A text's pages come from the model's pool, block after block as it grows.

    Args:
        max_requests: that run at a time.
        max_tokens_per_step: prompts beyond it wait for the next forward; None: ROW_TOKENS.
        deterministic: not to be had here yet.
        cache_tokens: positions of the pool; None: what the device has free.

    Raises:
        ValueError: `deterministic`.
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
        if deterministic:
            raise ValueError(
                f"deterministic: expected False for {model.spec.family}, whose attention is block-causal, "
                "got True"
            )
        self._model, self._forward = model, shared_forward(model)
        self._budget = max_tokens_per_step or ROW_TOKENS[model.device.type]
        pool = self._forward.pool
        if cache_tokens is None:
            limit = model.cache_bytes
            if limit is None:
                work = transformer.activation_bytes(
                    model.spec, model.dtype, self._budget, quantization=model.quantization
                )
                free = devices.free_bytes(model.device) - pool_bytes(model.device)
                limit = max(0, free - work) // GROWTH
            self.num_pages = share_of(model).least("pages of an engine's cache", limit // page_bytes(model))
        else:
            self.num_pages = kv_cache.pages_per_row(cache_tokens)
        pool.most_pages = max(self.num_pages, len(pool))
        self.counts = Counts(dict.fromkeys(("prefill", "denoise", "store"), 0))
        self._seats: list[Seat] = []
        self._kept: dict[Seat, TextConfidences] = {}

    def pages_of(self, method: BlockMethod, config: DecodeConfig, prompt: int) -> int:
        positions = self._model.spec.max_length if method.grow else method.positions(prompt)
        return kv_cache.pages_per_row(positions) + scratch_pages(method)

    def join(self, seat: Seat) -> None:
        with devices.turn(self._model.device):
            prompt = seat.request.prompt
            sampling = None
            if seat.method.sampling is not None:
                sampling = [sampling_for(self._model, seat.config, 0)]
            about = self._model, [prompt], seat.method, self._forward
            seat.place = BlockSession(*about, sampling=sampling, in_engine=True)
        self._seats.append(seat)

    @torch.inference_mode()
    def step(self, meanwhile: Callable[[], None]) -> list[Seat]:
        meanwhile()  # the forwards wait for their results themselves
        device = self._model.device
        with devices.turn(device), devices.memory_errors(device, "the next forward"):
            chosen = self._chosen()
            predicted = self._run([seat for seat, _ in chosen])
        for seat, _ in chosen:
            self._receive(seat, predicted[seat])
        # A request may end without a forward.
        took_part = [seat for seat, _ in chosen]
        ended = [seat for seat in self._seats if seat.place.asked(0) is None and seat not in took_part]
        for seat in ended:
            seat.done = True
        self._count(chosen)
        return took_part + ended

    def _run(self, seats: list[Seat]) -> dict[Seat, list]:
        """What each of the requests is sent; those that draw their tokens in the same way run together."""
        predicted = {}
        for kind in dict.fromkeys(seat.method.sampling for seat in seats):  # on all ranks in this order
            members = [seat for seat in seats if seat.method.sampling == kind]
            rows = {seat: seat.place.rows(0) for seat in members}
            every = [row for seat in members for row in rows[seat]]
            found = iter(self._forward.run(every, ROW_TOKENS[self._model.device.type]))
            predicted |= {seat: list(itertools.islice(found, len(rows[seat]))) for seat in members}
        return predicted

    def _chosen(self) -> list[tuple[Seat, Forward]]:
        """Those whose forwards run now: every block, and of the prompts what the budget has room for."""
        asked = [(seat, seat.place.asked(0)) for seat in self._seats]
        asked = [(seat, forward) for seat, forward in asked if forward is not None]
        tokens = [sum(len(row.ids) for row in forward.rows) for _, forward in asked]
        prompts = [
            index
            for index, (seat, _) in enumerate(asked)
            if tokens[index] > (max(len(seat.method.block_sizes), 1) + 1) * seat.method.block_size
        ]
        blocks = sum(tokens) - sum(tokens[index] for index in prompts)
        counts = rows_within([[tokens[index]] for index in prompts], self._budget - blocks)
        waiting = {index for index, count in zip(prompts, counts, strict=True) if not count}
        return [pair for index, pair in enumerate(asked) if index not in waiting]

    def _receive(self, seat: Seat, predicted: list) -> None:
        session = seat.place
        try:
            session.receive(0, predicted)
        except RuntimeError as error:  # of this request alone: a model that predicts NaN, or MASK
            seat.error = error.with_traceback(None)
            return
        text = session.texts[0]
        if seat.wants_confidences:
            kept = self._kept.setdefault(seat, TextConfidences())
            kept.note(text)
            seat.confidences = kept.of(0, text.prompt_length, text.settled)
        text.commits.clear()
        seat.prefix = session.final_prefixes()[0]
        seat.done = session.asked(0) is None
        seat.nfe = session.outcome(0).nfe

    def _count(self, chosen: list[tuple[Seat, Forward]]) -> None:
        counts = self.counts
        kinds = {f.kind if f.kind in counts.forwards else "denoise" for _, f in chosen}
        for kind in kinds:
            counts.forwards[kind] += 1
        counts.steps += bool(chosen)
        counts.tokens += sum(len(row.ids) for _, forward in chosen for row in forward.rows)

    def end(self, seat: Seat) -> RequestOutcome:
        seat.place.end(0)
        return seat.place.outcome(0)

    def confidences(self, seat: Seat, branch: int) -> list[float]:
        text = seat.place.texts[0]
        if seat not in self._kept:  # it ended before a forward
            return []
        return self._kept[seat].of(branch, text.prompt_length, text.settled)

    def leave(self, seat: Seat) -> None:
        self._kept.pop(seat, None)
        if seat.place is not None:
            seat.place.end(0)
        if seat in self._seats:
            self._seats.remove(seat)

    def states(self) -> list[HostDigest]:
        """See `lane.Lane`."""
        return [HostDigest(self._told)]

    def _told(self) -> str:
        return repr([(seat.request.id, seat.place.told()) for seat in self._seats])

    def pages_in_use(self) -> int:
        """Pages that texts hold, beside those that are kept for texts to come."""
        return self._forward.pool.held()
