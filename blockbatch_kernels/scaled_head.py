"""The operators of an LM head in e4m3, made of those of a backend, which take the weight's scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from blockbatch_kernels.structs import SamplingRules


class ScaledHead(NamedTuple):
    """Named as in `blockbatch_kernels.ops`, without `_fp8`."""

    lm_head_confidence: Callable[..., Any]
    lm_head_likely: Callable[..., Any]
    lm_head_sample: Callable[..., Any]


def scaled_head(
    confidence: Callable[..., Any], likely: Callable[..., Any], sample: Callable[..., Any]
) -> ScaledHead:
    """The arguments are a backend's operators, with `weight_scale` as an option beside those of `ops`."""

    def lm_head_confidence(hidden: Tensor, weight: Tensor, weight_scale: Tensor, **options: Any) -> Any:
        return confidence(hidden, weight, weight_scale=weight_scale, **options)

    def lm_head_likely(hidden: Tensor, weight: Tensor, weight_scale: Tensor, **options: Any) -> Any:
        return likely(hidden, weight, weight_scale=weight_scale, **options)

    def lm_head_sample(
        hidden: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        rules: SamplingRules,
        request: Tensor,
        positions: Tensor,
        **options: Any,
    ) -> Any:
        return sample(hidden, weight, rules, request, positions, weight_scale=weight_scale, **options)

    return ScaledHead(lm_head_confidence, lm_head_likely, lm_head_sample)
