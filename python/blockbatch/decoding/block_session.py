"""A batch of texts of a block-causal model from the first forward to the last."""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import blockbatch_kernels as bbk
from blockbatch import devices
from blockbatch.branches import BlockNFE, RequestOutcome
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.block_forward import BlockForward, Predicted, Row
from blockbatch.decoding.block_programs import PROGRAMS
from blockbatch.decoding.block_text import BlockText, Forward
from blockbatch.decoding.non_finite import NonFiniteLogitsError
from blockbatch.decoding.sampling import RequestSampling, RowSampling
from blockbatch.decoding.session import ROW_TOKENS, Stops
from blockbatch.parallel import HostDigest, share_of

# What forwards count as; a fused one is a denoise forward that stores on the way.
_COUNTS = {"prefill": "prefill", "store": "store"}


class BlockStep(NamedTuple):
    """One turn of the loop, for observers.

    Attributes:
        phase: the kind of the first running request's forward.
        records: for each request that took part its trace record; None unless the session is observed.
        seconds: of the whole turn.
    """

    phase: str
    records: dict[int, dict[str, Any]] | None
    seconds: float


class BlockSession:
    """Decodes a batch of prompts; `step()` runs one forward and returns None when every request is finished.

    Every request asks for a forward of its own kind; all of a turn run as one packed forward.

    Args:
        model: anything with the attributes `spec` and `device` and the method `predict` of
            `blockbatch.models.Model`.
        prompts: token ids, one list for each request.
        method: how to decode.
        forward: of the model; several sessions may share it, one forward after the other.
        observed: whether steps tell what every forward did.
        stops: asked before every forward; None: the programs alone end requests.
        sampling: of each request, where the method draws tokens; else None.
        in_engine: whether an engine runs the forwards, and `step` is not called.
    """

    tells_records = True

    def __init__(
        self,
        model,
        prompts: list[list[int]],
        method: BlockMethod,
        forward: BlockForward,
        *,
        observed: bool = False,
        stops: Stops | None = None,
        sampling: Sequence[RequestSampling] | None = None,
        in_engine: bool = False,
    ) -> None:
        self.model, self.params, self.observed, self.stops = model, method, observed, stops
        self._forward, pool, self._sampling = forward, forward.pool, sampling
        cached = method.block_size if method.prefix_cache else None
        about = (pool, model.spec.max_length, method.mask_token_id, cached, method.grow)
        self.texts = [BlockText(prompt, *about) for prompt in prompts]
        # Texts that nobody waits for any more give their pages back.
        self._returned = weakref.finalize(self, _release, self.texts)
        self._counts = [dict.fromkeys(("prefill", "denoise", "store"), 0) for _ in prompts]
        self._reasons: list[str | None] = [None] * len(prompts)
        self.seconds: list[float | None] = [None] * len(prompts)
        self._started = time.perf_counter()
        self._programs = [PROGRAMS[method.program](text, method) for text in self.texts]
        self._asked: list[Forward | None] = [None] * len(prompts)
        for request in range(len(prompts)):
            self._go_on(request, None)
        if not in_engine:
            told = HostDigest(functools.partial(_told, self.texts, self._counts))
            self._ranks = share_of(model).decode(told, (prompts, method))

    @torch.inference_mode()
    def step(self) -> BlockStep | None:
        """One forward, in a turn of the device.

        Raises:
            MemoryError: the device ran out of memory although what a decode needs was there before it began.
            NonFiniteLogitsError: the forward gave NaN or infinity.
        """
        device = self.model.device
        with devices.turn(device), devices.memory_errors(device, "the next forward"):
            return self._step()

    def _step(self) -> BlockStep | None:
        if self.stops is not None and any(self._asked):
            for request in self.stops.ended(self.final_prefixes()):
                self.end(request)
        running = [request for request, asked in enumerate(self._asked) if asked is not None]
        if not running:
            return None
        begun = time.perf_counter()
        forwards = [self.asked(request) for request in running]
        phase = forwards[0].kind
        records = None
        if self.observed:
            records = {request: self._begin_record(request) for request in running}
        rows = [row for request in running for row in self.rows(request)]
        with self._ranks:
            predicted = self._forward.run(rows, ROW_TOKENS[self.model.device.type])
        done = 0
        for request, forward in zip(running, forwards, strict=True):
            self.receive(request, predicted[done : done + len(forward.rows)])
            done += len(forward.rows)
        self._ranks.sample()
        self._ranks.compare(sum(asked is not None for asked in self._asked))
        seconds = time.perf_counter() - begun
        if records is not None:
            for request, record in records.items():
                self._end_record(request, record, seconds)
        for text in self.texts:
            text.commits.clear()
        return BlockStep(phase, records, seconds)

    def asked(self, request: int) -> Forward | None:
        """The forward that a request waits for; None: it is finished."""
        return self._asked[request]

    def rows(self, request: int) -> list[Row]:
        """Of the forward that a request waits for, as they are to be run."""
        return self._drawn(request, self._asked[request].rows)

    def receive(self, request: int, predicted: list[Predicted]) -> None:
        """Goes on with what the forward that a request asked for predicts, for each of its rows.

        Raises:
            NonFiniteLogitsError: that is NaN or infinity.
        """
        kind = self._asked[request].kind
        self._counts[request][_COUNTS.get(kind, "denoise")] += 1
        self._refuse_non_finite(request, kind, predicted)
        self._go_on(request, predicted)

    def end(self, request: int) -> None:
        """Ends a request where it stands, if it runs."""
        if self._asked[request] is not None:
            self._end(request, "length")

    def run(self) -> None:
        while self.step() is not None:
            pass

    def told(self) -> str:
        """What all ranks of a model must have alike."""
        return _told(self.texts, self._counts)

    def final_prefixes(self) -> list[list[int]]:
        """For each request the tokens behind the prompt that are final, up to the first MASK."""
        return [text.ids[text.prompt_length : text.settled] for text in self.texts]

    def outcome(self, request: int) -> RequestOutcome:
        """The end of a finished request."""
        text = self.texts[request]
        return RequestOutcome(
            canvas=self._canvas(text),
            nfe=BlockNFE(**self._counts[request]),
            winner=text.winner,
            stop_reason=self._reasons[request] or "length",
            branches=text.branch_results(self.params),
            prefix_tokens=text.found,
        )

    @property
    def state(self) -> bbk.BranchState:
        """The requests as a state of as many positions as the longest text has, on the host; a copy."""
        canvases = [text.canvases() for text in self.texts]
        most = max([len(tokens) for rows in canvases for tokens in rows] + [1])
        prompts = [text.ids[: text.prompt_length] for text in self.texts]
        longest = max([len(prompt) for prompt in prompts] + [1])
        sizes = torch.tensor(self.texts[0].sizes(self.params), dtype=torch.int32, device="cpu")
        padded = torch.tensor(
            [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device="cpu"
        ).int()
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device="cpu")
        state = bbk.BranchState.create(padded, lengths, sizes, most, self.params.mask_token_id)
        row = 0
        for request, text in enumerate(self.texts):
            counts = self._counts[request]
            state.nfe[request] = torch.tensor(list(counts.values()), dtype=torch.int32, device="cpu")
            state.finished[request] = self._asked[request] is None
            for tokens, (start, end) in zip(canvases[request], text.windows(), strict=True):
                state.tokens[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32, device="cpu")
                state.decoded[row] = sum(token != text.mask for token in tokens)
                state.window_start[row], state.window_end[row] = start, end
                row += 1
        return state

    def _canvas(self, text: BlockText) -> list[int]:
        canvas = text.generated
        if self.params.family == "sdar" and not self.params.grow:
            # As published: MASK stands behind the block in which a text ended.
            canvas += [text.mask] * (self.params.positions(text.prompt_length) - len(text.ids))
        return canvas

    def _drawn(self, request: int, rows: list[Row]) -> list[Row]:
        """Rows that know how their tokens are drawn.

        Denoise forwards alone count for the noise: whether a block is stored in a forward of its own, or
        found in the prefix cache, changes no token.
        """
        if self._sampling is None:
            return rows
        draw = RowSampling(
            self.params.sampling,
            self._sampling[request],
            self._counts[request]["denoise"],
            self.texts[request].prompt_length,
        )
        return [row._replace(draw=draw) for row in rows]

    def _refuse_non_finite(self, request: int, kind: str, predicted: list[Predicted]) -> None:
        if all(math.isfinite(confidence) for pairs in predicted for _, confidence in pairs):
            return
        counts = self._counts[request]
        name = "prompt" if len(self.texts) == 1 else f"prompt[{request}]"
        number, forwards = counts[_COUNTS.get(kind, "denoise")], sum(counts.values())
        raise NonFiniteLogitsError(name, request, kind, number, forwards, self.model.dtype)

    def _go_on(self, request: int, predicted: list[Predicted] | None) -> None:
        """Sends a program what its forward predicted, and takes what it asks for next."""
        try:
            self._asked[request] = self._programs[request].send(predicted)
        except StopIteration as end:
            self._end(request, end.value)

    def _end(self, request: int, reason: str) -> None:
        text = self.texts[request]
        self._asked[request], self._reasons[request] = None, reason
        self.seconds[request] = time.perf_counter() - self._started
        text.keep_prefix()
        text.release()

    def _begin_record(self, request: int) -> dict[str, Any]:
        text, forward = self.texts[request], self._asked[request]
        lengths = [len(row.ids) for row in forward.rows]
        # A forward for all branches alike counts as the first one's.
        readers = forward.branches or (0,) * len(text.windows())
        queries = [
            0 if reader in readers[:index] else lengths[reader] for index, reader in enumerate(readers)
        ]
        if not forward.branches:
            queries[0] = sum(lengths)
        return {
            "kind": forward.kind,
            "seconds": 0.0,
            "rows": list(range(len(readers))),
            "windows": [list(window) for window in text.windows()],
            "queries": queries,
            "packed_tokens": sum(lengths),
            "distinct_rows": len(set(readers)),
            "stored": text.stored,
            "input_ids": [token for row in forward.rows for token in row.ids],
            "commits": [],
            "merges": [],
            "syncs": [],
        }

    def _end_record(self, request: int, record: dict[str, Any], seconds: float) -> None:
        text = self.texts[request]
        record["seconds"] = seconds
        for commit in text.commits:
            change = {
                "branch": commit.branch,
                "positions": [place - text.prompt_length for place in commit.places],
                "tokens": commit.tokens,
            }
            if commit.kind == "commit":
                record["commits"].append({**change, "confidence": commit.confidences})
            elif commit.kind == "merge":
                record["merges"].append(change)
            else:
                record["syncs"].append({"branch": commit.branch, "leader": commit.source})


def _told(texts: Sequence[BlockText], counts: Sequence[dict[str, int]]) -> str:
    """See `BlockSession.told`; knows no session, which it would keep from its end."""
    return repr([(text.ids, text.canvases(), held) for text, held in zip(texts, counts, strict=True)])


def _release(texts: Sequence[BlockText]) -> None:
    for text in texts:
        text.release()
