"""The problems that `blockbatch compare` decodes, and whether a text solves one."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from blockbatch.cli.files import read_text

DEFAULT_COUNT, DEFAULT_SEED = 2, 0


class Task(NamedTuple):
    """One problem.

    Attributes:
        family: the group that it is counted in.
        prompt: as it is written in the problem.
        is_right: whether a text solves it; None: nothing is known about its answer.
    """

    family: str
    prompt: str
    is_right: Callable[[str], bool] | None


def read_tasks(options: argparse.Namespace) -> list[Task]:
    """The problems that the options name: those of a file, or of the built-in families."""
    if options.prompt_file is not None:
        for name in ("family", "count", "seed"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name}: expected only without --prompt-file, got both")
        return _from_file(options.prompt_file)
    return _built_in(options)


def stands_in(answer: str, text: str) -> bool:
    """Whether `answer` stands in `text` on its own, not inside a longer word or number."""
    answer = answer.strip()
    before = r"(?<!\w)" if re.match(r"\w", answer) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", answer) else ""
    # "5" is neither in "1.5" nor in "-5" nor in "5.2"; the point that ends a sentence does not matter.
    if re.match(r"\d", answer):
        before += r"(?<!\d[.,])(?<!-)"
    if re.search(r"\d\Z", answer):
        after += r"(?![.,]\d)"
    return re.search(before + re.escape(answer) + after, text) is not None


def _built_in(options: argparse.Namespace) -> list[Task]:
    from blockbatch.tiny import FAMILIES, check, generate_problems

    count = DEFAULT_COUNT if options.count is None else options.count
    seed = DEFAULT_SEED if options.seed is None else options.seed
    families = tuple(dict.fromkeys(options.family or FAMILIES))
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"--family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if count < 1:
        raise ValueError(f"--count: expected at least 1, got {count}")

    def judge(problem) -> Callable[[str], bool]:
        return lambda text: check(problem, text)

    return [
        Task(family, problem.prompt, judge(problem))
        for family in families
        for problem in generate_problems(family, "test", count, seed)
    ]


def _from_file(path: str) -> list[Task]:
    tasks = []
    for number, line in enumerate(read_text(path, "--prompt-file").splitlines(), 1):
        if line.strip():
            tasks.append(_from_line(line, f"--prompt-file: {path}, line {number}"))
    if not tasks:
        raise ValueError(f"--prompt-file: expected at least one problem, got none in {path}")
    return tasks


def _from_line(line: str, where: str) -> Task:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object, got {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where}: expected a JSON object with a text "prompt", got {line!r:.80}')
    answer = entry.get("answer")
    if answer is None:
        return Task("file", entry["prompt"], None)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError(f'{where}: expected "answer" to be a text or a number, got {answer!r:.80}')
    return Task("file", entry["prompt"], lambda text: stands_in(str(answer), text))
