"""One token for every hidden state, drawn from the model's distribution or its most probable one.

The noise is a function of the request's seed, the position, the forward and the token alone, in integers of
32 bits up to the last step: every backend draws the same numbers, whatever else is in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockbatch_kernels.reference.lm_head import logits_of
from blockbatch_kernels.shapes import KEY_STARTS, KEY_STEP
from blockbatch_kernels.structs import SamplingRules

# Rows whose logits exist at the same time, with integers of 64 bits beside them.
_CHUNK_ROWS = 32
_LOW = 0xFFFFFFFF


def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    weight_scale: Tensor | None = None,
    probe_tokens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    num_rows = hidden.shape[0]
    token = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    sureness = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    probe_probability = torch.empty_like(sureness) if probe_tokens is not None else None
    for start in range(0, num_rows, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        logits = logits_of(hidden[chunk], weight, weight_scale)
        probes = None if probe_tokens is None else probe_tokens[chunk]
        found = _sampled(logits, rules, request[chunk], positions[chunk], probe_tokens=probes, **options)
        token[chunk], sureness[chunk] = found[:2]
        if probe_probability is not None:
            probe_probability[chunk] = found[2]
    return token, sureness, probe_probability


def sample_logits(
    logits: Tensor, rules: SamplingRules, request: Tensor, positions: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`lm_head_sample` of logits [rows, vocabulary] that exist, which stay as they are.

    Args:
        options: `probe_tokens`, `suppress_token`, `confidence`.
    """
    # In fp32 they would be the caller's own.
    wide = logits.float() if logits.dtype != torch.float32 else logits.clone()
    return _sampled(wide, rules, request, positions, **options)


def _sampled(
    logits: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    confidence: str = "probability",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of logits in fp32, which it changes."""
    drawn = scores_of(logits, rules, request, positions, suppress_token).argmax(-1, keepdim=True)

    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp()
    total = weights.sum(-1, keepdim=True)
    if confidence == "probability":
        sure = weights.gather(1, drawn) / total
    elif confidence == "entropy":
        terms = torch.where(weights > 0, weights * (logits - highest), 0.0)
        sure = (terms.sum(-1, keepdim=True) / total).exp() / total
    else:
        second = logits.scatter(1, logits.argmax(-1, keepdim=True), float("-inf")).amax(-1, keepdim=True)
        sure = (1.0 - (second - highest).exp()) / total
    # Rounding may lead above 1; NaN stays NaN.
    sure = torch.where(sure > 1.0, 1.0, sure).squeeze(1)
    probability = None
    if probe_tokens is not None:
        probability = (weights.gather(1, probe_tokens.long().unsqueeze(1)) / total).squeeze(1)
    return drawn.squeeze(1).int(), sure, probability


def scores_of(
    logits: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    suppress_token: int | None,
    first_token: int = 0,
) -> Tensor:
    """Whose highest is drawn, of logits in fp32, which it changes.

    Args:
        first_token: what the logits begin with, for the noise; other ids are counted from there.
    """
    of_request = request.long()
    if suppress_token is not None:
        logits[:, suppress_token] = float("-inf")
    _change(logits, rules, of_request, positions)
    temperature = rules.temperature[of_request].unsqueeze(1)
    is_random = temperature > 0
    scale = torch.where(is_random, 1.0 / temperature, 1.0)
    about = rules.seed[of_request], positions, rules.forward[of_request]
    noise = gumbel(noise_bits(*about, logits.shape[1], first_token))
    scores = logits * scale + torch.where(is_random, noise, 0.0)
    least = _least_logit(logits, scale, is_random, rules, of_request)
    return scores.masked_fill_(logits < least, float("-inf"))


def _change(logits: Tensor, rules: SamplingRules, of_request: Tensor, positions: Tensor) -> None:
    """Adds the biases of the changed tokens, and bans those that are banned there."""
    if rules.changed_token.numel() == 0:
        return
    tokens, bias = rules.changed_token.long(), rules.logit_bias[of_request]
    banned = (bias == float("-inf")) | (positions.unsqueeze(1) < rules.banned_before[of_request])
    logits[:, tokens] = torch.where(banned, float("-inf"), logits[:, tokens] + bias)


def _least_logit(
    logits: Tensor, scale: Tensor, is_random: Tensor, rules: SamplingRules, of_request: Tensor
) -> Tensor:
    """[rows, 1]: the lowest logit that `top_p` and `top_k` leave; equal logits stay or go together."""
    least = torch.full_like(scale, float("-inf"))
    if rules.top_p is None and rules.top_k is None:
        return least
    falling = logits.sort(-1, descending=True).values
    probability = (falling * scale).softmax(-1)
    stays = torch.ones_like(falling, dtype=torch.bool)
    if rules.top_p is not None:
        top_p = rules.top_p[of_request].unsqueeze(1)
        stays &= (probability.cumsum(-1) - probability < top_p) | (top_p >= 1)
    if rules.top_k is not None:
        top_k = rules.top_k[of_request].unsqueeze(1)
        place = torch.arange(logits.shape[1], device=logits.device)
        stays &= (place < top_k) | (top_k == 0)
    stays[:, 0] = True
    # Both rules keep the front: what stays is followed by nothing that does not stay before it.
    last = stays.int().cumprod(-1).sum(-1, keepdim=True) - 1
    return torch.where(is_random, falling.gather(1, last), least)


def mixed(x: Tensor) -> Tensor:
    """A permutation of the integers of 32 bits, int64, in which every bit of `x` reaches every bit.

    A hash of two multiplications; its constants are from a search for low bias (lowbias32, C. Wellons).
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def noise_bits(
    seed: Tensor, positions: Tensor, forward: Tensor, num_tokens: int, first_token: int = 0
) -> Tensor:
    """[rows, num_tokens] int64 of 32 random bits, of rows with these int64 seeds, positions and forwards."""
    words = (seed & _LOW, (seed >> 32) & _LOW, positions.long() & _LOW, forward.long() & _LOW)
    keys = []
    for start in KEY_STARTS:
        key = torch.full_like(seed, start)
        for word in words:
            key = mixed(((key ^ word) + KEY_STEP) & _LOW)
        keys.append(key.unsqueeze(1))
    token = torch.arange(first_token, first_token + num_tokens, device=seed.device)
    return mixed(mixed((token + keys[0]) & _LOW) ^ keys[1])


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise, fp32, of 32 random bits.

    Of -log(-log(1 - v)), v in (0, 1): what decides is how fine small v are, which fp32 resolves best.
    """
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    small = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)))
    return -torch.where(v < 2.0**-6, small, -(1.0 - v).log()).log()
