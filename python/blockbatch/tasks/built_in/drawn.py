"""What a generated problem is, and how they are divided into training, held-out and test splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "held_out", "test")


@dataclass(frozen=True)
class DrawnProblem:
    """One task with a checkable answer.

    `prompt` is the text given to the model (no trailing newline), `answer` a reference answer, `structure` a
    name of the problem's shape (which operations in which order, which phrasing, which fields) without its
    numbers and names, and `payload` the plain data that the family's checker needs.
    """

    family: str
    kind: str
    prompt: str
    answer: str
    structure: str
    payload: dict[str, Any] = field(default_factory=dict)


def stable_hash(text: str) -> int:
    """A 64-bit hash of `text` that is the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _part(text: str) -> str:
    bucket = stable_hash(text) % 10
    return "test" if bucket == 0 else "held_out" if bucket == 1 else "train"


def split_of(problem: DrawnProblem) -> str | None:
    """The split that owns `problem`, or None for a problem that no split may use.

    The structure and the content (kind and reference answer, so the same task in other words is the same
    content) are hashed on their own. A problem belongs to a split only if both hashes fall into it, which
    keeps every test or held-out structure and every test or held-out content out of training.
    """
    structure_part = _part(f"structure\n{problem.family}\n{problem.kind}\n{problem.structure}")
    content_part = _part(f"content\n{problem.family}\n{problem.kind}\n{problem.answer}")
    return structure_part if structure_part == content_part else None
