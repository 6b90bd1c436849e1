"""A small trained LLaDA-architecture model: its problems, tokenizer, training script and checkpoint."""

from __future__ import annotations

from blockbatch.tiny.tasks import FAMILIES, KINDS, Problem, check, generate_problems

__all__ = ["FAMILIES", "KINDS", "Problem", "check", "generate_problems"]
