"""Small Python functions from a description; an answer is right when it passes the problem's tests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from blockbatch.sandbox import call_function
from blockbatch.tasks.built_in.drawn import DrawnProblem, stable_hash
from blockbatch.tasks.built_in.words import NOUNS, VERBS

FAMILY = "code"
KINDS = ("list", "text", "rules", "loop")

_LEADS = (
    "Write a Python function {call} that ",
    "Define a function {call} that ",
    "Implement {call} in Python. It ",
    "Create a Python function {call}. It ",
)

# name: (smallest k, largest k, phrases, code line); k is the number that the operation uses, if any
_LIST_STEPS = {
    "even": (
        0,
        0,
        ("keeps the even numbers", "removes the odd numbers", "selects only even numbers"),
        "items = [x for x in items if x % 2 == 0]",
    ),
    "odd": (
        0,
        0,
        ("keeps the odd numbers", "removes the even numbers", "selects only odd numbers"),
        "items = [x for x in items if x % 2 == 1]",
    ),
    "above": (
        0,
        20,
        ("keeps numbers greater than {k}", "keeps values above {k}", "selects numbers over {k}"),
        "items = [x for x in items if x > {k}]",
    ),
    "below": (
        0,
        20,
        ("keeps numbers less than {k}", "keeps values below {k}", "selects numbers under {k}"),
        "items = [x for x in items if x < {k}]",
    ),
    "multiples": (
        3,
        9,
        ("keeps multiples of {k}", "keeps numbers divisible by {k}", "selects multiples of {k}"),
        "items = [x for x in items if x % {k} == 0]",
    ),
    "add": (
        1,
        20,
        ("adds {k} to each number", "raises every number by {k}", "adds {k} to all values"),
        "items = [x + {k} for x in items]",
    ),
    "subtract": (
        1,
        20,
        ("subtracts {k} from each number", "lowers every number by {k}", "subtracts {k} from all values"),
        "items = [x - {k} for x in items]",
    ),
    "multiply": (
        2,
        9,
        ("multiplies each number by {k}", "scales every number by {k}", "multiplies all values by {k}"),
        "items = [x * {k} for x in items]",
    ),
    "square": (
        0,
        0,
        ("squares each number", "replaces every number by its square", "squares all values"),
        "items = [x * x for x in items]",
    ),
    "sort": (
        0,
        0,
        ("sorts the list", "sorts from low to high", "orders the values"),
        "items = sorted(items)",
    ),
    "descend": (
        0,
        0,
        ("sorts in descending order", "sorts from high to low", "puts large values first"),
        "items = sorted(items, reverse=True)",
    ),
    "reverse": (
        0,
        0,
        ("reverses the list", "turns the list around", "puts the list in reverse order"),
        "items = items[::-1]",
    ),
    "unique": (
        0,
        0,
        ("sorts the distinct values", "takes the sorted set of values", "removes duplicates by sorting"),
        "items = sorted(set(items))",
    ),
    "first": (
        1,
        9,
        ("takes the first {k} items", "keeps only the first {k}", "cuts the list to {k} items"),
        "items = items[:{k}]",
    ),
    "skip": (
        1,
        9,
        ("skips the first {k} items", "drops the first {k}", "removes {k} items from the start"),
        "items = items[{k}:]",
    ),
}
_LIST_RETURNS = {
    "list": (("the list", "the items", "the new list"), "return items"),
    "sum": (("the sum", "the total of the numbers", "their sum"), "return sum(items)"),
    "count": (("the length", "how many are left", "the number of items"), "return len(items)"),
    "largest": (("the largest or 0 if empty", "the maximum with default 0"), "return max(items, default=0)"),
    "smallest": (
        ("the smallest or 0 if empty", "the minimum with default 0"),
        "return min(items, default=0)",
    ),
}
_TEXT_STEPS = {
    "upper": (
        ("makes it upper case", "changes it to capital letters", "turns it to upper case"),
        "text = text.upper()",
    ),
    "lower": (
        ("makes it lower case", "changes it to small letters", "turns it to lower case"),
        "text = text.lower()",
    ),
    "strip": (("strips spaces at both ends", "removes outer spaces"), "text = text.strip()"),
    "reverse": (
        ("reverses the text", "turns the text around", "puts it in reverse order"),
        "text = text[::-1]",
    ),
    "replace": (
        ("replaces every {a} with {b}", "changes each {a} to {b}", "swaps every {a} for {b}"),
        'text = text.replace("{a}", "{b}")',
    ),
    "delete": (
        ("removes every {a}", "deletes each {a}", "drops all letters {a}"),
        'text = text.replace("{a}", "")',
    ),
    "first": (
        ("takes the first {k} letters", "keeps only the first {k}", "cuts it to {k} letters"),
        "text = text[:{k}]",
    ),
    "skip": (
        ("skips the first {k} letters", "drops the first {k}", "removes {k} letters from the start"),
        "text = text[{k}:]",
    ),
    "repeat": (("repeats it {k} times", "makes {k} copies of it"), "text = text * {k}"),
    "suffix": (
        ("adds {a} at the end", "ends it with the letter {a}", "puts {a} at the end"),
        'text = text + "{a}"',
    ),
    "prefix": (
        ("adds {a} at the start", "starts it with the letter {a}", "puts {a} at the start"),
        'text = "{a}" + text',
    ),
}
_TEXT_RETURNS = {
    "text": (("the text", "the new text", "the string"), "return text"),
    "length": (("its length", "how long it is", "the number of letters"), "return len(text)"),
    "count": (
        ("how many {c} it has", "the count of {c}", "how often {c} occurs"),
        'return text.count("{c}")',
    ),
    "words": (("the list of words", "its words as a list"), "return text.split()"),
    "ends": (("whether it ends with {c}", "if the last letter is {c}"), 'return text.endswith("{c}")'),
}
_LETTERS = "abcdeilmnorstu"
_CONDITIONS = {
    "even": (0, 0, ("n is even", "n is an even number"), "n % 2 == 0"),
    "odd": (0, 0, ("n is odd", "n is an odd number"), "n % 2 == 1"),
    "above": (0, 30, ("n is greater than {k}", "n is above {k}", "n is over {k}"), "n > {k}"),
    "below": (0, 30, ("n is less than {k}", "n is below {k}", "n is under {k}"), "n < {k}"),
    "multiple": (3, 9, ("n is divisible by {k}", "n is a multiple of {k}"), "n % {k} == 0"),
    "equal": (0, 30, ("n is equal to {k}", "n is exactly {k}"), "n == {k}"),
}
_RESULTS = {
    "plus": (1, 20, ("n plus {k}", "{k} more than n"), "n + {k}"),
    "minus": (1, 20, ("n minus {k}", "{k} less than n"), "n - {k}"),
    "times": (2, 9, ("n times {k}", "the product of n and {k}"), "n * {k}"),
    "square": (0, 0, ("n squared", "the square of n"), "n * n"),
    "constant": (0, 30, ("the number {k}", "just {k}"), "{k}"),
    "quotient": (2, 9, ("n divided by {k} rounded down", "the quotient of n and {k}"), "n // {k}"),
    "remainder": (2, 9, ("n modulo {k}", "the remainder of n by {k}"), "n % {k}"),
    "same": (0, 0, ("n", "n itself"), "n"),
    "negative": (0, 0, ("the negative of n", "minus n"), "-n"),
}
_TERMS = {
    "itself": (0, 0, ("i", "the value of i"), "i"),
    "square": (0, 0, ("i squared", "the square of i"), "i * i"),
    "times": (2, 9, ("i times {k}", "{k} times i"), "i * {k}"),
    "plus": (1, 20, ("i plus {k}", "{k} more than i"), "i + {k}"),
    "remainder": (2, 9, ("i modulo {k}", "the remainder of i by {k}"), "i % {k}"),
}
_FILTERS = {
    "all": (0, 0, ("every i", "each i"), ""),
    "even": (0, 0, ("every even i", "each even i"), "i % 2 == 0"),
    "odd": (0, 0, ("every odd i", "each odd i"), "i % 2 == 1"),
    "multiple": (3, 9, ("every i divisible by {k}", "each multiple i of {k}"), "i % {k} == 0"),
    "other": (3, 9, ("every i not divisible by {k}", "each i that is no multiple of {k}"), "i % {k} != 0"),
    "above": (2, 20, ("every i above {k}", "each i greater than {k}"), "i > {k}"),
}
_RANGES = {
    "one": (("from 1 to n", "between 1 and n"), "range(1, n + 1)"),
    "zero": (("from 0 to n - 1", "below n"), "range(n)"),
    "double": (("from 1 to 2 * n", "between 1 and 2 * n"), "range(1, 2 * n + 1)"),
}
_ENDS = {
    "plain": (0, 0, ("the total", "that total"), "total"),
    "plus": (1, 20, ("the total plus {k}", "the total increased by {k}"), "total + {k}"),
    "times": (2, 9, ("the total times {k}", "the total multiplied by {k}"), "total * {k}"),
    "remainder": (2, 9, ("the total modulo {k}", "the remainder of the total by {k}"), "total % {k}"),
}


def _pick(
    rng: random.Random, table: dict[str, Any], values: dict[str, Any] | None = None
) -> tuple[str, str, str]:
    """A random entry of `table`: structure name, phrase and code, with k (or `values`) filled in."""
    name = rng.choice(list(table))
    *bounds, phrases, line = table[name]
    if values is None:
        values = {"k": rng.randint(*bounds) if bounds else 0}
    form = rng.randrange(len(phrases))
    return f"{name}{form}", phrases[form].format(**values), line.format(**values)


def _assemble(
    rng: random.Random, kind: str, argument: str, parts: Sequence[str], request: str, body: str
) -> DrawnProblem:
    function = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    lead = rng.randrange(len(_LEADS))
    prompt = _LEADS[lead].format(call=f"{function}({argument})") + request
    answer = f"def {function}({argument}):\n{body}"
    return DrawnProblem(FAMILY, kind, prompt, answer, f"{lead} {' '.join(parts)}", {"function": function})


def _list(rng: random.Random) -> DrawnProblem:
    steps = [_pick(rng, _LIST_STEPS) for _ in range(rng.randint(3, 4))]
    end = _pick(rng, _LIST_RETURNS)
    request = f"{', then '.join(phrase for _, phrase, _ in steps)} and returns {end[1]}."
    body = "\n".join(f"    {line}" for _, _, line in [*steps, end])
    return _assemble(rng, "list", "items", [name for name, _, _ in [*steps, end]], request, body)


def _text(rng: random.Random) -> DrawnProblem:
    steps = []
    for _ in range(rng.randint(3, 4)):
        a, b = rng.sample(_LETTERS, 2)
        steps.append(_pick(rng, _TEXT_STEPS, {"a": a, "b": b, "k": rng.randint(2, 9)}))
    end = _pick(rng, _TEXT_RETURNS, {"c": rng.choice(_LETTERS)})
    request = f"{', then '.join(phrase for _, phrase, _ in steps)} and returns {end[1]}."
    body = "\n".join(f"    {line}" for _, _, line in [*steps, end])
    return _assemble(rng, "text", "text", [name for name, _, _ in [*steps, end]], request, body)


def _rules(rng: random.Random) -> DrawnProblem:
    names, phrases, lines = [], [], []
    for _ in range(rng.randint(2, 3)):
        condition, result = _pick(rng, _CONDITIONS), _pick(rng, _RESULTS)
        names += [condition[0], result[0]]
        phrases.append(f"{result[1]} if {condition[1]}")
        lines.append(f"    if {condition[2]}:\n        return {result[2]}")
    end = _pick(rng, _RESULTS)
    request = f"returns {', '.join(phrases)} and {end[1]} otherwise."
    body = "\n".join([*lines, f"    return {end[2]}"])
    return _assemble(rng, "rules", "n", [*names, end[0]], request, body)


def _loop(rng: random.Random) -> DrawnProblem:
    term, test, span, end = (_pick(rng, table) for table in (_TERMS, _FILTERS, _RANGES, _ENDS))
    if not test[2] and end[2] == "total":
        return _loop(rng)  # too short an answer
    request = f"adds up {term[1]} for {test[1]} {span[1]} and returns {end[1]}."
    inner = f"        total += {term[2]}"
    if test[2]:
        inner = f"        if {test[2]}:\n            total += {term[2]}"
    body = f"    total = 0\n    for i in {span[2]}:\n{inner}\n    return {end[2]}"
    return _assemble(rng, "loop", "n", [part[0] for part in (term, test, span, end)], request, body)


_DRAW = {"list": _list, "text": _text, "rules": _rules, "loop": _loop}


def draw(rng: random.Random) -> DrawnProblem:
    """One random problem of a random kind; `finish` adds its tests."""
    return _DRAW[rng.choice(KINDS)](rng)


def _arguments(kind: str, rng: random.Random) -> list[Any]:
    if kind == "list":
        return [[rng.randint(-10, 40) for _ in range(size)] for size in (0, 1, 5, 9, 14, 20)]
    if kind == "text":
        letters = _LETTERS + _LETTERS.upper() + "   "
        return ["".join(rng.choice(letters) for _ in range(size)) for size in (0, 1, 6, 12, 20, 30)]
    if kind == "rules":
        return [-7, *range(0, 45)]
    return [0, 1, 2, 5, 12, 23]


def finish(problem: DrawnProblem) -> DrawnProblem:
    """Add the tests: arguments drawn by the prompt's hash, and what the reference answer returns for them."""
    arguments = _arguments(problem.kind, random.Random(stable_hash(problem.prompt)))
    namespace: dict[str, Any] = {}
    exec(problem.answer, namespace)  # text made by this module alone, never a model's output
    function = namespace[problem.payload["function"]]
    problem.payload["tests"] = [[argument, function(argument)] for argument in arguments]
    return problem


def check(problem: DrawnProblem, text: str) -> bool:
    """True if the function in `text` gives the expected value, of the same type, for every test."""
    arguments = [argument for argument, _ in problem.payload["tests"]]
    returned = call_function(text, problem.payload["function"], arguments)
    if returned is None:
        return False
    expected = [value for _, value in problem.payload["tests"]]
    return json.dumps(returned) == json.dumps(expected)  # as text, so that 1, 1.0 and True stay apart
