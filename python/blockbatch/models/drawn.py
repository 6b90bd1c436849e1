"""Predictions of tokens that are drawn, rather than those of the highest logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.models.quantized_weights import QuantizedWeight, head_operator


class Draw(NamedTuple):
    """Arguments of `blockbatch_kernels.lm_head_sample` for the predictions of one forward."""

    rules: bbk.SamplingRules
    request: Tensor  # [predictions] int32
    positions: Tensor  # [predictions] int32
    confidence: str


def drawn_predictions(
    operators: Any,
    hidden: Tensor,
    lm_head: Tensor | QuantizedWeight,
    target: Tensor,
    draw: Draw,
    probe_tokens: Tensor | None,
    *,
    likely: bool,
    mask_token_id: int,
    backend: str | None,
) -> bbk.Predictions:
    """The predictions of hidden states [predictions, hidden_size]; see `head_predictions`.

    MASK is never drawn. What is likely is so by the logits before rules change them, but for banned tokens,
    which are left out.
    """
    operator, weight = head_operator(operators, "lm_head_sample", lm_head)
    token, confidence, probe_probability = operator(
        hidden,
        *weight,
        draw.rules,
        draw.request,
        draw.positions,
        probe_tokens=probe_tokens,
        suppress_token=mask_token_id,
        confidence=draw.confidence,
        backend=backend,
    )
    if not likely:
        return bbk.Predictions(target, token, confidence, probe_probability)
    operator, weight = head_operator(operators, "lm_head_likely", lm_head)
    found = operator(hidden, *weight, suppress_token=mask_token_id, backend=backend)
    return bbk.Predictions(target, token, confidence, probe_probability, *_without_banned(draw, *found[2:]))


def _without_banned(draw: Draw, token: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Likely tokens and their probabilities without those that must not be written, the free places last."""
    rules, request = draw.rules, draw.request
    banned = draw.positions.unsqueeze(1) < rules.banned_before[request]
    banned |= rules.logit_bias[request] == float("-inf")
    same = token.unsqueeze(2) == rules.changed_token  # [predictions, likely, changed]
    out = (same & banned.unsqueeze(1)).any(2)
    probability, order = torch.where(out, 0.0, probability).sort(dim=1, descending=True, stable=True)
    return torch.where(out, -1, token).gather(1, order), probability
