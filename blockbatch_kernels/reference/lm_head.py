"""Top token and its softmax probability for every hidden state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.reference.quantized import linear_fp8, quantize_rows
from blockbatch_kernels.shapes import LEAST_LIKELY, NUM_LIKELY

# Rows whose logits exist at the same time: 256 x 126,464 fp32 logits are 130 MB.
_CHUNK_ROWS = 256


def logits_of(hidden: Tensor, weight: Tensor, weight_scale: Tensor | None = None) -> Tensor:
    """[rows, vocabulary] fp32, rounded to hidden's dtype; of a weight in e4m3 with its scales."""
    if weight_scale is None:
        return F.linear(hidden, weight).float()
    rows = quantize_rows(hidden)
    return linear_fp8(*rows, weight, weight_scale, out_dtype=hidden.dtype).float()


def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    num_rows = hidden.shape[0]
    top_token = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    confidence = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    probe_probability = torch.empty_like(confidence) if probe_tokens is not None else None
    for start in range(0, num_rows, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        logits = logits_of(hidden[chunk], weight, weight_scale)
        if suppress_token is not None:
            logits[:, suppress_token] = float("-inf")
        highest, top_token[chunk] = logits.amax(dim=-1), logits.argmax(dim=-1).int()
        weights = (logits - highest.unsqueeze(-1)).exp_()
        total = weights.sum(dim=-1)
        confidence[chunk] = 1.0 / total
        if probe_tokens is not None:
            probed = weights.gather(-1, probe_tokens[chunk].long().unsqueeze(-1)).squeeze(-1)
            probe_probability[chunk] = probed / total
    return top_token, confidence, probe_probability


def lm_head_likely(
    hidden: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    suppress_token: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = dict(weight_scale=weight_scale, suppress_token=suppress_token)
    top_token, confidence, _ = lm_head_confidence(hidden, weight, **options)
    num_rows = hidden.shape[0]
    likely_token = torch.full((num_rows, NUM_LIKELY), -1, dtype=torch.int32, device=hidden.device)
    likely_probability = torch.zeros_like(likely_token, dtype=torch.float32)
    most = min(NUM_LIKELY, weight.shape[0])
    for start in range(0, num_rows, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        logits = logits_of(hidden[chunk], weight, weight_scale)
        probabilities = logits.softmax(-1)
        for place in range(most):
            token = logits.argmax(-1, keepdim=True)
            probability = probabilities.gather(-1, token)
            is_likely = probability > LEAST_LIKELY
            likely_token[chunk, place : place + 1] = torch.where(is_likely, token, -1).int()
            likely_probability[chunk, place : place + 1] = torch.where(is_likely, probability, 0.0)
            logits.scatter_(-1, token, float("-inf"))
    return top_token, confidence, likely_token, likely_probability
