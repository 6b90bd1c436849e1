"""What `blockbatch eval` says first: five lines about a run whose numbers are known."""

import pytest

from blockbatch.cli import main
from blockbatch.evaluation.records import Run
from blockbatch.evaluation.report import build_report
from blockbatch.evaluation.verdict import verdict
from test_evaluation_report import HEADER, many

EVERY = range(40)


def lines_of(records):
    lines = verdict(build_report(Run(HEADER, records)))
    assert len(lines) == 5 and all("\n" not in line for line in lines)
    return lines


def test_verdict_of_a_known_run():
    records = many(EVERY[:10], "vanilla", lambda n: 2, 0.1)  # of few problems: first in nothing
    records += many(EVERY, "vanilla +eos", lambda n: 64, 4.0)
    records += many(EVERY, "dual_cache +eos", lambda n: 15, 1.5, lambda n: n > 3)
    records += many(EVERY, "blockbatch", lambda n: 10 + n % 2, 1.6, lambda n: n > 12)
    problems, right, forwards, time, compared = lines_of(records)
    assert problems.endswith("40 problems (40 t)")
    assert right == "most right answers: vanilla +eos: 100.0% [91.2, 100.0]"
    assert forwards == "fewest forwards:    blockbatch: 10.50 an answer"
    assert time == "least time:         dual_cache +eos: 1.500 s an answer"
    assert compared == (
        "blockbatch against dual_cache +eos: fewer right answers (-22.5 points, p = 0.004); forwards -30.0%; "
        "time +6.7%"
    )


def test_differences_that_are_none():
    records = many(EVERY, "dual_cache +eos", lambda n: 5 + n % 3, 1.0)
    records += many(EVERY, "blockbatch", lambda n: 5 + (n + 1) % 3, 1.0, lambda n: n > 0)
    *_, time, compared = lines_of(records)
    assert time == "least time:         dual_cache +eos, blockbatch: 1.000 s an answer"
    assert "no difference in right answers shown (-2.5 points, p = 1.00)" in compared
    assert compared.endswith("(no difference shown); time +0.0% (no difference shown)")


@pytest.mark.parametrize(
    "names, named", [("ab", "a, b: "), ("abc", "a, b, c: "), ("abcde", "a, b, c and 2 more: ")]
)
def test_settings_that_share_the_first_place(names, named):
    records = [one for name in names for one in many(EVERY, name, lambda n: 5, 1.0)]
    assert lines_of(records)[1].startswith(f"most right answers: {named}100.0%")


def test_one_setting_and_answers_that_nobody_judged():
    lines = lines_of(many(EVERY, "own", lambda n: 5, 1.0, lambda n: None))
    assert lines[1] == "most right answers: none was judged"
    assert lines[4] == "nothing to compare: one setting alone"
    some = many(EVERY, "own", lambda n: 5, 1.0, lambda n: None if n < 30 else True)
    assert lines_of(some)[1].endswith("own: 100.0% [72.2, 100.0] of the 10 answers that were judged")
    both = [one for name in ("a", "b") for one in many(EVERY, name, lambda n: 5, 1.0, lambda n: None)]
    assert lines_of(both)[4].startswith("b against a: answers not judged; forwards +0.0%")


def test_the_command_says_it_first(tmp_path, capsys):
    options = ["--tasks", "symbolic", "--methods", "dual_cache,blockbatch", "--limit", "2"]
    options += ["--gen-length", "32", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["eval", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "tiny: 2 problems (2 symbolic)"
    assert printed[4].startswith("blockbatch against dual_cache +eos: ") and printed[5] == ""
    assert printed[6].startswith("| setting ")
    written = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert [line.lstrip("# -") for line in (written[0], *written[2:6])] == [
        " ".join(line.split()) for line in printed[:5]
    ]
