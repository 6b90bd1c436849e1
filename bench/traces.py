"""Decodes of the built-in model, recorded so that a model of another shape can follow them step by step.

    python bench/traces.py        # records bench/traces/decode.npz anew

A trace holds what the model predicted in every forward. `FollowingModel` computes every forward with its own
weights and then hands the recorded predictions to the policy: commits, merges, syncs, drafts, page sharing,
refreshes and the number of forwards are those of the recorded decode, and so is the result.

A trace is kept small: a prediction that no rule asks for (neither likely nor among the surest of its row, or
behind all that was written) reads as probability 0. Every trace is followed once, without a model, before it
is kept; one that ends differently is kept with more of its predictions.

For `decode.py` each family's problem with the most forwards among the first few is kept, with the paper's
threshold and with one so strict that decodes get longer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from random_models import random_model
from torch import Tensor

import blockbatch
import blockbatch_kernels as bbk
from blockbatch import branches, tiny
from blockbatch.config import decode_settings
from blockbatch.decoding import METHOD_BUILDERS, Method, Session
from blockbatch.decoding.session import new_runner
from blockbatch.models import Model
from blockbatch.models.spec import ModelSpec
from blockbatch.steps import Step

FILE = Path(__file__).parent / "traces" / "decode.npz"
GEN_LENGTH, PROBLEMS, SEED = 256, 4, 1
THRESHOLDS = (0.9, 0.99)
METHODS = ("blockbatch", "dual_cache")
# What is below decides nothing but which MASKs are the surest of a row, and no rule asks for more of them.
_LIKELY, _SUREST = 0.5, 4


class Strayed(RuntimeError):
    """A decode that followed a trace took another way."""


class Turn(NamedTuple):
    """One forward.

    Attributes:
        phase: index into `blockbatch_kernels.PHASES`.
        tokens: packed queries.
        rows: rows that were computed.
        target: [n] int32, row * gen_length + position of each prediction.
        top_token: [n] int16.
        confidence: [n] float32.
    """

    phase: int
    tokens: int
    rows: int
    target: np.ndarray
    top_token: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class Trace:
    """One decode.

    Attributes:
        name: of the problem, and of the settings where a file holds several.
        config: the settings.
        turns: the forwards.
        canvas: [gen_length] int16, the result.
        nfe: init, block, refresh.
        mask_token_id, eos_token_id: of the recorded model.
    """

    name: str
    config: blockbatch.DecodeConfig
    turns: list[Turn]
    canvas: np.ndarray
    nfe: tuple[int, int, int]
    mask_token_id: int
    eos_token_id: int

    def method(self, spec: ModelSpec) -> Method:
        """The recorded method for a model of another shape."""
        return METHOD_BUILDERS[self.config.method](self.config, spec, (self.eos_token_id,))

    def translated(self, tokens: np.ndarray, mask_token_id: int) -> np.ndarray:
        """Token ids with another model's MASK."""
        return np.where(tokens == self.mask_token_id, mask_token_id, tokens.astype(np.int32))


