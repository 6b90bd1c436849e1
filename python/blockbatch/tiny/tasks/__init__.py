"""Problems with checkable answers in three families, and their checkers."""

from __future__ import annotations

import random

from blockbatch.tiny.tasks import arithmetic, code, symbolic
from blockbatch.tiny.tasks.problem import SPLITS, Problem, split_of

_MODULES = {"arithmetic": arithmetic, "code": code, "symbolic": symbolic}
FAMILIES = tuple(_MODULES)
KINDS = {family: module.KINDS for family, module in _MODULES.items()}


def generate_problems(family: str, split: str, count: int, seed: int) -> list[Problem]:
    """Draw `count` different problems of one family and split.

    The same arguments give the same problems on every machine and Python version, and a larger `count` only
    appends. "train", "held_out" and "test" share neither structures nor contents (see `split_of`): held-out
    and test problems are both unseen in training. Raises ValueError for an unknown family or split or a
    negative count.
    """
    if family not in _MODULES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    module = _MODULES[family]
    rng = random.Random(f"{family} {split} {seed}")
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < count:
        problem = module.draw(rng)
        if split_of(problem) != split or problem.prompt in seen:
            continue
        seen.add(problem.prompt)
        problems.append(code.finish(problem) if module is code else problem)
    return problems


def check(problem: Problem, text: str) -> bool:
    """True if `text`, the model's answer up to its EOS, solves `problem`.

    Arithmetic: the last `#### n` line holds the right number. Code: the function passes the problem's tests
    in a limited subprocess. Symbolic: the same JSON value, table cells, entries or steps as the reference.
    """
    return _MODULES[problem.family].check(problem, text)


__all__ = ["FAMILIES", "KINDS", "SPLITS", "Problem", "check", "generate_problems", "split_of"]
