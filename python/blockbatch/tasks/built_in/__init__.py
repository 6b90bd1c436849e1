"""The families that the built-in model is trained on: problems with checkable answers, and their checkers."""

from __future__ import annotations

import random
from functools import partial

from blockbatch.tasks.built_in import arithmetic, code, symbolic
from blockbatch.tasks.built_in.drawn import SPLITS, DrawnProblem, split_of
from blockbatch.tasks.problem import Problem

_MODULES = {"arithmetic": arithmetic, "code": code, "symbolic": symbolic}
FAMILIES = tuple(_MODULES)
KINDS = {family: module.KINDS for family, module in _MODULES.items()}


def generate_problems(family: str, split: str, count: int, seed: int) -> list[DrawnProblem]:
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
    problems: list[DrawnProblem] = []
    seen: set[str] = set()
    while len(problems) < count:
        problem = module.draw(rng)
        if split_of(problem) != split or problem.prompt in seen:
            continue
        seen.add(problem.prompt)
        problems.append(code.finish(problem) if module is code else problem)
    return problems


def check(problem: DrawnProblem, text: str) -> bool:
    """True if `text`, the model's answer up to its EOS, solves `problem`.

    Arithmetic: the last `#### n` line holds the right number. Code: the function passes the problem's tests
    in a limited subprocess. Symbolic: the same JSON value, table cells, entries or steps as the reference.
    """
    return _MODULES[problem.family].check(problem, text)


def built_in_problems(family: str, *, split: str, count: int, seed: int, run_code: bool) -> list[Problem]:
    """`count` problems of a family; see `generate_problems`. Code is judged only if it may `run_code`."""
    return [
        Problem(
            family,
            f"{split}/{seed}/{index}",
            drawn.prompt,
            drawn.answer,
            partial(check, drawn) if run_code or family != "code" else None,
        )
        for index, drawn in enumerate(generate_problems(family, split, count, seed))
    ]


__all__ = [
    "FAMILIES",
    "KINDS",
    "SPLITS",
    "DrawnProblem",
    "built_in_problems",
    "check",
    "generate_problems",
    "split_of",
]
