"""A token for every hidden state, drawn with noise, from logits that exist a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.gemm_fp8 import linear_fp8
from blockbatch_kernels.cuda.lm_head import empty_partials, parts_of_logits
from blockbatch_kernels.cuda.quantized import quantize_rows
from blockbatch_kernels.shapes import CONFIDENCES
from blockbatch_kernels.structs import SamplingRules

PARTIAL_WORDS = 8  # SamplePartial in csrc/gemm/lm_head_sample.h


@torch.no_grad()
def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    weight_scale: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `blockbatch_kernels.ops.lm_head_sample`. Tensors as for `lm_head_confidence`, and the same way
    through a product in chunks of the vocabulary, with 32 bytes per row and 4096 tokens; with `top_p`
    or `top_k` in the rules in chunks of rows, in fp32."""
    logits_of = _whole_rows if _filters(rules) else parts_of_logits
    parts = logits_of(hidden, weight, weight_scale)
    return _sampled(parts, hidden, weight.shape[0], rules, request, positions, **options)


@torch.no_grad()
def sample_logits(
    logits: Tensor, rules: SamplingRules, request: Tensor, positions: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `blockbatch_kernels.reference.sampling.sample_logits`."""
    parts = [(slice(0, logits.shape[0]), 0, logits.contiguous())]
    return _sampled(parts, logits, logits.shape[1], rules, request, positions, **options)


def _filters(rules: SamplingRules) -> bool:
    """Whether what stays of a row depends on all of it."""
    return rules.top_p is not None or rules.top_k is not None


def _sampled(
    parts: Iterable[tuple[slice, int, Tensor]],
    rows_like: Tensor,
    vocab_size: int,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    confidence: str = "probability",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of logits that come in parts.

    Args:
        parts: some rows, the first of some tokens, and their logits; with filters of all tokens.
        rows_like: has a row for each prediction.
    """
    num_rows, device = rows_like.shape[0], rows_like.device
    token = torch.empty(num_rows, dtype=torch.int32, device=device)
    sureness = torch.empty(num_rows, dtype=torch.float32, device=device)
    probe_probability = torch.empty_like(sureness) if probe_tokens is not None else None
    if num_rows == 0:
        return token, sureness, probe_probability
    if vocab_size == 0:
        raise ValueError("weight: expected at least one row, got none")
    library, stream = extension.load(), extension.stream_of(rows_like)
    measure = CONFIDENCES.index(confidence)
    rules, draw, changes = arguments_of(rules)
    request, positions = request.contiguous(), positions.contiguous()
    probe_tokens = None if probe_tokens is None else probe_tokens.contiguous()
    partials = empty_partials(rows_like, vocab_size, PARTIAL_WORDS)
    filters, least, of_parts = _filters(rules), None, changes
    if filters:  # which look at logits as they are changed
        parts = _changed(parts, rules, request, positions, suppress_token)
        of_parts = {name: value[..., :0].contiguous() for name, value in changes.items()}
    for rows, first_token, logits in parts:
        if filters:
            least = torch.empty(logits.shape[0], dtype=torch.float32, device=device)
            library.lm_head_sample_filter(
                logits=logits,
                request=request[rows],
                temperature=rules.temperature,
                top_p=rules.top_p,
                top_k=rules.top_k,
                least=least,
                stream=stream,
            )
        library.lm_head_sample_reduce(
            logits=logits,
            request=request[rows],
            positions=positions[rows],
            **draw,
            **of_parts,
            least=least,
            probe_tokens=None if probe_tokens is None else probe_tokens[rows],
            partials=partials[rows],
            first_token=first_token,
            first_piece=first_token // library.LM_HEAD_PIECE_TOKENS,
            suppress_token=suppress_token,
            confidence=measure,
            stream=stream,
        )
    library.lm_head_sample_finish(
        partials=partials,
        probe_tokens=probe_tokens,
        token=token,
        sureness=sureness,
        probe_probability=probe_probability,
        vocab_size=vocab_size,
        confidence=measure,
        stream=stream,
    )
    return token, sureness, probe_probability


def arguments_of(rules: SamplingRules) -> tuple[SamplingRules, dict[str, Tensor], dict[str, Tensor]]:
    """Contiguous rules; those of the noise, and those that change logits."""
    rules = SamplingRules(*(None if value is None else value.contiguous() for value in rules))
    draw = dict(temperature=rules.temperature, seed=rules.seed, forward=rules.forward)
    changes = {name: getattr(rules, name) for name in ("changed_token", "logit_bias", "banned_before")}
    return rules, draw, changes


def _whole_rows(
    hidden: Tensor, weight: Tensor, weight_scale: Tensor | None
) -> Iterator[tuple[slice, int, Tensor]]:
    """As `parts_of_logits`, some rows with the logits of all tokens."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    part = max(1, tuning.LM_HEAD_LOGITS_BYTES // ((4 + hidden.element_size()) * vocab_size))
    for first in range(0, num_rows, part):
        rows = slice(first, first + part)
        if weight_scale is None:
            logits = torch.mm(hidden[rows], weight.t())
        else:
            own = quantize_rows(hidden[rows])
            logits = linear_fp8(*own, weight, weight_scale, out_dtype=hidden.dtype)
        yield rows, 0, logits


def _changed(
    parts: Iterable[tuple[slice, int, Tensor]],
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    suppress_token: int | None,
) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows of all tokens in fp32, as the rules change them."""
    tokens = rules.changed_token.long()
    for rows, first_token, given in parts:
        logits = given.float() if given.dtype != torch.float32 else given.clone()  # never the caller's own
        if suppress_token is not None:
            logits[:, suppress_token] = float("-inf")
        if tokens.numel():
            of_rows = request[rows].long()
            bias = rules.logit_bias[of_rows]
            banned = positions[rows].unsqueeze(1) < rules.banned_before[of_rows]
            banned |= bias == float("-inf")
            changed = logits.index_select(1, tokens) + bias
            logits.index_copy_(1, tokens, changed.masked_fill_(banned, float("-inf")))
        yield rows, first_token, logits
