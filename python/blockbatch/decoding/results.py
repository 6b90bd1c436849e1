"""What a decode gives for one request, made of how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockbatch.branches import RequestOutcome
from blockbatch.decoding.block_session import BlockSession
from blockbatch.decoding.session import Session
from blockbatch.models.model import Model
from blockbatch.result import Result
from blockbatch.stops import cut


def build_result(
    model: Model, session: Session | BlockSession, request: int, trace: list[dict[str, Any]] | None = None
) -> Result:
    """The result of a finished request of a session."""
    return result_of(
        model,
        session.outcome(request),
        session.params.eos_token_ids,
        None if session.stops is None else session.stops.texts,
        session.seconds[request],
        trace,
    )


def result_of(
    model: Model,
    outcome: RequestOutcome,
    eos_token_ids: Sequence[int],
    stop: Sequence[str] | None,
    seconds: float,
    trace: list[dict[str, Any]] | None = None,
) -> Result:
    """The result of a request.

    Args:
        stop: texts that end it; None: none.
        seconds: that it took.
    """
    tokens, stop_reason = outcome.canvas, outcome.stop_reason
    if stop is not None:
        tokens, text, stopped = cut(model.tokenizer, tokens, stop, eos_token_ids)
        stop_reason = "stop" if stopped else stop_reason
    else:
        tokens = before_eos(tokens, eos_token_ids)
        text = model.tokenizer.decode(tokens) if model.tokenizer else None
    return Result(
        text=text,
        tokens=tokens,
        canvas=outcome.canvas,
        nfe=outcome.nfe,
        stop_reason=stop_reason,
        block_size=outcome.branches[outcome.winner].block_size,
        branches=outcome.branches,
        seconds=seconds,
        trace=trace,
        prefix_tokens=outcome.prefix_tokens,
    )


def before_eos(tokens: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """The ids in front of the first that ends a text."""
    for position, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[:position]
    return tokens
