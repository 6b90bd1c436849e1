"""Problems to decode and the judges of their answers: built-in families, public test sets, JSONL files."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

FAMILIES = ("arithmetic", "code", "symbolic")
TASKS = (*FAMILIES, "humaneval", "gsm8k", "gsm8k-5shot")
DEFAULT_COUNT = 100


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        task: the group that it is counted in: a name of `TASKS`, or a file's name without its ending.
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
        name: one of `TASKS`, or the path of a JSONL file (see `parse_problems`).
        split: "test", or "train" and "held_out" of the built-in families.
        limit: how many problems; by default 100 of a built-in family and all of anything else.
        seed: draws the problems of the built-in families; the others come in their own order.
        run_code: the permission to run what the model writes, in a sandbox. Without it the problems of
            "code" and "humaneval" cannot be judged.
        accept_weaker_sandbox: run it even where this system cannot cut it off (see `sandbox.isolation`).

    Raises ValueError for an unknown task, split or limit, for a file that is not as expected and for a task
    whose package is not installed (the message says which); OSError for a file that cannot be read and for
    a sandbox that cannot be had.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: expected a number of problems, at least 1, got {limit!r}")
    if name not in TASKS and not Path(name).suffix:
        raise ValueError(f"task: expected {', '.join(TASKS)} or the path of a JSONL file, got {name!r}")
    if name not in FAMILIES and split != "test":
        raise ValueError(f'split: expected "test", the only one that {name} has, got {split!r}')
    if run_code and name in ("code", "humaneval"):
        from blockbatch.evaluation import sandbox

        sandbox.require(accept_weaker=accept_weaker_sandbox)
    if name in FAMILIES:
        count = DEFAULT_COUNT if limit is None else limit
        return built_in_problems(name, split=split, count=count, seed=seed, run_code=run_code)
    if name == "humaneval":
        from blockbatch.evaluation.humaneval import humaneval

        return humaneval(run_code=run_code, accept_weaker_sandbox=accept_weaker_sandbox)[:limit]
    if name in TASKS:
        from blockbatch.evaluation.gsm8k import gsm8k

        return gsm8k(shots=5 if name == "gsm8k-5shot" else 0)[:limit]
    try:
        text = Path(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"task: expected UTF-8 text, got {name}: {error}") from None
    return parse_problems(text, task=Path(name).stem, where=f"task: {name}")[:limit]


def built_in_problems(family: str, *, split: str, count: int, seed: int, run_code: bool) -> list[Problem]:
    """`count` problems of a family of the built-in model; see `tiny.generate_problems`."""
    from blockbatch import tiny

    # `check` is looked up at every call: it is part of the package's interface and may be replaced there.
    return [
        Problem(
            family,
            f"{split}/{seed}/{index}",
            drawn.prompt,
            drawn.answer,
            partial(_check_built_in, drawn) if run_code or family != "code" else None,
        )
        for index, drawn in enumerate(tiny.generate_problems(family, split, count, seed))
    ]


def _check_built_in(problem: Any, text: str) -> bool:
    from blockbatch import tiny

    return tiny.check(problem, text)


def parse_problems(text: str, *, task: str, where: str) -> list[Problem]:
    """Problems from JSON lines: {"prompt": text, "answer": text or number, "id": text or number}.

    "answer" and "id" may be missing; the id is then the number of the line. A text is right when the answer
    stands in it on its own. An answer in the notation of GSM8K, which ends with `#### number`, is judged by
    that number. Raises ValueError, which begins with `where`, for a line that is not such an object, an id
    that comes twice, or no problem at all.
    """
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        problem = _parse_line(line, task, str(number), f"{where}, line {number}")
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


def _text_or_number(entry: dict[str, Any], name: str, where: str) -> str | None:
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError(f'{where}: expected "{name}" to be a text or a number, got {value!r:.80}')
    return str(value)


def _judge_of(answer: str) -> Callable[[str], bool]:
    from blockbatch.evaluation.gsm8k import final_number, same_number

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


def installed_file(package: str, path: str, *, task: str) -> bytes:
    """A data file of an installed package, without running any of its code.

    Raises ValueError, which says what to install for `task`, if it is not there.
    """
    spec = importlib.util.find_spec(package)  # of a top-level name: it is looked up, not imported
    for folder in spec.submodule_search_locations or () if spec else ():
        file = Path(folder) / path
        if file.is_file():
            return file.read_bytes()
    raise ValueError(
        f"task: {task} needs {path} of the package {package.replace('_', '-')}, which is not installed: "
        f"pip install 'blockbatch[{task}]'"
    )
