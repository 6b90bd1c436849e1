"""The LM head with a weight in e4m3: what its operators say of logits by `linear_fp8`.

Hidden states are quantised by token, as `quantize_rows` does it, the logits are those of `linear_fp8` rounded
to the dtype of the hidden states, and everything behind them is as in the operators without `_fp8`: also what
they say of rows without a softmax. A row that holds NaN or infinity is one.

Raises, as all operators; on a GPU the compiled versions need compute capability 8.9 or newer, and older ones
have the reference alone.
"""

from __future__ import annotations

from torch import Tensor

from blockbatch_kernels.checks import checker
from blockbatch_kernels.ops import dispatch, values
from blockbatch_kernels.ops.sampling import check_confidence
from blockbatch_kernels.structs import SamplingRules

_check_lm_head_confidence_fp8 = checker("lm_head_confidence_fp8")
_check_lm_head_likely_fp8 = checker("lm_head_likely_fp8")
_check_lm_head_sample_fp8 = checker("lm_head_sample_fp8")

_module_for = dispatch.module_for_e4m3


def lm_head_confidence_fp8(
    hidden: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`lm_head_confidence` of logits by `linear_fp8`.

    Args:
        hidden: [predictions, dim], fp32, bf16 or fp16; at least one column.
        weight: [vocabulary, dim] float8_e4m3fn.
        weight_scale: [vocabulary] fp32.
        probe_tokens: [predictions] int32, a token of each row whose probability is wanted as well.
        suppress_token: its logit counts as minus infinity, whatever it is.

    Returns:
        top_token [predictions] int32, confidence [predictions] fp32, probe_probability [predictions] fp32 or
        None.
    """
    _check_lm_head_confidence_fp8(hidden, weight, weight_scale, probe_tokens, suppress_token)
    _check_sizes(hidden, weight, suppress_token)
    if values.ENABLED and probe_tokens is not None:
        values.check_tokens("probe_tokens", probe_tokens, weight.shape[0])
    return _module_for(backend, "lm_head_confidence_fp8", hidden).lm_head_confidence_fp8(
        hidden, weight, weight_scale, probe_tokens=probe_tokens, suppress_token=suppress_token
    )


def lm_head_likely_fp8(
    hidden: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    suppress_token: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lm_head_likely` of logits by `linear_fp8`.

    Args:
        hidden, weight, weight_scale: as of `lm_head_confidence_fp8`.
        suppress_token: its logit counts as minus infinity for top token and confidence alone.

    Returns:
        top_token [predictions] int32, confidence [predictions] fp32, likely_token [predictions, 4] int32 and
        likely_probability [predictions, 4] fp32, in the order of `lm_head_likely`.
    """
    _check_lm_head_likely_fp8(hidden, weight, weight_scale, suppress_token)
    _check_sizes(hidden, weight, suppress_token)
    return _module_for(backend, "lm_head_likely_fp8", hidden).lm_head_likely_fp8(
        hidden, weight, weight_scale, suppress_token=suppress_token
    )


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`lm_head_sample` of logits by `linear_fp8`.

    Args:
        hidden, weight, weight_scale: as of `lm_head_confidence_fp8`.
        rules: of each request.
        request: [predictions] int32, which of the requests the row belongs to.
        positions: [predictions] int32, what is predicted, as the request counts.
        probe_tokens: [predictions] int32, a token of each row whose probability is wanted as well.
        suppress_token: banned in all rows.
        confidence: one of `CONFIDENCES`.

    Returns:
        token [predictions] int32, confidence [predictions] fp32, from 0 to 1, probe_probability
        [predictions] fp32 or None.
    """
    _check_lm_head_sample_fp8(
        hidden, weight, weight_scale, rules, request, positions, probe_tokens, suppress_token, confidence
    )
    _check_sizes(hidden, weight, suppress_token)
    check_confidence(confidence)
    if values.ENABLED:
        values.check_sampling(rules, request, probe_tokens, weight.shape[0])
    return _module_for(backend, "lm_head_sample_fp8", hidden).lm_head_sample_fp8(
        hidden,
        weight,
        weight_scale,
        rules,
        request,
        positions,
        probe_tokens=probe_tokens,
        suppress_token=suppress_token,
        confidence=confidence,
    )


def _check_sizes(hidden: Tensor, weight: Tensor, suppress_token: int | None) -> None:
    if hidden.shape[1] < 1:
        raise ValueError("hidden: expected at least one column, got none")
    if suppress_token is not None and not 0 <= suppress_token < weight.shape[0]:
        raise ValueError(f"suppress_token: expected an id below {weight.shape[0]}, got {suppress_token}")
