"""The decoding methods, and the session that runs any of them."""

from importlib import import_module

from blockbatch.decoding.method import Method
from blockbatch.decoding.non_finite import NonFiniteLogitsError
from blockbatch.decoding.runners import RunnerPool
from blockbatch.decoding.session import Session
from blockbatch.methods import METHOD_TABLE
from blockbatch.steps import Step

METHOD_BUILDERS = {name: import_module(row.module).method for name, row in METHOD_TABLE.items()}

__all__ = ["METHOD_BUILDERS", "Method", "NonFiniteLogitsError", "RunnerPool", "Session", "Step"]
