"""A small trained LLaDA-architecture model: its tokenizer, training script and checkpoint.

Its problems are `blockbatch.tasks.built_in`.
"""

from __future__ import annotations

from blockbatch.tasks.built_in import FAMILIES, KINDS, check, generate_problems
from blockbatch.tasks.built_in import DrawnProblem as Problem

__all__ = ["FAMILIES", "KINDS", "Problem", "check", "generate_problems"]
