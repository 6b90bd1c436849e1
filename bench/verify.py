"""Whether a step computes what it should: against fp32 arithmetic, the reference backend and its policy.

The reference backend runs in the dtype of the weights: its own distance from fp32 says what rounding costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from cases import StepCase, as_backend
from random_models import with_backend
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.decoding.batch import Batch
from blockbatch.models import Model, transformer
from blockbatch.models.kv_scales import KVScales
from blockbatch.models.weights import LayerWeights, TransformerWeights

# An error may be twice the reference's own, and this much for a rounding more or less.
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
# In fp32 a step of more tokens takes seconds: where the reference's error is known, that serves instead.
MAX_TRUTH_TOKENS = 256


class Case(Protocol):
    """A batch at a forward that can be checked: of `tokens` packed queries, which make `predictions`."""

    model: Model
    batch: Batch
    tokens: int
    predictions: int


class Wrong(SystemExit):
    """A result that fails its check; the process ends with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(f"verification failed: {message}")


class _UpcastLayers:
    """The layers of a model in fp32, one at a time."""

    def __init__(self, layers: list[LayerWeights]) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> LayerWeights:
        layer = self._layers[index]
        parts = {field.name: getattr(layer, field.name) for field in fields(layer)}
        return LayerWeights(**{name: None if part is None else part.float() for name, part in parts.items()})

    def __iter__(self) -> Iterator[LayerWeights]:
        return (self[index] for index in range(len(self)))


class _UpcastCache:
    """A K/V cache in fp32, one layer at a time, as numbers that it stands for; what is written there is
    forgotten with the layer."""

    def __init__(self, kv: Tensor, scales: KVScales | None) -> None:
        self._kv, self.device, self.shape, self._scales = kv, kv.device, kv.shape, scales

    def __getitem__(self, index: int) -> Tensor:
        exact = self._kv[index].float()
        if self._scales is not None:
            for side, scale in enumerate((self._scales.k[index], self._scales.v[index])):
                exact[side] *= scale[:, None]
        return exact


@dataclass
class Hidden:
    """Final hidden states of the packed queries, [tokens, hidden_size], and which of them predict what."""

    ours: Tensor
    reference: Tensor | None  # None, as the truth: not asked for
    truth: Tensor | None
    predict_index: Tensor
    predict_target: Tensor


def upcast(weights: TransformerWeights) -> TransformerWeights:
    """The same weights in fp32, a layer at a time; the LM head as it is."""
    return TransformerWeights(
        weights.embedding.float(), _UpcastLayers(weights.layers), weights.final_norm.float(), weights.lm_head
    )


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.float() - truth.float()).norm() / truth.float().norm())


def _forward(model: Model, case: Case, packed: bbk.PackedQueries) -> Tensor:
    rope = transformer.rope_table(model.spec, model.device)
    batch = case.batch
    return transformer.forward(
        model.spec,
        model.weights,
        rope,
        packed,
        batch.cache.kv,
        batch.cache.page_table,
        batch.seqlens_k,
        distinct_rows=batch.cache.distinct_rows,
        backend=model.backend,
        kv_scales=model.kv_scales,
    )[: case.tokens]


def _truth(model: Model, case: Case, packed: bbk.PackedQueries) -> Tensor:
    batch = case.batch
    return transformer.forward(
        model.spec,
        upcast(model.weights),
        transformer.rope_table(model.spec, model.device),
        packed,
        _UpcastCache(batch.cache.kv, model.kv_scales),
        batch.cache.page_table,
        batch.seqlens_k,
        backend="reference",
    )


def hidden_states(case: Case, *, with_truth: bool = True, with_reference: bool = True) -> Hidden:
    """The forward that the case's batch is at, all of its queries in one pack, by up to three ways."""
    batch, model = case.batch, case.model
    block = bbk.PHASES[int(batch.plan.flags[1])] == "block"
    packed = bbk.pack_windows(
        batch.state,
        batch.plan,
        batch.cache.page_table,
        page_size=batch.cache.page_size,
        capacity=case.tokens,
        predict_capacity=case.predictions,
        prediction_offset=model.spec.prediction_offset,
        scattered=block and batch.method.params.query_span == "open",
        backend="reference",
    )
    ours = _forward(model, case, packed)
    reference = _forward(with_backend(model, "reference"), case, packed) if with_reference else None
    truth = _truth(model, case, packed) if with_truth else None
    return Hidden(ours, reference, truth, packed.predict_index, packed.predict_target)


def check_hidden(hidden: Hidden, dtype: torch.dtype, reference_error: float | None) -> dict[str, Any]:
    """Raises `Wrong` if the hidden states are further from fp32 than twice the reference backend's.

    Args:
        reference_error: the reference backend's error at another size, needed for a step without fp32 values:
            two results that err by at most twice and once so much may differ by three times as much.
    """
    if not hidden.ours.isfinite().all():
        raise Wrong("hidden states: expected finite values, got others")
    if hidden.truth is None:
        difference = relative_error(hidden.ours, hidden.reference)
        allowed = 3 * reference_error + _ROUNDING[dtype]
        if not difference <= allowed:
            raise Wrong(
                f"hidden states: expected within {allowed:.2e} of the reference, got {difference:.2e}"
            )
        return {"hidden_difference_from_reference": difference}
    ours, theirs = (relative_error(value, hidden.truth) for value in (hidden.ours, hidden.reference))
    allowed = 2 * theirs + _ROUNDING[dtype]
    if not ours <= allowed:
        raise Wrong(f"hidden states: expected an error of at most {allowed:.2e}, got {ours:.2e}")
    return {"hidden_error": ours, "reference_hidden_error": theirs}


