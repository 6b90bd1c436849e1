"""Fast-dLLM's prefix cache (arXiv 2505.22618): a full forward per block, then the block and all behind it."""

from blockbatch.config import DecodeConfig
from blockbatch.decoding.method import Method, single_branch
from blockbatch.models.spec import ModelSpec


def method(config: DecodeConfig, spec: ModelSpec, eos_token_ids: tuple[int, ...]) -> Method:
    return single_branch(config, spec, eos_token_ids, query_span="suffix", refresh_every_block=True)
