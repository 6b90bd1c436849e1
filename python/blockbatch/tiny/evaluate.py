"""Decode problems with the training model in large batches: a quick look, not the package's decoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from blockbatch.tasks.built_in import DrawnProblem, check
from blockbatch.tiny.tokenizer import EOS, MASK
from blockbatch.tiny.train_model import TrainModel


@torch.no_grad()
def decode(
    model: TrainModel,
    prompts: Sequence[Sequence[int]],
    *,
    canvas: int,
    block_size: int,
    eos: int,
    mask: int,
    threshold: float | None = None,
) -> tuple[list[list[int]], float]:
    """Decode block by block with a full forward per step; all rows have one canvas length.

    `threshold=None` commits one token per step, the most confident of the block; otherwise every token of the
    block at `threshold` or above, and at least one. A row stops when everything before its first EOS is
    decoded. Returns the token ids before the EOS and the mean number of forwards per row.
    """
    device = model.embedding.device
    rows = len(prompts)
    tokens = torch.full((rows, canvas), mask, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    position = torch.arange(canvas, device=device)[None]
    forwards = torch.zeros(rows, device=device)
    for _ in range(canvas):
        masked = tokens == mask
        ended = (tokens == eos).cummax(dim=1).values  # from the first EOS on
        open_before_end = (masked & ~ended).any(dim=1)
        if not bool(open_before_end.any()):
            break
        forwards += open_before_end
        token, confidence = model.predict(tokens)
        first = masked.float().argmax(dim=1, keepdim=True)
        block_start = starts + (first - starts) // block_size * block_size
        window = masked & (position >= block_start) & (position < block_start + block_size)
        confidence = torch.where(window, confidence, -1.0)
        best = confidence.argmax(dim=1, keepdim=True)
        commit = torch.zeros_like(window).scatter_(1, best, True)
        if threshold is not None:
            commit |= confidence >= threshold
        tokens = torch.where(commit & window & open_before_end[:, None], token, tokens)
    return [before_eos(row, start, eos) for row, start in zip(tokens, starts[:, 0])], float(forwards.mean())


def before_eos(row: Tensor, start: Tensor, eos: int) -> list[int]:
    """The ids of a row from `start` to before its first EOS."""
    ids = row[int(start) :].tolist()
    return ids[: ids.index(eos)] if eos in ids else ids


def evaluate(
    model: TrainModel,
    tokenizer: Tokenizer,
    problems: Sequence[DrawnProblem],
    *,
    rows: int,
    canvas: int,
    block_size: int,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Accuracy by family and kind, mean forwards, wrong answers; `rows` problems are decoded at a time."""
    eos, mask = tokenizer.token_to_id(EOS), tokenizer.token_to_id(MASK)
    texts: list[str] = []
    forwards = 0.0
    for begin in range(0, len(problems), rows):
        part = problems[begin : begin + rows]
        prompts = [tokenizer.encode(problem.prompt).ids for problem in part]
        padded = prompts + [prompts[0]] * (rows - len(prompts))  # one batch shape for the compiled model
        answers, mean = decode(
            model, padded, canvas=canvas, block_size=block_size, eos=eos, mask=mask, threshold=threshold
        )
        texts += [tokenizer.decode(ids) for ids in answers[: len(part)]]
        forwards += mean * len(part) / len(problems)
    return {
        "block_size": block_size,
        "threshold": threshold,
        "mean_forwards": round(forwards, 2),
        **counted(problems, texts, right_answers(problems, texts)),
    }


def right_answers(problems: Sequence[DrawnProblem], texts: Sequence[str]) -> list[bool]:
    """Which texts solve their problems."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(check, problems, texts))


def counted(problems: Sequence[DrawnProblem], texts: Sequence[str], right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy and number of problems by family and kind, and the wrong answers."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for problem, ok in zip(problems, right):
        for key in (problem.family, f"{problem.family}/{problem.kind}"):
            counts[key][0] += ok
            counts[key][1] += 1
    return {
        "accuracy": {key: round(good / total, 4) for key, (good, total) in sorted(counts.items())},
        "problems": {key: total for key, (_, total) in sorted(counts.items())},
        "wrong": [
            {"kind": problem.kind, "prompt": problem.prompt, "expected": problem.answer, "got": text}
            for problem, text, ok in zip(problems, texts, right)
            if not ok
        ],
    }
