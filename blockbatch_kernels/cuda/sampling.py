"""A token for every hidden state, drawn with noise, from logits that exist a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.gemm_fp8 import linear_fp8
from blockbatch_kernels.cuda.lm_head import empty_partials, parts_of_logits
from blockbatch_kernels.cuda.quantized import quantize_rows
from blockbatch_kernels.shapes import CONFIDENCES
from blockbatch_kernels.structs import SamplingRules

_PARTIAL_WORDS = 8  # SamplePartial in csrc/gemm/lm_head_sample.h


@torch.no_grad()
def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    weight_scale: Tensor | None = None,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    confidence: str = "probability",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `blockbatch_kernels.ops.lm_head_sample`. Tensors as for `lm_head_confidence`, and the same way
    through a product in chunks of the vocabulary, with 32 bytes per row and 4096 tokens; with `top_p`
    or `top_k` in the rules in chunks of rows, in fp32."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    token = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    sureness = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    probe_probability = torch.empty_like(sureness) if probe_tokens is not None else None
    if num_rows == 0:
        return token, sureness, probe_probability
    if vocab_size == 0:
        raise ValueError("weight: expected at least one row, got none")
    library, stream = extension.load(), extension.stream_of(hidden)
    measure = CONFIDENCES.index(confidence)
    rules = SamplingRules(*(None if value is None else value.contiguous() for value in rules))
    request, positions = request.contiguous(), positions.contiguous()
    probe_tokens = None if probe_tokens is None else probe_tokens.contiguous()
    draw = dict(temperature=rules.temperature, seed=rules.seed, forward=rules.forward)
    changes = {name: getattr(rules, name) for name in ("changed_token", "logit_bias", "banned_before")}
    partials = empty_partials(hidden, weight, _PARTIAL_WORDS)
    filters = rules.top_p is not None or rules.top_k is not None
    least, of_parts = None, changes
    if filters:  # the parts come changed
        parts = _changed_rows(hidden, weight, weight_scale, rules, request, positions, suppress_token)
        of_parts = {name: value[..., :0].contiguous() for name, value in changes.items()}
    else:
        parts = parts_of_logits(hidden, weight, weight_scale)
    for rows, first_token, logits in parts:
        if filters:
            least = torch.empty(logits.shape[0], dtype=torch.float32, device=hidden.device)
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


def _changed_rows(
    hidden: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    suppress_token: int | None,
) -> Iterator[tuple[slice, int, Tensor]]:
    """Some rows and all of their logits, fp32, as the rules change them."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    part = max(1, tuning.LM_HEAD_LOGITS_BYTES // ((4 + hidden.element_size()) * vocab_size))
    tokens = rules.changed_token.long()
    for first in range(0, num_rows, part):
        rows = slice(first, first + part)
        if weight_scale is None:
            logits = torch.mm(hidden[rows], weight.t()).float()
        else:
            own = quantize_rows(hidden[rows])
            logits = linear_fp8(*own, weight, weight_scale, out_dtype=hidden.dtype).float()
        if suppress_token is not None:
            logits[:, suppress_token] = float("-inf")
        if tokens.numel():
            of_rows = request[rows].long()
            bias = rules.logit_bias[of_rows]
            banned = positions[rows].unsqueeze(1) < rules.banned_before[of_rows]
            banned |= bias == float("-inf")
            changed = logits.index_select(1, tokens) + bias
            logits.index_copy_(1, tokens, changed.masked_fill_(banned, float("-inf")))
        yield rows, 0, logits
