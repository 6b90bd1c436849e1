"""The tasks by name: a row for each, with where its problems come from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blockbatch import sandbox
from blockbatch.tasks.built_in import FAMILIES, SPLITS, built_in_problems
from blockbatch.tasks.gsm8k import gsm8k
from blockbatch.tasks.humaneval import humaneval
from blockbatch.tasks.jsonl import parse_problems
from blockbatch.tasks.problem import Problem
from blockbatch.texts import decode_file

logger = logging.getLogger(__name__)

DEFAULT_COUNT = 100


@dataclass(frozen=True)
class Wanted:
    """Which problems of a task, and what may be done to judge them; see `load_task`."""

    split: str
    limit: int | None
    seed: int
    run_code: bool
    accept_weaker_sandbox: bool


@dataclass(frozen=True)
class Task:
    """One row.

    Attributes:
        name: what `load_task` calls it.
        load: its problems; of more than `Wanted.limit` the first are taken.
        splits: those that it has.
        writes_code: whether answers are programs, which have to run to be judged.
    """

    name: str
    load: Callable[[Wanted], list[Problem]]
    splits: tuple[str, ...] = ("test",)
    writes_code: bool = False


def _family(name: str) -> Task:
    def load(wanted: Wanted) -> list[Problem]:
        count = DEFAULT_COUNT if wanted.limit is None else wanted.limit
        return built_in_problems(
            name, split=wanted.split, count=count, seed=wanted.seed, run_code=wanted.run_code
        )

    return Task(name, load, splits=SPLITS, writes_code=name == "code")


def _humaneval(wanted: Wanted) -> list[Problem]:
    return humaneval(run_code=wanted.run_code, accept_weaker_sandbox=wanted.accept_weaker_sandbox)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *map(_family, FAMILIES),
        Task("humaneval", _humaneval, writes_code=True),
        Task("gsm8k", lambda wanted: gsm8k()),
        Task("gsm8k-5shot", lambda wanted: gsm8k(shots=5)),
    )
}


def load_task(
    name: str,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    run_code: bool = False,
    accept_weaker_sandbox: bool = False,
) -> list[Problem]:
    """The problems of a task, always in the same order; a larger `limit` only appends.

    Args:
        name: one of `TASKS`, or the path of a JSONL file (see `jsonl.parse_problems`).
        split: "test", or "train" and "held_out" of the built-in families.
        limit: how many problems; by default 100 of a built-in family and all of anything else.
        seed: draws the problems of the built-in families; the others come in their own order.
        run_code: the permission to run what the model writes, in a sandbox. Without it the problems of
            "code" and "humaneval" cannot be judged.
        accept_weaker_sandbox: run it even where this system cannot cut it off (see `sandbox.isolation`).

    A problem of a file whose texts hold half a character is left out, with a warning.

    Raises ValueError for an unknown task, split or limit, for a file that is not as expected and for a task
    whose package is not installed (the message says which); OSError for a file that cannot be read and for
    a sandbox that cannot be had.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: expected a number of problems, at least 1, got {limit!r}")
    if name not in TASKS and not Path(name).suffix:
        raise ValueError(f"task: expected {', '.join(TASKS)} or the path of a JSONL file, got {name!r}")
    task = TASKS.get(name) or Task(name, lambda wanted: _file_problems(name))
    if len(task.splits) == 1 and split not in task.splits:
        raise ValueError(f'split: expected "{task.splits[0]}", the only one that {name} has, got {split!r}')
    if run_code and task.writes_code:
        sandbox.require(accept_weaker=accept_weaker_sandbox)
    return task.load(Wanted(split, limit, seed, run_code, accept_weaker_sandbox))[:limit]


def _file_problems(name: str) -> list[Problem]:
    try:
        text = decode_file(Path(name).read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"task: expected UTF-8 text, got {name}: {error}") from None

    def leave_out(why: str) -> None:
        logger.warning("%s; this problem is left out", why)

    return parse_problems(text, task=Path(name).stem, where=f"task: {name}", leave_out=leave_out)