def check_predictions(case: Case, hidden: Hidden, top_token: Tensor, confidence: Tensor) -> dict:
    """Whether the timed forward's top tokens and confidences are those of fp32 arithmetic within rounding.

    Args:
        top_token, confidence: of the timed forward at `hidden.predict_target`.
    """
    spec, weight = case.model.spec, case.model.weights.lm_head
    read = hidden.reference
    if not isinstance(weight, Tensor):  # in e4m3: its product rounds the hidden states to e4m3
        values, of_row = bbk.quantize_rows(read, backend="reference")
        read = values.float() * of_row[:, None]
    logits = F.linear(hidden.truth[hidden.predict_index], weight.float())
    if spec.suppress_mask:
        logits[:, spec.mask_token_id] = float("-inf")
    best = logits.amax(-1)
    gap = best - logits.gather(-1, top_token.long().unsqueeze(-1)).squeeze(-1)
    finite = logits.isfinite()
    scale = float(logits[finite].square().mean().sqrt())
    error = relative_error(read, hidden.truth)
    # A logit of unit scale errs by about the hidden states' relative error; 8 of those are out of reach of
    # chance over some hundred predictions, and the products round their logits once more.
    allowed = 8 * error * scale + 2 * float(torch.finfo(hidden.ours.dtype).eps) * float(best.abs().max())
    if not float(gap.max()) <= allowed:
        raise Wrong(
            f"top tokens: expected logits within {allowed:.3f} of the best, got {float(gap.max()):.3f}"
        )
    true_confidence = 1.0 / (logits - best.unsqueeze(-1)).exp().sum(-1)
    apart = float((confidence / true_confidence).log().abs().max())
    if not apart <= 2 * allowed + 1e-4:
        raise Wrong(f"confidences: expected factors within e^{2 * allowed:.3f}, got e^{apart:.3f}")
    return {
        "top_tokens_equal_to_fp32": float((top_token == logits.argmax(-1)).float().mean()),
        "largest_log_confidence_error": apart,
    }


def check_policy(case: StepCase, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the timed step once, and the reference policy on its predictions: all state must be the same bits.

    Returns top token and confidence at `target`, and the tokens that each row committed.
    """
    batch = case.batch
    case.restore()
    before = batch.state.committed.clone()
    case.run()
    state = {field.name: getattr(batch.state, field.name).clone() for field in fields(batch.state)}
    plan, table = batch.plan.host_part().clone(), batch.cache.page_table.clone()
    top_token, confidence = (state[name].flatten()[target] for name in ("top_token", "confidence"))

    case.restore()
    reference = as_backend(batch, "reference")
    bbk.decode_policy(
        reference.state,
        bbk.Predictions(target, top_token, confidence),
        reference.plan,
        reference.method.params,
        out=(reference.plan, reference.events),
        backend="reference",
    )
    reference.cache.share(reference.events.sync_source)
    for name, value in state.items():
        if not torch.equal(value, getattr(batch.state, name)):
            raise Wrong(f"state.{name}: expected the reference policy's, got another")
    if not torch.equal(plan, batch.plan.host_part()) or not torch.equal(table, batch.cache.page_table):
        raise Wrong("plan and page table: expected the reference policy's, got others")
    return top_token, confidence, state["committed"] - before


def check_step(case: StepCase, reference_error: float | None = None) -> dict[str, Any]:
    """All checks of a step; what they found, for the record.

    Raises:
        Wrong: one of them failed.
    """
    case.restore()
    hidden = hidden_states(case, with_truth=reference_error is None or case.tokens <= MAX_TRUTH_TOKENS)
    found = check_hidden(hidden, case.model.dtype, reference_error)
    top_token, confidence, committed = check_policy(case, hidden.predict_target)
    if hidden.truth is not None:
        found |= check_predictions(case, hidden, top_token, confidence)
    # The same step by the reference backend commits as many tokens in every row.
    case.restore()
    before = case.batch.state.committed.clone()
    case.by(with_backend(case.model, "reference"))()
    theirs = case.batch.state.committed - before
    if not torch.equal(committed, theirs):
        raise Wrong(f"commits of each row: expected {theirs.tolist()}, got {committed.tolist()}")
    same = case.batch.state.top_token.flatten()[hidden.predict_target] == top_token
    found["top_tokens_equal_to_reference"] = float(same.float().mean())
    found["committed"] = committed.tolist()
    case.restore()
    return found


def check_eager(case: StepCase, eager: StepCase) -> None:
    """Raises `Wrong` if plain torch does not compute the case's step, itself checked, from the same state.

    The state and the cache of `eager` are *written*.
    """
    case.restore()
    for field in fields(case.batch.state):
        getattr(eager.batch.state, field.name).copy_(getattr(case.batch.state, field.name))
    eager.batch.plan.host_part().copy_(case.batch.plan.host_part())
    eager.batch.plan.predict.copy_(case.batch.plan.predict)
    length, table = case.canvas_length, case.batch.cache.page_table.long()
    for row, pages in enumerate(table):
        eager.batch.cache.kv[:, :, row] = case.batch.cache.kv[:, :, pages].flatten(2, 3)[:, :, :length]
    predicted = case.batch.plan.predict.clone()
    case.run()
    eager.run()
    theirs, ours = (run.batch.state.confidence[predicted] for run in (eager, case))
    # Confidences are a few thousandths for all of some hundred predictions: what differs is rounding.
    apart = float((theirs / ours).log().abs().median())
    if not apart <= 0.1:
        raise Wrong(f"plain torch: expected the step's confidences, got a median factor of e^{apart:.3f}")
    case.restore()
