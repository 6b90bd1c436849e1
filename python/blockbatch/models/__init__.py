"""HuggingFace checkpoints of LLaDA, Dream, SDAR and Fast-dLLM v2 as one transformer on our operators."""

from blockbatch.models.checkpoint import CheckpointError
from blockbatch.models.model import Model, load_model
from blockbatch.models.spec import ModelSpec

__all__ = ["CheckpointError", "Model", "ModelSpec", "load_model"]
