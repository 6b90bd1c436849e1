"""Tokens that are drawn by parts of the vocabulary; see `blockbatch_kernels.reference.sampling_parts`."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.sampling import PARTIAL_WORDS, arguments_of
from blockbatch_kernels.shapes import CONFIDENCES
from blockbatch_kernels.structs import SamplingRules

_TOKEN, _SUM = 1, 4  # words of a SamplePartial in csrc/gemm/lm_head_sample.h


def part_tokens() -> int:
    """Tokens of a piece."""
    return extension.load().LM_HEAD_PIECE_TOKENS


@torch.no_grad()
def sample_parts(
    logits: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    first_token: int,
    num_pieces: int,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    confidence: str = "probability",
) -> Tensor:
    """See `blockbatch_kernels.reference.sampling_parts.sample_parts`."""
    library = extension.load()
    _, draw, changes = arguments_of(rules)
    partials = logits.new_empty(len(logits), num_pieces, PARTIAL_WORDS, dtype=torch.float32)
    written = -(-logits.shape[1] // library.LM_HEAD_PIECE_TOKENS)
    if written < num_pieces:  # without tokens: of no weight, never drawn
        partials[:, written:] = float("-inf")
        partials[:, written:, _TOKEN] = 0.0
        partials[:, written:, _SUM] = 0.0
    library.lm_head_sample_reduce(
        logits=logits.contiguous(),
        request=request.contiguous(),
        positions=positions.contiguous(),
        **draw,
        **changes,
        least=None,
        probe_tokens=None if probe_tokens is None else probe_tokens.contiguous(),
        partials=partials,
        first_token=first_token,
        first_piece=0,
        suppress_token=suppress_token,
        confidence=CONFIDENCES.index(confidence),
        stream=extension.stream_of(logits),
    )
    # As a number: what adds up parts of several ranks need not keep the bits of an integer.
    partials[..., _TOKEN] = partials.view(torch.int32)[..., _TOKEN].float()
    return partials


@torch.no_grad()
def merge_parts(
    parts: Tensor, probe_piece: Tensor | None, confidence: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `blockbatch_kernels.reference.sampling_parts.merge_parts`."""
    (num_rows, num_pieces, _), device = parts.shape, parts.device
    token = torch.empty(num_rows, dtype=torch.int32, device=device)
    sureness = torch.empty(num_rows, dtype=torch.float32, device=device)
    probe_probability = torch.empty_like(sureness) if probe_piece is not None else None
    piece_tokens = part_tokens()
    partials = parts.clone(memory_format=torch.contiguous_format)
    partials.view(torch.int32)[..., _TOKEN] = parts[..., _TOKEN].int()
    extension.load().lm_head_sample_finish(
        partials=partials,
        # Of a probe the kernel asks in which piece it is; here pieces are not those of one vocabulary.
        probe_tokens=None if probe_piece is None else (probe_piece * piece_tokens).int(),
        token=token,
        sureness=sureness,
        probe_probability=probe_probability,
        vocab_size=num_pieces * piece_tokens,
        confidence=CONFIDENCES.index(confidence),
        stream=extension.stream_of(parts),
    )
    return token, sureness, probe_probability
