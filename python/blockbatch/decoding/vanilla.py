"""The plain decoder: no cache, every step computes the whole canvas and commits a fixed number of tokens."""

from blockbatch.config import DecodeConfig
from blockbatch.decoding.method import Method, single_branch
from blockbatch.models.spec import ModelSpec


def method(config: DecodeConfig, spec: ModelSpec, eos_token_ids: tuple[int, ...]) -> Method:
    return single_branch(config, spec, eos_token_ids, query_span="canvas", refresh_every_block=False)
