"""The packed queries of a forward, and what the model says about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import blockbatch_kernels as bbk
from blockbatch.decoding.batch import Batch


def pack(
    batch: Batch, plan: bbk.StepPlan, capacity: int, predict_capacity: int, *, scattered: bool = False
) -> bbk.PackedQueries:
    """The queries of a plan, in the slots of the batch's cache."""
    return bbk.pack_windows(
        batch.state,
        plan,
        batch.cache.page_table,
        page_size=batch.cache.page_size,
        capacity=capacity,
        predict_capacity=predict_capacity,
        prediction_offset=batch.method.params.prediction_offset,
        scattered=scattered,
        backend=batch.backend,
    )


def plan_of(batch: Batch, rows: slice) -> bbk.StepPlan:
    """The batch's plan for some of its rows alone."""
    query_end = torch.zeros_like(batch.plan.query_end)
    query_end[rows] = batch.plan.query_end[rows]
    # Regions begin behind their prompts, those of other rows as well.
    query_start = torch.minimum(batch.plan.query_start, query_end)
    return batch.plan._replace(query_start=query_start, query_end=query_end)


def predict(
    model: Any,
    batch: Batch,
    packed: bbk.PackedQueries,
    cache: Any,
    after_attention: Callable[[int], None] | None = None,
) -> bbk.Predictions:
    """One forward of packed queries, with what the batch's policy asks beside.

    Args:
        cache: see `Model.predict`.
        after_attention: see `transformer.forward`; None: as the model has it.
    """
    params = batch.method.params
    options: dict[str, Any] = {} if after_attention is None else {"after_attention": after_attention}
    if batch.sampling is not None:
        options["sampling"] = batch.sampling.draw(batch.state, packed.predict_target)
    if params.policy == "dream_published":
        return model.predict(packed, cache, batch.seqlens_k, likely=True, **options)
    probe_tokens = None
    if params.eos_exit == "window":
        probe_tokens = batch.state.tokens.flatten()[packed.predict_target.clamp(min=0)]
    return model.predict(packed, cache, batch.seqlens_k, probe_tokens, **options)
