"""Recorded decodes in the shape of a large model: every setting follows its own, problem by problem."""

from __future__ import annotations

import time
from typing import Any

import torch
from clock_settings import GEN_LENGTH, Row
from random_models import random_prompt
from traces import Followed, Follower, FollowingModel, Trace

from blockbatch import kv_cache
from blockbatch.decoding.graphs import packed_capacity
from blockbatch.models import Model


class Section:
    """All settings in one shape, with one length of prompt.

    Args:
        model: random weights.
        prompt_length: tokens.
        recorded: the traces of every setting, of the same problems in the same order.
    """

    def __init__(self, model: Model, prompt_length: int, recorded: dict[Row, list[Trace]]) -> None:
        self.model, self.prompt_length, self.recorded = model, prompt_length, recorded
        prompt = random_prompt(model.spec, prompt_length)
        memory = self._memory()
        self._followers = {
            row: Follower(FollowingModel(model, memory), traces[0], prompt)
            for row, traces in recorded.items()
        }

    def _memory(self) -> torch.Tensor:
        """Room for the K/V cache of the setting that has the most rows."""
        spec, device = self.model.spec, self.model.device
        rows = max(len(traces[0].method(spec).block_sizes) for traces in self.recorded.values())
        size = kv_cache.cache_bytes(
            rows,
            self.prompt_length + GEN_LENGTH,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=self.model.dtype,
        )
        return torch.zeros(size // self.model.dtype.itemsize, dtype=self.model.dtype, device=device)

    def measure(self, problems: int, until: float) -> dict[Row, list[Followed]]:
        """Decodes `problems` of the recorded problems by every setting, fewer if `until` (seconds of
        `time.perf_counter`) has passed. The settings take turns, so that all meet the same clocks."""
        for row, traces in self.recorded.items():
            self._warm_up(self._followers[row], traces[:problems])
        found: dict[Row, list[Followed]] = {row: [] for row in self.recorded}
        for number in range(problems):
            if number and time.perf_counter() > until:
                break
            for row, traces in self.recorded.items():
                found[row].append(_settled(self._followers[row], traces[number]))
        return found

    def _warm_up(self, follower: Follower, traces: list[Trace]) -> None:
        """Runs as many decodes as it takes to meet every captured size."""
        sizes = [
            {packed_capacity(turn.tokens) for turn in trace.turns if turn.phase == 1} for trace in traces
        ]
        missing = set().union(*sizes)
        follower.run(traces[0])
        missing -= sizes[0]
        while missing and self.model.device.type == "cuda":
            most = max(range(len(traces)), key=lambda index: len(sizes[index] & missing))
            follower.run(traces[most])
            missing -= sizes[most]


def _settled(follower: Follower, trace: Trace) -> Followed:
    """A decode during which no step was captured."""
    while True:
        before = follower.captured()
        result = follower.run(trace)
        if follower.captured() == before:
            return result


def turn_points(
    found: dict[Row, list[Followed]], recorded: dict[Row, list[Trace]], width: int
) -> dict[str, Any]:
    """Median milliseconds of turns, by what they computed.

    Args:
        width: prompt and generation region together.

    Returns:
        "block": (captured size, milliseconds) of block steps, "whole": (tokens, milliseconds) of whole rows.
    """
    taken: dict[tuple[str, int], list[float]] = {}
    for row, decodes in found.items():
        for decode, trace in zip(decodes, recorded[row]):
            for (phase, spent), turn in zip(decode.steps_ms, trace.turns, strict=True):
                if phase == "block":
                    key = phase, packed_capacity(turn.tokens) if turn.tokens else 0
                else:
                    whole = phase == "init" or row.config().refresh_scope == "canvas"
                    key = "whole", turn.rows * (width if whole else GEN_LENGTH)
                taken.setdefault(key, []).append(spent)
    points: dict[str, Any] = {"block": [], "whole": []}
    for (kind, size), spans in sorted(taken.items()):
        points[kind].append((size, sorted(spans)[len(spans) // 2]))
    return points
