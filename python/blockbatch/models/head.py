"""What the LM head says about hidden states, as predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.models.drawn import Draw, drawn_predictions
from blockbatch.models.quantized_weights import QuantizedWeight, head_operator
from blockbatch.models.spec import ModelSpec


def head_logits(lm_head: Tensor | QuantizedWeight, backend: str | None, hidden: Tensor) -> Tensor:
    """[n, tokens]: of hidden states [n, hidden_size], in their dtype."""
    if not isinstance(lm_head, QuantizedWeight):
        return F.linear(hidden, lm_head)
    rows = bbk.quantize_rows(hidden, backend=backend)
    options = dict(out_dtype=hidden.dtype, static_weight=True, backend=backend)
    return bbk.linear_fp8(*rows, lm_head.values, lm_head.scale, **options)


def head_predictions(
    operators: Any,
    spec: ModelSpec,
    lm_head: Tensor | QuantizedWeight,
    likely: bool,
    backend: str | None,
    hidden: Tensor,
    target: Tensor,
    probe_tokens: Tensor | None,
    sampling: Draw | None,
) -> bbk.Predictions:
    """The predictions of hidden states [predictions, hidden_size]; see `Model.predict`.

    Args:
        operators: has `lm_head_confidence`, `lm_head_likely` and `lm_head_sample`, and all with `_fp8`:
            `blockbatch_kernels`, or what merges the parts of several ranks.
    """
    suppress_token = spec.mask_token_id if spec.suppress_mask else None
    if sampling is not None:
        return drawn_predictions(
            operators,
            hidden,
            lm_head,
            target,
            sampling,
            probe_tokens,
            likely=likely,
            mask_token_id=spec.mask_token_id,
            backend=backend,
        )
    if likely:
        operator, weight = head_operator(operators, "lm_head_likely", lm_head)
        top_token, confidence, *likely_ones = operator(
            hidden, *weight, suppress_token=suppress_token, backend=backend
        )
        return bbk.Predictions(target, top_token, confidence, None, *likely_ones)
    operator, weight = head_operator(operators, "lm_head_confidence", lm_head)
    top_token, confidence, probe_probability = operator(
        hidden, *weight, probe_tokens=probe_tokens, suppress_token=suppress_token, backend=backend
    )
    return bbk.Predictions(target, top_token, confidence, probe_probability)


def head_in_pieces(
    head: Callable[..., bbk.Predictions],
    size: int | None,
    hidden: Tensor,
    target: Tensor,
    probe_tokens: Tensor | None,
    sampling: Draw | None,
) -> bbk.Predictions:
    """`head` of `size` hidden states at a time, a divisor of their number; None: of all at once."""
    if size is None:
        return head(hidden, target, probe_tokens, sampling)
    parts = []
    for first in range(0, len(target), size):
        piece = slice(first, first + size)
        probes = None if probe_tokens is None else probe_tokens[piece]
        drawn = sampling and sampling._replace(
            request=sampling.request[piece], positions=sampling.positions[piece]
        )
        parts.append(head(hidden[piece], target[piece], probes, drawn))
    return bbk.Predictions(
        *(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
    )
