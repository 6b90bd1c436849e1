"""Fast-dLLM's dual cache (arXiv 2505.22618): a full forward per block, then the block alone."""

from blockbatch.config import DecodeConfig
from blockbatch.decoding.method import Method, single_branch
from blockbatch.models.spec import ModelSpec


def method(config: DecodeConfig, spec: ModelSpec, eos_token_ids: tuple[int, ...]) -> Method:
    return single_branch(config, spec, eos_token_ids, query_span=config.query_span, refresh_every_block=True)