class RecordingModel:
    """A model that keeps what it predicts, part by part; all else is the model's own."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.parts: list[bbk.Predictions] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, *args: Any, **kwargs: Any) -> bbk.Predictions:
        result = self._model.predict(*args, **kwargs)
        self.parts.append(result)
        return result


def record(model: Model, name: str, prompt: str, config: blockbatch.DecodeConfig) -> Trace:
    """Decodes `prompt` with a model on the CPU, and keeps every prediction."""
    if config.leap_radius is not None and config.leap_threshold is None:
        # Its default depends on the model, and models of another family follow.
        config = replace(config, leap_threshold=model.spec.leap_threshold)
    method = METHOD_BUILDERS[config.method](config, model.spec, model.eos_token_ids)
    recording = RecordingModel(model)
    session = Session(recording, [model.tokenizer.encode(prompt)], method, config.gen_length)
    turns = []
    while (step := session.step()) is not None:
        turns.append(_turn(step, recording.parts))
        recording.parts.clear()
    outcome = branches.read_outcome(session.state, 0)
    (eos_token_id,) = model.eos_token_ids
    return Trace(
        name=name,
        config=config,
        turns=turns,
        canvas=np.array(outcome.canvas, dtype=np.int16),
        nfe=(outcome.nfe.init, outcome.nfe.block, outcome.nfe.refresh),
        mask_token_id=model.spec.mask_token_id,
        eos_token_id=eos_token_id,
    )


def _turn(step: Step, parts: list[bbk.Predictions]) -> Turn:
    def column(name: str, dtype: type) -> np.ndarray:
        values = [getattr(part, name)[part.target >= 0].numpy() for part in parts]
        return np.concatenate(values).astype(dtype) if values else np.zeros(0, dtype)

    return Turn(
        phase=step.plan.phase,
        tokens=step.plan.query_tokens,
        rows=sum(length > 0 for length in step.plan.query_lengths),
        target=column("target", np.int32),
        top_token=column("top_token", np.int16),
        confidence=column("confidence", np.float32),
    )


def reduced(trace: Trace, shapes: Sequence[Model]) -> Trace:
    """The trace with as few predictions as models of these shapes need to follow it."""
    written = int(np.flatnonzero(trace.canvas != trace.mask_token_id)[-1])
    for last in (written, trace.config.gen_length):
        smaller = replace(trace, turns=[_without_unlikely(turn, trace, last) for turn in trace.turns])
        try:
            for shape in shapes:
                Follower(FollowingModel(shape, computes=False), smaller, [0] * 8).run(smaller)
        except Strayed:
            continue
        return smaller
    return trace


def _without_unlikely(turn: Turn, trace: Trace, last: int) -> Turn:
    """Probability 0 for what is unlikely and not among the surest of its row, and behind position `last`."""
    row, position = np.divmod(turn.target, trace.config.gen_length)
    wanted = turn.confidence >= _LIKELY
    for number in np.unique(row):
        unlikely = np.flatnonzero((row == number) & ~wanted & (position <= last))
        wanted[unlikely[np.argsort(-turn.confidence[unlikely], kind="stable")[:_SUREST]]] = True
    wanted &= position <= last
    return turn._replace(
        top_token=np.where(wanted, turn.top_token, 0).astype(np.int16),
        confidence=np.where(wanted, turn.confidence, 0).astype(np.float32),
    )


def packed(traces: Sequence[Trace]) -> dict[str, np.ndarray]:
    """Traces as few arrays, for one file."""
    turns = [turn for trace in traces for turn in trace.turns]
    header = [
        {
            "name": trace.name,
            "options": {"method": trace.config.method, **decode_settings(trace.config)},
            "nfe": trace.nfe,
            "turns": len(trace.turns),
            "special": (trace.mask_token_id, trace.eos_token_id),
        }
        for trace in traces
    ]
    target = [np.diff(turn.target, prepend=0) for turn in turns]
    confidence = np.concatenate([turn.confidence for turn in turns])
    return {
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        "canvas": np.stack([trace.canvas for trace in traces]),
        "turn": np.array(
            [(turn.phase, turn.tokens, turn.rows, len(turn.target)) for turn in turns], np.int32
        ),
        # Mostly ones, and bytes of one weight side by side, compress better.
        "target": np.concatenate(target).astype(np.int16),
        "top_token": np.concatenate([turn.top_token for turn in turns]),
        "confidence": confidence.view(np.uint8).reshape(-1, 4).T,
    }


def unpacked(data: Any) -> list[Trace]:
    """The traces of a file that `packed` made."""
    numbers = data["turn"].tolist()
    ends = np.cumsum(data["turn"][:, 3])[:-1]
    confidence = np.ascontiguousarray(data["confidence"].T).view(np.float32).ravel()
    columns = [np.split(values, ends) for values in (data["target"], data["top_token"], confidence)]
    turns = iter(
        [
            Turn(phase, tokens, rows, np.cumsum(steps, dtype=np.int32), top_token, sure)
            for (phase, tokens, rows, _), steps, top_token, sure in zip(numbers, *columns, strict=True)
        ]
    )
    header = json.loads(data["header"].tobytes())
    return [
        Trace(
            name=line["name"],
            config=blockbatch.DecodeConfig(**line["options"]),
            turns=[next(turns) for _ in range(line["turns"])],
            canvas=canvas,
            nfe=tuple(line["nfe"]),
            mask_token_id=line["special"][0],
            eos_token_id=line["special"][1],
        )
        for line, canvas in zip(header, data["canvas"], strict=True)
    ]


def load_all() -> list[Trace]:
    with np.load(FILE) as data:
        return unpacked(data)


class FollowingModel:
    """A model that computes its forwards and then predicts what the state was told beforehand.

    Args:
        model: of any shape; on a GPU, steps that follow it can be captured.
        memory: what the K/V caches of several batches lie in, one at a time; None: each has its own.
        computes: False leaves the forwards out, to try a trace.
    """

    def __init__(self, model: Any, memory: Tensor | None = None, *, computes: bool = True) -> None:
        self.model, self.spec, self.dtype, self._memory = model, model.spec, model.dtype, memory
        self.device, self.backend, self._computes = model.device, model.backend, computes
        self.state: bbk.BranchState | None = None

    def new_cache(self, num_requests: int, num_branches: int, canvas_length: int) -> Any:
        cache = self.model.new_cache(num_requests, num_branches, canvas_length)
        if self._memory is not None:
            cache.kv = self._memory[: cache.kv.numel()].view(cache.kv.shape)
        return cache

    def predict(self, queries: bbk.PackedQueries, cache: Any, seqlens_k: Tensor, probe_tokens=None):
        index = queries.predict_target.clamp(min=0)
        told = self.state.top_token.view(-1)[index], self.state.confidence.view(-1)[index]
        if not self._computes:
            return bbk.Predictions(queries.predict_target, *told)
        computed = self.model.predict(queries, cache, seqlens_k, probe_tokens)
        return computed._replace(top_token=told[0], confidence=told[1])


class Followed(NamedTuple):
    """A decode that followed a trace.

    Attributes:
        nfe: init, block, refresh.
        canvas: the result.
        start_ms: before the first forward.
        steps_ms: (phase, milliseconds) of every turn.
    """

    nfe: tuple[int, int, int]
    canvas: list[int]
    start_ms: float
    steps_ms: list[tuple[str, float]]

    @property
    def decode_ms(self) -> float:
        return self.start_ms + sum(taken for _, taken in self.steps_ms)

    def phase_ms(self, phase: str) -> list[float]:
        return [taken for name, taken in self.steps_ms if name == phase]


class Follower:
    """Follows decodes of one setting in the shape of a model, one after the other on the same buffers.

    Args:
        following: the model; it serves this follower alone.
        trace, prompt: any of the setting; any token ids, which change nothing.
    """

    def __init__(self, following: FollowingModel, trace: Trace, prompt: list[int]) -> None:
        self._model, self._prompt, self._config = following, prompt, trace.config
        self._method = trace.method(following.spec)
        self.runner = new_runner(following, 1, self._method, trace.config.gen_length, len(prompt))
        following.state = self.runner.batch.state

    def captured(self) -> int:
        """Steps and whole rows that were captured so far."""
        return sum(len(graphs._graphs) for graphs in self.runner[1:] if graphs)

    @torch.inference_mode()
    def run(self, trace: Trace) -> Followed:
        """One decode along the trace; what is told ahead of every turn is not timed.

        Raises:
            Strayed: it took other forwards, or ended with another canvas or NFE.
        """
        if trace.config != self._config:
            raise ValueError(f"trace: expected one of {self._config}, got one of {trace.config}")
        told = self._told(trace)
        self._wait()
        begun = time.perf_counter()
        session = Session(
            self._model, [self._prompt], self._method, self._config.gen_length, runner=self.runner
        )
        self._wait()
        start = time.perf_counter() - begun
        steps: list[tuple[str, float]] = []
        for turn, (index, top_token, confidence) in zip(trace.turns, told, strict=True):
            session.state.top_token.view(-1).index_copy_(0, index, top_token)
            session.state.confidence.view(-1).index_copy_(0, index, confidence)
            self._wait()
            step = session.step()
            if step is None or step.plan.phase != turn.phase:
                raise Strayed(
                    f"{trace.name}: expected the recorded forwards, got another in turn {len(steps)}"
                )
            steps.append((step.phase, 1e3 * step.seconds))
        if session.step() is not None:
            raise Strayed(f"{trace.name}: expected an end after {len(steps)} turns, got another turn")
        outcome = branches.read_outcome(session.state, 0)
        nfe = outcome.nfe.init, outcome.nfe.block, outcome.nfe.refresh
        canvas = trace.translated(trace.canvas, self._model.spec.mask_token_id).tolist()
        if outcome.canvas != canvas or nfe != trace.nfe:
            raise Strayed(f"{trace.name}: expected the recorded canvas and NFE {trace.nfe}, got {nfe}")
        return Followed(nfe, outcome.canvas, 1e3 * start, steps)

    def _told(self, trace: Trace) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Places in the state, top tokens and confidences of every turn, on the device."""
        sizes = [len(turn.target) for turn in trace.turns]
        columns = zip(*((turn.target, turn.top_token, turn.confidence) for turn in trace.turns))
        index, top_token, confidence = (np.concatenate(column) for column in columns)
        top_token = trace.translated(top_token, self._model.spec.mask_token_id)
        values = (index.astype(np.int64), top_token.astype(np.int32), confidence)
        split = (torch.from_numpy(column).to(self._model.device).split(sizes) for column in values)
        return list(zip(*split, strict=True))

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _config(method: str, threshold: float) -> blockbatch.DecodeConfig:
    return blockbatch.DecodeConfig(
        method=method, gen_length=GEN_LENGTH, threshold=threshold, eos_exit="prefix"
    )


def try_out_shapes() -> list[Model]:
    """Small models of both conventions, in which a trace is tried before it is kept."""
    return [random_model(name, torch.device("cpu"), torch.float32) for name in ("small-llada", "small-dream")]


def main() -> None:
    torch.set_num_threads(1)
    model = blockbatch.load_model("tiny", device="cpu")
    shapes, kept = try_out_shapes(), []
    for family in tiny.FAMILIES:
        prompts = [problem.prompt for problem in tiny.generate_problems(family, "test", PROBLEMS, SEED)]
        for threshold in THRESHOLDS:
            name = f"{family}_{threshold}"
            decodes = [record(model, name, prompt, _config("blockbatch", threshold)) for prompt in prompts]
            longest = max(range(PROBLEMS), key=lambda index: sum(decodes[index].nfe))
            for method in METHODS:
                trace = record(model, f"{name}_{method}", prompts[longest], _config(method, threshold))
                kept.append(reduced(trace, shapes))
                print(f"{trace.name:32} problem {longest}, NFE {trace.nfe}")
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **packed(kept))


if __name__ == "__main__":
    main()
