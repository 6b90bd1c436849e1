"""Problems of one's own, from JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from blockbatch.tasks.gsm8k import final_number, same_number
from blockbatch.tasks.problem import Problem
from blockbatch.texts import check_text


def parse_problems(
    text: str, *, task: str, where: str, leave_out: Callable[[str], None] | None = None
) -> list[Problem]:
    """Problems from JSON lines: {"prompt": text, "answer": text or number, "id": text or number}.

    "answer" and "id" may be missing; the id is then the number of the line. A text is right when the answer
    stands in it on its own. An answer in the notation of GSM8K, which ends with `#### number`, is judged by
    that number.

    Args:
        text: lines of JSON.
        task: of the problems.
        where: what messages begin with.
        leave_out: what is told of a problem whose texts hold half a character, which no model can read; the
            others remain. None: it is an error.

    Raises:
        ValueError: for a line that is not such an object, an id that comes twice, or no problem at all.
    """
    problems: list[Problem] = []
    seen: set[str] = set()
    # Other separators of lines, such as U+2028, may stand in a text.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        problem = _parse_line(line, task, str(number), f"{where}, line {number}")
        try:
            _check_texts(problem, f"{where}, line {number}")
        except ValueError as error:
            if leave_out is None:
                raise
            leave_out(str(error))
            continue
        if problem.id in seen:
            raise ValueError(f"{where}, line {number}: expected an id of its own, got {problem.id!r} again")
        seen.add(problem.id)
        problems.append(problem)
    if not problems:
        raise ValueError(f"{where}: expected at least one problem, got none")
    return problems


def _parse_line(line: str, task: str, default_id: str, where: str) -> Problem:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where}: expected a JSON object with a text "prompt", got {line!r:.80}')
    problem_id = _text_or_number(entry, "id", where) or default_id
    answer = _text_or_number(entry, "answer", where)
    return Problem(task, problem_id, entry["prompt"], answer, None if answer is None else _judge_of(answer))


def _check_texts(problem: Problem, where: str) -> None:
    for name in ("prompt", "id", "answer"):
        check_text(getattr(problem, name) or "", f"{where}: {name}")


def _text_or_number(entry: dict[str, Any], name: str, where: str) -> str | None:
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError(f'{where}: expected "{name}" to be a text or a number, got {value!r:.80}')
    return str(value)


def _judge_of(answer: str) -> Callable[[str], bool]:
    if "####" in answer and final_number(answer) is not None:
        return partial(same_number, answer)
    return partial(stands_in, answer)


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
