"""Texts of several tasks: all questions, numbered, and behind them all answers in the same order.

A text of twelve problems is longer than any canvas of the full-attention model, and each of its answers is
checked, so the last ones say whether a decode still works that far.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from blockbatch.tasks.built_in import check
from blockbatch.tasks.built_in.drawn import DrawnProblem

REQUEST = "Do all of these:"


def question(number: int, prompt: str) -> str:
    """Problem `number` (from 1) as it stands in the prompt behind what is there."""
    return f"\n[{number}]\n{prompt}"


def answer_head(number: int) -> str:
    """What stands before the answer of problem `number` (from 1)."""
    return f"[{number}]\n" if number == 1 else f"\n[{number}]\n"


def join(problems: Sequence[DrawnProblem]) -> tuple[str, str]:
    """The prompt that asks for `problems` in one text, and its reference answer.

    Raises ValueError if there are none.
    """
    if not problems:
        raise ValueError("problems: expected at least one, got none")
    numbered = list(enumerate(problems, start=1))
    prompt = REQUEST + "".join(question(number, problem.prompt) for number, problem in numbered)
    return prompt, "".join(answer_head(number) + problem.answer for number, problem in numbered)


def split_answers(text: str, count: int) -> list[str]:
    """The `count` answers in a text; "" for one that is missing.

    An answer begins behind the first line `[number]` that follows the head of the one before it, and ends
    before the next head.
    """
    heads: list[tuple[int, int] | None] = []
    position = 0
    for number in range(1, count + 1):
        found = re.compile(rf"^\[{number}\]$", re.MULTILINE).search(text, position)
        heads.append((found.start(), found.end()) if found else None)
        position = found.end() if found else position
    answers = []
    for index, head in enumerate(heads):
        later = (other[0] for other in heads[index + 1 :] if other)
        answers.append(text[head[1] : next(later, len(text))].strip("\n") if head else "")
    return answers


def draw_texts(problems: Sequence[DrawnProblem], count: int, seed: int) -> list[list[DrawnProblem]]:
    """The problems in random order, `count` a text; what is left over is left out."""
    mixed = random.Random(f"texts {seed}").sample(list(problems), len(problems))
    return [mixed[begin : begin + count] for begin in range(0, len(mixed) - count + 1, count)]


def check_answers(problems: Sequence[DrawnProblem], text: str) -> list[bool]:
    """For each of a text's problems, whether its answer there solves it."""
    return [check(problem, answer) for problem, answer in zip(problems, split_answers(text, len(problems)))]
