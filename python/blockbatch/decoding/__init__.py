"""The decoding methods, and the session that runs any of them."""

from blockbatch.decoding import blockbatch, dual_cache, local_leap, prefix_cache, vanilla
from blockbatch.decoding.method import Method
from blockbatch.decoding.runners import RunnerPool
from blockbatch.decoding.session import Session
from blockbatch.steps import Step

METHOD_BUILDERS = {
    "blockbatch": blockbatch.method,
    "vanilla": vanilla.method,
    "prefix_cache": prefix_cache.method,
    "dual_cache": dual_cache.method,
    "local_leap": local_leap.method,
}

__all__ = ["METHOD_BUILDERS", "Method", "RunnerPool", "Session", "Step"]
