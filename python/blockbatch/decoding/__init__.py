"""The decoding methods, and the session that runs any of them."""

from importlib import import_module

from blockbatch.decoding.block_diffusion import BUILDERS as BLOCK_METHOD_BUILDERS
from blockbatch.decoding.block_session import BlockSession, BlockStep
from blockbatch.decoding.method import Method
from blockbatch.decoding.runners import RunnerPool
from blockbatch.decoding.session import Session
from blockbatch.methods import METHOD_TABLE
from blockbatch.steps import Step

METHOD_BUILDERS = {name: import_module(row.module).method for name, row in METHOD_TABLE.items()}

__all__ = [
    "BLOCK_METHOD_BUILDERS",
    "METHOD_BUILDERS",
    "BlockSession",
    "BlockStep",
    "Method",
    "RunnerPool",
    "Session",
    "Step",
]
