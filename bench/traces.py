"""Decodes of the built-in model, recorded so that a model of another shape can follow them step by step.

    python bench/traces.py        # records bench/traces/*.npz anew

A trace holds what the model predicted in every forward. `FollowingModel` computes every forward with its own
weights and then hands the recorded predictions to the policy: commits, merges, syncs, page sharing, refreshes
and the number of forwards are those of the recorded decode, and so is the result.

From each family the problem with the most forwards among the first few is kept, since the built-in model
decodes most problems in two or three; with the paper's threshold, and with one so strict that decodes get
longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import blockbatch
import blockbatch_kernels as bbk
from blockbatch import branches, tiny
from blockbatch.decoding import METHOD_BUILDERS, Method, Session
from blockbatch.models import Model
from blockbatch.models.spec import ModelSpec

FOLDER = Path(__file__).parent / "traces"
GEN_LENGTH, PROBLEMS, SEED = 256, 4, 1
THRESHOLDS = (0.9, 0.99)
METHODS = ("blockbatch", "dual_cache")


@dataclass
class Trace:
    """One decode.

    Attributes:
        name: file name without its ending.
        config: the settings.
        top_token: [turns, rows, gen_length] int16, what the model held to be right after each turn.
        confidence: [turns, rows, gen_length] float32.
        canvas: [gen_length] int16, the result.
        nfe: init, block, refresh.
        mask_token_id, eos_token_id: of the recorded model.
    """

    name: str
    config: blockbatch.DecodeConfig
    top_token: np.ndarray
    confidence: np.ndarray
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


def _config(method: str, threshold: float) -> blockbatch.DecodeConfig:
    return blockbatch.DecodeConfig(
        method=method, gen_length=GEN_LENGTH, threshold=threshold, eos_exit="prefix"
    )


def record(model: Model, name: str, prompt: str, config: blockbatch.DecodeConfig) -> Trace:
    method = METHOD_BUILDERS[config.method](config, model.spec, model.eos_token_ids)
    session = Session(model, [model.tokenizer.encode(prompt)], method, config.gen_length)
    turns = []
    while session.step() is not None:
        turns.append((session.state.top_token.numpy().copy(), session.state.confidence.numpy().copy()))
    outcome = branches.read_outcome(session.state, 0)
    (eos_token_id,) = model.eos_token_ids
    return Trace(
        name=name,
        config=config,
        top_token=np.stack([top for top, _ in turns]).astype(np.int16),
        confidence=np.stack([confidence for _, confidence in turns]),
        canvas=np.array(outcome.canvas, dtype=np.int16),
        nfe=(outcome.nfe.init, outcome.nfe.block, outcome.nfe.refresh),
        mask_token_id=model.spec.mask_token_id,
        eos_token_id=eos_token_id,
    )


def save(trace: Trace, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    np.savez_compressed(
        folder / f"{trace.name}.npz",
        method=trace.config.method,
        threshold=trace.config.threshold,
        top_token=trace.top_token,
        confidence=trace.confidence,
        canvas=trace.canvas,
        nfe=trace.nfe,
        special=(trace.mask_token_id, trace.eos_token_id),
    )


def load(path: Path) -> Trace:
    with np.load(path) as data:
        return Trace(
            name=path.stem,
            config=_config(str(data["method"]), float(data["threshold"])),
            top_token=data["top_token"],
            confidence=data["confidence"],
            canvas=data["canvas"],
            nfe=tuple(int(count) for count in data["nfe"]),
            mask_token_id=int(data["special"][0]),
            eos_token_id=int(data["special"][1]),
        )


def load_all() -> list[Trace]:
    return [load(path) for path in sorted(FOLDER.glob("*.npz"))]


class FollowingModel:
    """A model that computes its forwards and then predicts what `follow` was told."""

    def __init__(self, model: Model, num_rows: int, gen_length: int) -> None:
        self.model = model
        self.spec, self.device, self.backend = model.spec, model.device, model.backend
        self.new_cache = model.new_cache
        size = num_rows * gen_length
        # At fixed addresses, since captured steps read them.
        self._top_token = torch.zeros(size, dtype=torch.int32, device=model.device)
        self._confidence = torch.zeros(size, dtype=torch.float32, device=model.device)

    def follow(self, top_token: Tensor, confidence: Tensor) -> None:
        """Sets the predictions of the next forward, [rows, gen_length] each, on the model's device."""
        self._top_token.copy_(top_token.flatten())
        self._confidence.copy_(confidence.flatten())

    def predict(self, packed: bbk.PackedQueries, cache, seqlens_k: Tensor, probe_tokens=None):
        computed = self.model.predict(packed, cache, seqlens_k, probe_tokens)
        index = computed.target.clamp(min=0)
        return computed._replace(top_token=self._top_token[index], confidence=self._confidence[index])


def main() -> None:
    torch.set_num_threads(1)
    model = blockbatch.load_model("tiny", device="cpu")
    for path in FOLDER.glob("*.npz"):
        path.unlink()
    for family in tiny.FAMILIES:
        prompts = [problem.prompt for problem in tiny.generate_problems(family, "test", PROBLEMS, SEED)]
        for threshold in THRESHOLDS:
            name = f"{family}_{threshold}"
            decodes = [record(model, name, prompt, _config("blockbatch", threshold)) for prompt in prompts]
            longest = max(range(PROBLEMS), key=lambda index: sum(decodes[index].nfe))
            for method in METHODS:
                trace = record(model, f"{name}_{method}", prompts[longest], _config(method, threshold))
                save(trace, FOLDER)
                print(f"{trace.name:32} problem {longest}, NFE {trace.nfe}")


if __name__ == "__main__":
    main()
