"""Problems, splits, checkers, sandbox and tokenizer of the built-in model."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockbatch import tiny
from blockbatch.sandbox import call_function
from blockbatch.tasks.built_in import KINDS, SPLITS, split_of
from blockbatch.tiny.tokenizer import EOS, MASK, load_tokenizer


@pytest.fixture(scope="module")
def drawn():
    counts = {"train": 1500, "held_out": 60, "test": 60}
    return {
        (family, split): tiny.generate_problems(family, split, counts[split], seed=3)
        for family in tiny.FAMILIES
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def by_kind(problems):
    found = {}
    for problem in problems:
        found.setdefault(problem.kind, problem)
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_kind_occurs_and_fields_are_set(drawn, family):
    problems = drawn[family, "train"]
    assert {problem.kind for problem in problems} == set(KINDS[family])
    assert all(problem.family == family for problem in problems)
    assert all(problem.prompt == problem.prompt.strip() and problem.answer for problem in problems)
    assert len({problem.structure for problem in problems}) > 700


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_splits_share_neither_structure_nor_content(drawn, family):
    for one, other in (("train", "test"), ("train", "held_out"), ("held_out", "test")):
        a, b = drawn[family, one], drawn[family, other]
        assert not {(p.kind, p.structure) for p in a} & {(p.kind, p.structure) for p in b}
        assert not {(p.kind, p.answer) for p in a} & {(p.kind, p.answer) for p in b}
    assert all(split_of(p) == "test" for p in drawn[family, "test"])


def test_a_change_of_structure_or_content_alone_can_leave_the_split(drawn):
    problem = drawn["arithmetic", "test"][0]
    assert {split_of(replace(problem, structure=str(n))) for n in range(100)} == {"test", None}
    assert {split_of(replace(problem, answer=str(n))) for n in range(100)} == {"test", None}


def test_the_same_arguments_give_the_same_problems():
    for family in tiny.FAMILIES:
        first = tiny.generate_problems(family, "test", 8, seed=5)
        assert tiny.generate_problems(family, "test", 12, seed=5)[:8] == first
        assert tiny.generate_problems(family, "test", 8, seed=6) != first
        assert len({problem.prompt for problem in first}) == 8


def test_problems_do_not_depend_on_the_python_version():
    text = json.dumps(
        [
            (p.prompt, p.answer, p.structure)
            for family in tiny.FAMILIES
            for split in SPLITS
            for p in tiny.generate_problems(family, split, 10, seed=1)
        ]
    )
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "1197dd2da96a282d812c20c2537bc1e249837a2fe12e716790afd2e57f3efee8"
    )


@pytest.mark.parametrize(
    "arguments, name",
    [
        (("poems", "test", 1, 0), "family"),
        (("code", "dev", 1, 0), "split"),
        (("code", "test", -1, 0), "count"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        tiny.generate_problems(*arguments)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_reference_answers_pass_and_broken_ones_fail(drawn, family):
    problems = drawn[family, "test"][: 20 if family == "code" else 60]
    for problem in problems:
        assert tiny.check(problem, problem.answer), problem
        assert not tiny.check(problem, ""), problem
        assert not tiny.check(problem, problem.answer[: len(problem.answer) // 2]), problem


def test_answers_of_other_problems_fail(drawn):
    rng = random.Random(0)
    for family in tiny.FAMILIES:
        problems = drawn[family, "test"][:15]
        for problem in problems:
            other = rng.choice([p for p in problems if p.answer != problem.answer])
            if family != "arithmetic" or other.payload != problem.payload:
                assert not tiny.check(problem, other.answer)


def test_arithmetic_takes_the_last_result_line(drawn):
    problem = drawn["arithmetic", "test"][0]
    result = problem.payload["result"]
    assert tiny.check(problem, f"anything\n#### {result}")
    assert tiny.check(problem, f"#### {result + 1}\n#### {result}")
    assert not tiny.check(problem, f"#### {result}\n#### {result + 1}")
    assert not tiny.check(problem, f"#### {result}0")
    assert not tiny.check(problem, f"so it is {result}")


def test_code_is_judged_by_what_it_returns(drawn):
    problem = by_kind(drawn["code", "train"])["list"]
    name = problem.payload["function"]
    body = problem.answer.split("\n", 1)[1]
    assert tiny.check(problem, f"def helper(items):\n{body}\n\n{name} = lambda rows: helper(rows)")
    assert not tiny.check(problem, f"def {name}(items):\n    return None")
    assert not tiny.check(problem, f"def other(items):\n{body}")
    assert not tiny.check(problem, f"def {name}(items)\n{body}")


def test_symbolic_answers_are_compared_by_meaning(drawn):
    kinds = by_kind(drawn["symbolic", "train"])
    records = kinds["json"].payload["records"]
    turned = [dict(reversed(record.items())) for record in records]
    assert tiny.check(kinds["json"], json.dumps(turned, indent=2))
    assert not tiny.check(kinds["json"], json.dumps([*records, {}]))
    assert not tiny.check(kinds["json"], "[" * 100_000)
    table = kinds["table"].answer
    assert tiny.check(kinds["table"], table.replace("| ", "|  ").replace("---", "-----"))
    assert not tiny.check(kinds["table"], table.replace("---", "+++"))
    assert not tiny.check(kinds["table"], table + "\n| a | b |")
    lines = kinds["collatz"].answer
    assert tiny.check(kinds["collatz"], lines.replace("=", " = "))
    assert not tiny.check(kinds["collatz"], lines + "\nn=1")
    entries = kinds["sort"].answer
    assert tiny.check(kinds["sort"], entries.replace(", ", ","))
    assert not tiny.check(kinds["sort"], ", ".join(reversed(entries.split(", "))))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_have_30_to_200_tokens(drawn, tokenizer, family):
    lengths = [len(tokenizer.encode(p.answer).ids) for split in SPLITS for p in drawn[family, split]]
    assert 30 <= min(lengths) and max(lengths) <= 200


def test_sandbox_calls_the_function_for_every_argument():
    text = "import math\ndef area(n):\n    return {'side': n, 'root': math.isqrt(n)}"
    assert call_function(text, "area", [4, 9]) == [{"side": 4, "root": 2}, {"side": 9, "root": 3}]
    assert call_function("print('noise')\ndef f(x):\n    print(x)\n    return x", "f", ["a"]) == ["a"]


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "return len([0] * 10**9)",
        "return open('file', 'w').write('x')",
        "return open('/etc/hostname').read()",
        "import os; return os.fork()",
        "import sys; return sys.modules['posix'].fork()",
        "import subprocess; return subprocess.call(['true'])",
        "import socket; socket.socket(); return 1",
        "import ctypes; return 1",
        "return (lambda f: f(f))(lambda f: f(f))",
        "raise SystemExit(0)",
        "return {1, 2}",
    ],
)
def test_sandbox_stops_what_a_function_must_not_do(body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call_function(f"def f(x):\n    {body}", "f", [1], seconds=1.0) is None
    assert list(tmp_path.iterdir()) == []


def test_sandbox_reports_broken_text_as_failure():
    assert call_function("def f(x)\n    return x", "f", [1]) is None
    assert call_function("def g(x):\n    return x", "f", [1]) is None


def test_tokenizer_specials_and_digits(tokenizer):
    size = tokenizer.get_vocab_size()
    assert 1000 <= size <= 2000
    assert tokenizer.encode(EOS + MASK).ids == [size - 2, size - 1]
    assert tokenizer.encode("4711").tokens == list("4711")
    assert not any(
        len(piece) > 1 and any(map(str.isdigit, piece))
        for piece in tokenizer.get_vocab()
        if not piece.startswith("<|")
    )


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_tokenizer_gives_back_any_text(text):
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_gives_back_problems(drawn, tokenizer):
    for problems in drawn.values():
        for problem in problems[:40]:
            for text in (problem.prompt, problem.answer):
                assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
