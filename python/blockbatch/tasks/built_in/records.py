"""Symbolic tasks whose answer can be filled in at many places at once: JSON, tables, sorting."""

from __future__ import annotations

import json
import random

from blockbatch.tasks.built_in.drawn import DrawnProblem
from blockbatch.tasks.built_in.words import CITIES, COLORS, FRUITS, JOBS, NAMES, PETS, TEAMS

FAMILY = "symbolic"

_FIELDS = {
    "name": NAMES, "city": CITIES, "color": COLORS, "pet": PETS, "job": JOBS, "fruit": FRUITS, "team": TEAMS,
    "age": range(10, 80), "score": range(10, 100), "level": range(1, 10),
}  # fmt: skip


def _records(rng: random.Random, fields: list[str], count: int) -> list[dict[str, str | int]]:
    columns = {field: rng.sample(_FIELDS[field], count) for field in fields}
    return [{field: columns[field][row] for field in fields} for row in range(count)]


def _spoken(records: list[dict[str, str | int]], form: int) -> str:
    """The records as text in one of three layouts, with the white space that precedes it."""
    if form == 0:
        return " " + "; ".join(
            ", ".join(f"{key} {value}" for key, value in record.items()) for record in records
        )
    if form == 1:
        return " " + "; ".join(
            ", ".join(f"{key} is {value}" for key, value in record.items()) for record in records
        )
    return "\n" + "\n".join(
        ", ".join(f"{key}: {value}" for key, value in record.items()) for record in records
    )


_JSON_REQUESTS = (
    "Write as JSON:{data}",
    "Turn these records into JSON:{data}",
    "Give a JSON list for:{data}",
    "Convert to a list of JSON objects:{data}",
    "Make a JSON list from:{data}",
)


def draw_json(rng: random.Random) -> DrawnProblem:
    count = rng.randint(1, 3)
    fields = rng.sample(list(_FIELDS), rng.randint(5, 6) if count == 1 else rng.randint(3, 4))
    records = _records(rng, fields, count)
    request, form = rng.randrange(len(_JSON_REQUESTS)), rng.randrange(3)
    prompt = _JSON_REQUESTS[request].format(data=_spoken(records, form))
    shape = f"{request} {form} {count} {' '.join(fields)}"
    return DrawnProblem(FAMILY, "json", prompt, json.dumps(records), shape, {"records": records})


def check_json(problem: DrawnProblem, text: str) -> bool:
    """True if `text` is JSON equal to the records (order of keys and white space do not matter)."""
    try:
        return json.dumps(json.loads(text), sort_keys=True) == json.dumps(
            problem.payload["records"], sort_keys=True
        )
    except (ValueError, RecursionError):
        return False


_TABLE_REQUESTS = (
    "Write a table with the columns {columns}. Data:{data}",
    "Make a table with columns {columns} from:{data}",
    "Put this into a table with {columns} as columns:{data}",
    "Build a table of {columns} for these records:{data}",
)


def draw_table(rng: random.Random) -> DrawnProblem:
    fields = rng.sample(list(_FIELDS), rng.randint(2, 4))
    columns = rng.sample(fields, rng.randint(2, min(3, len(fields))))
    records = _records(rng, fields, 4 if len(columns) == 2 else rng.randint(3, 4))
    request, form = rng.randrange(len(_TABLE_REQUESTS)), rng.randrange(3)
    prompt = _TABLE_REQUESTS[request].format(columns=", ".join(columns), data=_spoken(records, form))
    rows = [columns, ["---"] * len(columns), *([str(record[key]) for key in columns] for record in records)]
    answer = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    shape = f"{request} {form} {len(records)} {' '.join(fields)} / {' '.join(columns)}"
    return DrawnProblem(FAMILY, "table", prompt, answer, shape, {"rows": [rows[0], *rows[2:]]})


def check_table(problem: DrawnProblem, text: str) -> bool:
    """True if `text` is a markdown table with a rule below its head and the expected cells."""
    lines = [line.strip() for line in text.strip().split("\n")]
    if len(lines) < 2 or any(len(line) < 2 or line[0] != "|" or line[-1] != "|" for line in lines):
        return False
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    ruled = all(len(cell) >= 3 and not cell.strip("-") for cell in rows[1]) and len(rows[1]) == len(rows[0])
    return ruled and [rows[0], *rows[2:]] == problem.payload["rows"]


_SORT_REQUESTS = (
    ("Sort from low to high:{data}", "Sort from high to low:{data}"),
    ("Sort in ascending order:{data}", "Sort in descending order:{data}"),
    ("Put the smallest first:{data}", "Put the largest first:{data}"),
    ("Order these by number, lowest first:{data}", "Order these by number, highest first:{data}"),
)


def draw_sort(rng: random.Random) -> DrawnProblem:
    request, descending = rng.randrange(len(_SORT_REQUESTS)), rng.randrange(2)
    named = rng.random() < 0.5
    count = rng.randint(7, 8) if named else rng.randint(8, 10)
    numbers = rng.sample(range(10, 100), count)
    names = rng.sample(NAMES, count)
    entries = [f"{name} {number}" if named else str(number) for name, number in zip(names, numbers)]
    order = sorted(range(count), key=numbers.__getitem__, reverse=bool(descending))
    prompt = _SORT_REQUESTS[request][descending].format(data=" " + ", ".join(entries))
    answer = ", ".join(entries[index] for index in order)
    shape = f"{request} {descending} {named} {' '.join(map(str, order))}"
    return DrawnProblem(
        FAMILY, "sort", prompt, answer, shape, {"entries": [entries[index] for index in order]}
    )


def check_sort(problem: DrawnProblem, text: str) -> bool:
    """True if the entries between the commas are the expected ones in the expected order."""
    return [" ".join(entry.split()) for entry in text.split(",")] == problem.payload["entries"]
