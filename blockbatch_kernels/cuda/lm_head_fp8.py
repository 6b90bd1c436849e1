"""The LM head with a weight in e4m3: logits by `linear_fp8`, all else as with a weight in 16 bits."""

from __future__ import annotations

from torch import Tensor

from blockbatch_kernels.cuda.lm_head import lm_head_confidence, lm_head_likely
from blockbatch_kernels.cuda.sampling import lm_head_sample
from blockbatch_kernels.structs import SamplingRules


def lm_head_confidence_fp8(
    hidden: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `lm_head_confidence`; where the extension has a tile for the product, it computes the logits."""
    options = dict(probe_tokens=probe_tokens, suppress_token=suppress_token)
    return lm_head_confidence(hidden, weight, weight_scale=weight_scale, **options)


def lm_head_likely_fp8(
    hidden: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    suppress_token: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lm_head_likely`."""
    return lm_head_likely(hidden, weight, weight_scale=weight_scale, suppress_token=suppress_token)


def lm_head_sample_fp8(
    hidden: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    confidence: str = "probability",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `lm_head_sample`."""
    return lm_head_sample(
        hidden,
        weight,
        rules,
        request,
        positions,
        weight_scale=weight_scale,
        probe_tokens=probe_tokens,
        suppress_token=suppress_token,
        confidence=confidence,
    )
