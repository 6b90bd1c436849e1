"""`lm_head_sample` of a vocabulary that is dealt out: what is to be known of a part, and all parts merged.

Without `top_p` and `top_k`: what these leave of a row depends on all of its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.reference.sampling import scores_of
from blockbatch_kernels.structs import SamplingRules

_PIECE_TOKENS = 4096
_WORDS = 8  # score, token, logit, highest, total, second, probe; the last is not used
_NONE = float("-inf")


def part_tokens() -> int:
    """Tokens of a piece."""
    return _PIECE_TOKENS


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
    """What `merge_parts` takes, of the logits [rows, tokens] of consecutive tokens; they stay as they are.

    Args:
        first_token: what they begin with. Ids are those of the whole vocabulary, also in `probe_tokens` and
            `suppress_token`.
        num_pieces: of the result; at least those of `part_tokens()` that the logits have.

    Returns:
        [rows, num_pieces, 8] fp32, for this backend's `merge_parts`; of a row's probe only in the piece that
        holds it. Pieces without a token have no weight.
    """
    wide = logits.float() if logits.dtype != torch.float32 else logits.clone()
    if suppress_token is not None:
        suppress_token -= first_token
        suppress_token = suppress_token if 0 <= suppress_token < wide.shape[1] else None
    own_rules = _of_part(rules, first_token, wide.shape[1])
    scores = scores_of(wide, own_rules, request, positions, suppress_token, first_token)
    parts = wide.new_full((len(wide), num_pieces, _WORDS), _NONE)
    parts[..., 1], parts[..., 4] = 0.0, 0.0
    for piece, begin in enumerate(range(0, wide.shape[1], _PIECE_TOKENS)):
        tokens = slice(begin, begin + _PIECE_TOKENS)
        own, start = wide[:, tokens], first_token + begin
        drawn, top = scores[:, tokens].argmax(-1, keepdim=True), own.argmax(-1, keepdim=True)
        highest = own.gather(1, top)
        distance = own - torch.where(highest == _NONE, 0.0, highest)
        weights = distance.exp()
        second = torch.full_like(highest, _NONE)
        if confidence == "entropy":
            second = torch.where(weights > 0, weights * distance, 0.0).sum(-1, keepdim=True)
        elif confidence == "margin":
            second = own.scatter(1, top, _NONE).amax(-1, keepdim=True)
        probe = torch.full_like(highest, _NONE)
        if probe_tokens is not None:
            place = probe_tokens.long().unsqueeze(1) - start
            inside = (place >= 0) & (place < own.shape[1])
            found = own.gather(1, place.clamp(0, own.shape[1] - 1))
            probe = torch.where(inside, found, _NONE)
        values = scores[:, tokens].gather(1, drawn), (drawn + start).float(), own.gather(1, drawn)
        values = *values, highest, weights.sum(-1, keepdim=True), second, probe
        parts[:, piece, : len(values)] = torch.cat(values, 1)
    return parts


def _of_part(rules: SamplingRules, first_token: int, num_tokens: int) -> SamplingRules:
    """What the rules change among these tokens, counted from their first one."""
    tokens = rules.changed_token - first_token
    here = ((tokens >= 0) & (tokens < num_tokens)).nonzero().squeeze(1)
    return rules._replace(
        changed_token=tokens[here],
        logit_bias=rules.logit_bias[:, here],
        banned_before=rules.banned_before[:, here],
    )


def merge_parts(
    parts: Tensor, probe_piece: Tensor | None, confidence: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `lm_head_sample` returns, from the parts of the whole vocabulary.

    Args:
        parts: [rows, pieces, 8], in the order of the tokens.
        probe_piece: [rows], in which of them a row's probe is; below 0 or none of them: its probability is
            NaN.
    """
    score, token, logit, highest, total, second, probe, _ = parts.unbind(-1)
    best, first = score.argmax(-1, keepdim=True), highest.argmax(-1, keepdim=True)
    top = highest.gather(1, first)
    scale = (highest - top).exp()
    whole = (total * scale).sum(-1, keepdim=True)
    if confidence == "probability":
        sure = (logit.gather(1, best) - top).exp() / whole
    elif confidence == "entropy":
        terms = torch.where(scale > 0, scale * (second + total * (highest - top)), 0.0)
        sure = (terms.sum(-1, keepdim=True) / whole).exp() / whole
    else:
        others = highest.scatter(1, first, _NONE).amax(-1, keepdim=True)
        sure = (1.0 - (torch.maximum(others, second.amax(-1, keepdim=True)) - top).exp()) / whole
    sure = torch.where(sure > 1.0, 1.0, sure).squeeze(1)
    probability = None
    if probe_piece is not None:
        piece = probe_piece.long().unsqueeze(1)
        known = (piece >= 0) & (piece < parts.shape[1])
        found = (probe.gather(1, piece.clamp(0, parts.shape[1] - 1)) - top).exp() / whole
        probability = torch.where(known, found, float("nan")).squeeze(1)
    return token.gather(1, best).squeeze(1).int(), sure, probability
