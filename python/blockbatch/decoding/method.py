"""What distinguishes one decoding method from another: its block sizes and the settings of the policy."""

from __future__ import annotations

from typing import NamedTuple

from blockbatch.config import DecodeConfig
from blockbatch.decoding.rule import CommitRule
from blockbatch.decoding.sampling import SamplingKind
from blockbatch.models.spec import ModelSpec
from blockbatch_kernels import PolicyParams


class Method(NamedTuple):
    """
    Attributes:
        block_sizes: of the rows of a request: one branch each, ascending. With drafts the first row is the
            only branch, and the drafts behind it have its size.
        params: the rules between two forwards.
        rule: what commits in the place of `params`; None: `params`.
        sampling: what drawing tokens takes; None: they are those of the highest logits.
    """

    block_sizes: tuple[int, ...]
    params: PolicyParams
    rule: CommitRule | None = None
    sampling: SamplingKind | None = None


def single_branch(
    config: DecodeConfig,
    spec: ModelSpec,
    eos_token_ids: tuple[int, ...],
    *,
    query_span: str,
    refresh_every_block: bool,
    leap_radius: int = 0,
) -> Method:
    """A baseline: one branch, so that merge and sync have nothing to do.

    Args:
        query_span: what a block step computes.
        refresh_every_block: a full forward at the start of every block, not at the first alone.
        leap_radius: LocalLeap's radius; 0: the plain threshold rule.
    """
    steps_per_block = None
    if config.threshold is None:
        steps_per_block = config.steps // (config.gen_length // config.block_size)
    params = PolicyParams(
        mask_token_id=spec.mask_token_id,
        eos_token_ids=eos_token_ids,
        threshold=config.threshold,
        steps_per_block=steps_per_block,
        leap_radius=leap_radius,
        leap_threshold=spec.leap_threshold if config.leap_threshold is None else config.leap_threshold,
        refresh_interval=config.block_size if refresh_every_block else None,
        eos_exit=config.eos_exit,
        query_span=query_span,
        refresh_scope=config.refresh_scope or "canvas",
        drafts=config.drafts or (),
        prediction_offset=spec.prediction_offset,
    )
    return Method((config.block_size,) * (1 + len(params.drafts)), params)
