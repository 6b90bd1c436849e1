"""The LM head that draws tokens, and changes what may be drawn."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor

from blockbatch_kernels.checks import checker
from blockbatch_kernels.ops import dispatch, values
from blockbatch_kernels.shapes import CONFIDENCES
from blockbatch_kernels.structs import SamplingRules

_check_lm_head_sample = checker("lm_head_sample")
_PARTS = {
    "reference": "blockbatch_kernels.reference.sampling_parts",
    "cuda": "blockbatch_kernels.cuda.sampling_parts",
}


def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    rules: SamplingRules,
    request: Tensor,
    positions: Tensor,
    *,
    probe_tokens: Tensor | None = None,
    suppress_token: int | None = None,
    confidence: str = "probability",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A token for each hidden state, drawn from the softmax of its logits over the temperature.

    The logits of a row are those of `lm_head_confidence`, changed as its request's rules say: `logit_bias` is
    added, banned tokens have probability 0. Everything below is of these changed logits.

    The token is the one of the highest logit / temperature + noise, with Gumbel noise, which is a draw from
    the softmax of logit / temperature (Gumbel-max; LLaDA, arXiv 2502.09992, samples so). The lowest id counts
    on a tie; at temperature 0 there is no noise. The noise is a function of the request's seed and forward,
    of the position and of the token's id alone: 32 bits of an integer hash, the same on every backend, so
    that a row's token depends neither on the other rows nor on its place among them.

    `top_k` and `top_p` leave the tokens above which there are fewer than `top_k` others, and others of less
    than `top_p` of the probability, at the temperature; of equal logits all stay or none. The highest always
    stays. Without noise they change nothing.

    The confidence is that of the model, at temperature 1 and of all tokens, whatever the token was drawn
    from: "probability", that of the drawn token; "entropy", exp(sum of p log p), which is 1 over the number
    of equally likely tokens of the same entropy; "margin", the highest probability minus the second highest.

    Rows without a softmax: as `lm_head_confidence`; so is a row of which every token is banned.

    With `top_p` or `top_k` in the rules all logits of some rows exist at the same time; else those of a part
    of the vocabulary.

    Args:
        hidden: [predictions, dim], fp32, bf16 or fp16.
        weight: [vocabulary, dim], same dtype.
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
    _check_lm_head_sample(hidden, weight, rules, request, positions, probe_tokens, suppress_token, confidence)
    if suppress_token is not None and not 0 <= suppress_token < weight.shape[0]:
        raise ValueError(f"suppress_token: expected an id below {weight.shape[0]}, got {suppress_token}")
    check_confidence(confidence)
    if values.ENABLED:
        values.check_sampling(rules, request, probe_tokens, weight.shape[0])
    return dispatch.module_for(backend, "lm_head_sample", hidden).lm_head_sample(
        hidden,
        weight,
        rules,
        request,
        positions,
        probe_tokens=probe_tokens,
        suppress_token=suppress_token,
        confidence=confidence,
    )


def sampling_of(hidden: Tensor, backend: str | None = None) -> ModuleType:
    """The module behind `lm_head_sample`: its `sample_logits` does the same to logits that exist.

    For whoever computes logits elsewhere, as the ranks of a model do; nothing is checked there.

    Args:
        hidden: on the device of the logits.

    Raises:
        ValueError, RuntimeError: the backend is none, or cannot run there.
    """
    name = dispatch.backend_of("lm_head_sample", hidden.device, backend)
    return import_module(f"blockbatch_kernels.{name}.sampling")


def parts_of(hidden: Tensor, rules: SamplingRules, backend: str | None = None) -> ModuleType | None:
    """As `sampling_of`, the module whose `sample_parts` and `merge_parts` do it by parts of the vocabulary.

    None: this backend has none, or these rules need all logits of a row.
    """
    if rules.top_p is not None or rules.top_k is not None:
        return None
    name = dispatch.backend_of("lm_head_sample", hidden.device, backend)
    return import_module(_PARTS[name]) if name in _PARTS else None


def check_confidence(confidence: str) -> None:
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence: expected one of {', '.join(CONFIDENCES)}, got {confidence!r}")
