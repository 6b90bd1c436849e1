"""BlockBatch: fast decoding of masked diffusion language models (LLaDA, Dream) with several block sizes at
once.

::

    import blockbatch

    model = blockbatch.load_model("tiny")
    result = blockbatch.generate(model, "...", blockbatch.DecodeConfig(gen_length=128))
    print(result.text, result.nfe.total)
"""

from blockbatch.branches import NFE, BranchResult
from blockbatch.config import METHODS, DecodeConfig
from blockbatch.generation import Result, generate, stream
from blockbatch.models import CheckpointError, Model, load_model
from blockbatch.trace import save_trace
from blockbatch_kernels import __version__

__all__ = [
    "METHODS",
    "NFE",
    "BranchResult",
    "CheckpointError",
    "DecodeConfig",
    "Model",
    "Result",
    "__version__",
    "generate",
    "load_model",
    "save_trace",
    "stream",
]
