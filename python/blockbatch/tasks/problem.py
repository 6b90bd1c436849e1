"""What a problem is, whatever task it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        task: the group that it is counted in: a task's name, or a file's name without its ending.
        id: unique in its task and the same in every run.
        prompt: what the model continues; it carries no chat template.
        answer: the reference, for reports; None: unknown.
        is_right: whether a text solves it; None: nobody can say, for want of an answer or, where generated
            code has to run, of the permission.
    """

    task: str
    id: str
    prompt: str
    answer: str | None
    is_right: Callable[[str], bool] | None
