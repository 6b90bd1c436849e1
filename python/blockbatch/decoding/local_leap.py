"""LocalLeap (arXiv 2510.07081) on the dual cache: near a sure token, less confidence is enough to commit."""

from blockbatch.config import DecodeConfig
from blockbatch.decoding.method import Method, single_branch
from blockbatch.models.spec import ModelSpec


def method(config: DecodeConfig, spec: ModelSpec, eos_token_ids: tuple[int, ...]) -> Method:
    return single_branch(
        config,
        spec,
        eos_token_ids,
        query_span=config.query_span,
        refresh_every_block=True,
        leap_radius=config.leap_radius,
    )
