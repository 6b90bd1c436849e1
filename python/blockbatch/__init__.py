"""BlockBatch: masked diffusion language models decoded fast, with several block sizes at once.

LLaDA and Dream, whose attention is full, and SDAR, TraDo and Fast-dLLM v2, whose attention is block-causal.

::

    import blockbatch

    model = blockbatch.load_model("tiny")
    result = blockbatch.generate(model, "...", blockbatch.DecodeConfig(gen_length=128))
    print(result.text, result.nfe.total)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockbatch.branches import NFE, BranchResult
    from blockbatch.config import DecodeConfig
    from blockbatch.decoding import NonFiniteLogitsError
    from blockbatch.decoding.rule import RuleState
    from blockbatch.decoding.rule_builder import commit_rule
    from blockbatch.generation import generate, stream
    from blockbatch.infill import fill
    from blockbatch.methods import METHODS
    from blockbatch.models import CheckpointError, Model, load_model
    from blockbatch.parallel import RankError
    from blockbatch.registry import register_method, unregister_method
    from blockbatch.result import FillResult, Gap, Result
    from blockbatch.sampling_options import request_seed
    from blockbatch.streaming import Stream
    from blockbatch.tracing import load_trace, save_trace
    from blockbatch_kernels import __version__

# Where each name lives. They are imported when they are first asked for: torch takes seconds to import, which
# `blockbatch --help` and a mistyped option should not wait for.
_HOMES = {
    "METHODS": "blockbatch.methods",
    "NFE": "blockbatch.branches",
    "BranchResult": "blockbatch.branches",
    "CheckpointError": "blockbatch.models",
    "DecodeConfig": "blockbatch.config",
    "FillResult": "blockbatch.result",
    "Gap": "blockbatch.result",
    "Model": "blockbatch.models",
    "NonFiniteLogitsError": "blockbatch.decoding",
    "RankError": "blockbatch.parallel",
    "Result": "blockbatch.result",
    "RuleState": "blockbatch.decoding",
    "Stream": "blockbatch.streaming",
    "__version__": "blockbatch_kernels",
    "commit_rule": "blockbatch.decoding.rule_builder",
    "fill": "blockbatch.infill",
    "generate": "blockbatch.generation",
    "load_model": "blockbatch.models",
    "load_trace": "blockbatch.tracing",
    "register_method": "blockbatch.registry",
    "request_seed": "blockbatch.sampling_options",
    "save_trace": "blockbatch.tracing",
    "stream": "blockbatch.generation",
    "unregister_method": "blockbatch.registry",
}

__all__ = [
    "METHODS",
    "NFE",
    "BranchResult",
    "CheckpointError",
    "DecodeConfig",
    "FillResult",
    "Gap",
    "Model",
    "NonFiniteLogitsError",
    "RankError",
    "Result",
    "RuleState",
    "Stream",
    "__version__",
    "commit_rule",
    "fill",
    "generate",
    "load_model",
    "load_trace",
    "register_method",
    "request_seed",
    "save_trace",
    "stream",
    "unregister_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
