"""The decoding methods, and the session that runs any of them."""

from blockbatch.decoding.block_session import BlockSession, BlockStep
from blockbatch.decoding.choice import BLOCK_METHOD_BUILDERS, METHOD_BUILDERS
from blockbatch.decoding.method import Method
from blockbatch.decoding.non_finite import NonFiniteLogitsError
from blockbatch.decoding.rule import CommitRule, RuleState
from blockbatch.decoding.runners import RunnerPool
from blockbatch.decoding.session import Session
from blockbatch.steps import Step

__all__ = [
    "BLOCK_METHOD_BUILDERS",
    "METHOD_BUILDERS",
    "BlockSession",
    "BlockStep",
    "CommitRule",
    "Method",
    "NonFiniteLogitsError",
    "RuleState",
    "RunnerPool",
    "Session",
    "Step",
]
