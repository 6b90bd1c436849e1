"""Decode with the block-causal training model in large batches: a quick look, not the package's decoder.

The rule is SDAR's (block by block; every token above a threshold, and at least the most confident). Each
forward computes the whole canvas under the block-causal mask: the same logits as with stored K/V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from blockbatch.tasks.built_in import DrawnProblem
from blockbatch.tasks.built_in.several import join, split_answers
from blockbatch.tiny.block_model import BlockTrainModel
from blockbatch.tiny.evaluate import before_eos, counted, right_answers
from blockbatch.tiny.tokenizer import EOS, MASK

THRESHOLD = 0.9


@dataclass
class Decoded:
    """ids: before the EOS, a list a row; the forwards that denoise and the blocks decoded, by row."""

    ids: list[list[int]]
    denoise: Tensor
    blocks: Tensor


@torch.no_grad()
def decode_blocks(
    model: BlockTrainModel,
    prompts: Sequence[Sequence[int]],
    *,
    canvas: int,
    eos: int,
    mask: int,
    threshold: float | None,
) -> Decoded:
    """Decode all rows on one canvas length, a multiple of the block size.

    `threshold=None` writes one token a forward, the most confident of the block; else every token of the
    block above it, and at least one. A row ends with the block that holds its first EOS.
    """
    device, size = model.embedding.device, model.shape.block_size
    rows = len(prompts)
    tokens = torch.full((rows, canvas), mask, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    position = torch.arange(canvas, device=device)[None]
    denoise = torch.zeros(rows, device=device)
    # One token a forward at least, so that no row needs more than its masks.
    for _ in range(canvas):
        masked = tokens == mask
        first = masked.float().argmax(dim=1, keepdim=True)
        block = position // size == first // size
        ended = ((tokens == eos) & (position >= starts) & (position < first // size * size)).any(dim=1)
        active = masked.any(dim=1) & ~ended
        if not bool(active.any()):
            break
        denoise += active
        token, confidence = model.predict(tokens)
        window = masked & block & active[:, None]
        confidence = torch.where(window, confidence, -1.0)
        commit = torch.zeros_like(window).scatter_(1, confidence.argmax(dim=1, keepdim=True), True)
        if threshold is not None:
            commit |= confidence > threshold
        tokens = torch.where(commit & window, token, tokens)
    known = ((tokens != mask) & (position >= starts)).sum(dim=1) + starts[:, 0]
    blocks = known // size - starts[:, 0] // size
    ids = [before_eos(row, start, eos) for row, start in zip(tokens, starts[:, 0])]
    return Decoded(ids, denoise, blocks)


def _decode_texts(
    model: BlockTrainModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    rows: int,
    canvas: int,
    threshold: float | None,
) -> tuple[list[str], dict[str, float]]:
    """Texts of the prompts, `rows` at a time, and their mean numbers of forwards and blocks."""
    eos, mask = tokenizer.token_to_id(EOS), tokenizer.token_to_id(MASK)
    texts: list[str] = []
    denoise = blocks = 0.0
    for begin in range(0, len(prompts), rows):
        part = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts[begin : begin + rows]))]
        padded = part + [part[0]] * (rows - len(part))  # one batch shape for the compiled model
        decoded = decode_blocks(model, padded, canvas=canvas, eos=eos, mask=mask, threshold=threshold)
        texts += [tokenizer.decode(ids, skip_special_tokens=False) for ids in decoded.ids[: len(part)]]
        denoise += float(decoded.denoise[: len(part)].sum())
        blocks += float(decoded.blocks[: len(part)].sum())
    count = len(prompts)
    return texts, {"mean_forwards": round(denoise / count, 2), "mean_blocks": round(blocks / count, 2)}


def evaluate_blocks(
    model: BlockTrainModel,
    tokenizer: Tokenizer,
    problems: Sequence[DrawnProblem],
    *,
    tokens: int,
    canvas: int,
    threshold: float | None,
) -> dict[str, Any]:
    """Accuracy by family and kind, mean denoising forwards and blocks, wrong answers.

    `tokens` are computed at a time, so tokens // canvas problems.
    """
    texts, means = _decode_texts(
        model,
        tokenizer,
        [problem.prompt for problem in problems],
        rows=tokens // canvas,
        canvas=canvas,
        threshold=threshold,
    )
    return {"threshold": threshold, **means, **counted(problems, texts, right_answers(problems, texts))}


def text_tokens(tokenizer: Tokenizer, problems: Sequence[DrawnProblem]) -> int:
    """Tokens of a text's prompt and reference answer, without the EOS."""
    return sum(len(tokenizer.encode(part).ids) for part in join(problems))


def evaluate_texts(
    model: BlockTrainModel,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[DrawnProblem]],
    *,
    tokens: int,
    canvas: int,
    threshold: float | None,
) -> dict[str, Any]:
    """As `evaluate_blocks`, for texts of equally many problems, with the accuracy by place in the text."""
    pairs = [join(problems) for problems in texts]
    got, means = _decode_texts(
        model,
        tokenizer,
        [prompt for prompt, _ in pairs],
        rows=tokens // canvas,
        canvas=canvas,
        threshold=threshold,
    )
    lengths = [text_tokens(tokenizer, problems) for problems in texts]
    answers = [answer for text, problems in zip(got, texts) for answer in split_answers(text, len(problems))]
    problems = [problem for part in texts for problem in part]
    right = right_answers(problems, answers)
    count = len(texts[0])
    return {
        "problems_a_text": count,
        "texts": len(texts),
        "tokens_a_text": {"least": min(lengths), "most": max(lengths)},
        "threshold": threshold,
        **means,
        "accuracy_by_place": [round(sum(right[place::count]) / len(texts), 4) for place in range(count)],
        **counted(problems, answers, right),
    }
