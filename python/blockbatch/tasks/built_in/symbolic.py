"""The symbolic family: exact transformations, some parallel (`records`), some sequential (`chains`)."""

from __future__ import annotations

import random

from blockbatch.tasks.built_in import chains, records
from blockbatch.tasks.built_in.drawn import DrawnProblem

FAMILY = "symbolic"
_KINDS = {
    "json": (records.draw_json, records.check_json),
    "table": (records.draw_table, records.check_table),
    "sort": (records.draw_sort, records.check_sort),
    "trace": (chains.draw_trace, chains.check_lines),
    "modular": (chains.draw_modular, chains.check_lines),
    "euclid": (chains.draw_euclid, chains.check_lines),
    "collatz": (chains.draw_collatz, chains.check_lines),
}
KINDS = tuple(_KINDS)


def draw(rng: random.Random) -> DrawnProblem:
    """One random problem of a random kind."""
    return _KINDS[rng.choice(KINDS)][0](rng)


def check(problem: DrawnProblem, text: str) -> bool:
    """True if `text` says the same as the reference answer; what may differ depends on the kind."""
    return _KINDS[problem.kind][1](problem, text)
