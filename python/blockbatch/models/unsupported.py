"""Diffusion language models that this package knows and does not run, refused by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockbatch.models.spec import CheckpointError

# What model_type or an architecture holds, in small letters without - and _; the model, and what it needs.
_MODELS = (
    ("llada2", "LLaDA2.x", "a mixture of experts with partial RoPE"),
    ("lladamoe", "LLaDA-MoE", "a mixture of experts"),
    ("sdarmoe", "SDAR-30B-A3B", "a mixture of experts"),
    ("diffusiongemma", "DiffusionGemma", "a mixture of experts that has no MASK"),
    ("nemotron", "Nemotron-Labs-Diffusion", "scaled RoPE, scaled queries and a causal pass over each block"),
    ("ministral3diffusion", "Nemotron-Labs-Diffusion", "scaled RoPE and a causal pass over each block"),
    ("bd3lm", "BD3-LM", "a transformer conditioned on time, with stochastic samplers"),
)


def refuse(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if config.json is of a known model that is not supported."""
    architectures = config.get("architectures")
    names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [])]
    for name in names:
        plain = name.lower().replace("_", "").replace("-", "") if isinstance(name, str) else ""
        for part, model, need in _MODELS:
            if part in plain:
                raise CheckpointError(f"config.json: {model} ({name!r}) is not supported ({need})")
