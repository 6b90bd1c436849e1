"""The decodes that `clock.py` compares: the built-in model with a softer head, on problems drawn by a seed.

Every problem is decoded by itself, as if it were the only request. For all problems a file keeps whether the
answer is right and what each forward computed; for the first few of every family also the trace to follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import traces
from clock_settings import Row

import blockbatch
from blockbatch import tiny
from blockbatch.models import Model

FOLDER = Path(__file__).parent / "traces" / "clock"
SPLIT, SEED = "test", 7
PROBLEMS, TRACED = 60, 6  # of each family: decoded, and of these also traced
# The built-in model is surer of itself than large ones. With its LM head scaled by this the dual cache
# commits 3 tokens a forward on held-out problems (`--calibrate`), as LLaDA-8B does in the paper (256 in 85).
HEAD_SCALE = 0.78


@dataclass(frozen=True)
class Decode:
    """What one setting made of one problem.

    Attributes:
        family: of the problem.
        right: whether the answer passes its check.
        tokens: before the first EOS.
        prompt_length: tokens of the prompt.
        steps: [turns, 3] phase, packed queries and computed rows of every turn.
    """

    family: str
    right: bool
    tokens: int
    prompt_length: int
    steps: np.ndarray

    def nfe(self) -> list[int]:
        """Forwards by phase; a turn without queries is none."""
        phases = self.steps[self.steps[:, 1] > 0, 0]
        return [int((phases == phase).sum()) for phase in range(3)]

    def queries(self, prompt_length: int, gen_length: int, refreshes_all: bool) -> list[int]:
        """Queries by phase with a prompt of another length."""
        phase, tokens, rows = self.steps.T.astype(int)
        whole = rows * (prompt_length + gen_length)
        refresh = whole if refreshes_all else rows * gen_length
        each = np.choose(phase, [whole, tokens, refresh])
        return [int(each[phase == number].sum()) for number in range(3)]


def softer_model(scale: float = HEAD_SCALE) -> Model:
    """The built-in model on the CPU, its logits scaled: the same top tokens, with less confidence."""
    model = blockbatch.load_model("tiny", device="cpu")
    weights = dataclasses.replace(model.weights, lm_head=model.weights.lm_head * scale)
    return Model(model.spec, weights, model.tokenizer, name=model.name)


def draw_problems(split: str, seed: int, count: int) -> list[tiny.Problem]:
    """`count` problems of every family, the families taking turns."""
    families = [tiny.generate_problems(family, split, count, seed) for family in tiny.FAMILIES]
    return [problem for group in zip(*families, strict=True) for problem in group]


def record_all(
    model: Model, rows: Iterable[Row], problems: list[tiny.Problem], traced: int, folder: Path
) -> None:
    """Writes a file for each setting that has none in `folder`; `traced` problems of a family get a trace."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes, judged = traces.try_out_shapes(), {}
    for row in rows:
        path = folder / f"{row.file}.npz"
        if path.exists():
            continue
        decodes, kept = [], []
        for index, problem in enumerate(problems):
            trace = traces.record(
                model, f"{problem.family} {index // len(tiny.FAMILIES)}", problem.prompt, row.config()
            )
            decodes.append(_decode(model, problem, trace, judged))
            if index < traced * len(tiny.FAMILIES):
                kept.append(traces.reduced(trace, shapes))
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, **_packed(decodes), **(traces.packed(kept) if kept else {}))
        partial.rename(path)
        right, nfe = sum(d.right for d in decodes), np.mean([sum(d.nfe()) for d in decodes])
        print(f"{row.label:44} {right} of {len(decodes)} right, NFE {nfe:.1f}", flush=True)


def _decode(model: Model, problem: tiny.Problem, trace: traces.Trace, judged: dict[Any, bool]) -> Decode:
    canvas = trace.canvas.tolist()
    tokens = canvas[: canvas.index(trace.eos_token_id)] if trace.eos_token_id in canvas else canvas
    text = model.tokenizer.decode(tokens)
    key = problem.prompt, text
    if key not in judged:
        judged[key] = tiny.check(problem, text)
    steps = np.array([(turn.phase, turn.tokens, turn.rows) for turn in trace.turns], np.int32)
    prompt_length = len(model.tokenizer.encode(problem.prompt))
    return Decode(problem.family, judged[key], len(tokens), prompt_length, steps)


def _packed(decodes: list[Decode]) -> dict[str, np.ndarray]:
    families = [tiny.FAMILIES.index(decode.family) for decode in decodes]
    rest = [(decode.right, decode.tokens, decode.prompt_length, len(decode.steps)) for decode in decodes]
    return {
        "decodes": np.column_stack([families, rest]).astype(np.int16),
        "steps": np.concatenate([decode.steps for decode in decodes]).astype(np.int16),
    }


def load(row: Row, folder: Path = FOLDER) -> tuple[list[Decode], list[traces.Trace]]:
    """Decodes of all problems, and the traces of those that have one.

    Raises:
        FileNotFoundError: the setting was not recorded.
        ValueError: it was recorded with other options.
    """
    path = folder / f"{row.file}.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"{row.label}: expected its decodes in {path}; python bench/clock.py --record"
        )
    with np.load(path) as data:
        numbers, steps = data["decodes"].tolist(), data["steps"]
        found = traces.unpacked(data) if "turn" in data else []
    splits = np.split(steps, np.cumsum([line[4] for line in numbers])[:-1])
    decodes = [
        Decode(tiny.FAMILIES[family], bool(right), tokens, prompt_length, own)
        for (family, right, tokens, prompt_length, _), own in zip(numbers, splits, strict=True)
    ]
    for trace in found:
        expected = dataclasses.replace(row.config(), leap_threshold=trace.config.leap_threshold)
        if trace.config != expected:
            raise ValueError(f"{row.label}: expected decodes with {expected}, got {trace.config} in {path}")
    return decodes, found


def calibrate(scales: Iterable[float], config: blockbatch.DecodeConfig, problems: list[tiny.Problem]) -> None:
    """Prints how many tokens a forward commits with the head scaled so."""
    for scale in scales:
        model = softer_model(scale)
        results = [blockbatch.generate(model, problem.prompt, config) for problem in problems]
        tokens, nfe = sum(len(r.tokens) for r in results), sum(r.nfe.total for r in results)
        print(f"head times {scale:g}: {tokens / nfe:.2f} tokens a forward", flush=True)
