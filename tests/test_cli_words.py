"""What `blockbatch compare` and `generate` say around their results: plan, verdict, why one is empty."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import blockbatch
from blockbatch.cli import main, words
from blockbatch.cli.table import Row

# The built-in model ends its text at once.
UNKNOWN = "Write a function that sums a list."
KNOWN = "Divide with remainder until zero: 51 and 16."


def result(text, tokens=(1,), stop_reason="eos", seconds=1.0, nfe=4):
    return SimpleNamespace(
        text=text,
        tokens=list(tokens),
        stop_reason=stop_reason,
        seconds=seconds,
        nfe=SimpleNamespace(total=nfe),
    )


def row(label, right, seconds, nfe):
    config = blockbatch.DecodeConfig()
    return Row(label, config, [result("x", seconds=seconds, nfe=nfe)] * len(right), list(right))


def test_compare_tells_before_and_after(capsys):
    arguments = [
        "--family",
        "symbolic",
        "--count",
        "1",
        "--gen-length",
        "32",
        "--methods",
        "vanilla,blockbatch",
    ]
    assert main(["compare", "--model", "tiny", "--device", "cpu", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny on cpu in float32, 1 problems (1 symbolic)"
    assert lines[1].startswith("every problem by 3 methods and settings, 3 decodes: about ")
    assert any(line.startswith("Its answers take ") for line in lines)
    assert lines[-1].startswith("Try next, one answer while it denoises: ")
    assert lines[-1].endswith(" --preset fast --gen-length 32")


def test_the_command_that_it_names_prints_an_answer(capsys):
    model = blockbatch.load_model("tiny", device="cpu")
    options = SimpleNamespace(model="tiny", adapter=None, chat=False, bos=False, gen_length=128)
    told = words.next_command(model, [SimpleNamespace(prompt=KNOWN)], options)
    command = told.partition("generate ")[2]
    assert command == f"'{KNOWN}' --preset fast --gen-length 128"
    assert main(["generate", KNOWN, "--preset", "fast", "--gen-length", "128"]) == 0
    assert "gcd=1" in capsys.readouterr().out


def test_an_empty_answer_says_why():
    command = [sys.executable, "-m", "blockbatch", "generate", UNKNOWN, "--gen-length", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "\n")
    assert done.stderr.startswith(
        "blockbatch: the answer is empty: the model ends its text with the first token"
    )


@pytest.mark.parametrize(
    "given, expected",
    [
        (result("text"), None),
        (result(None), None),
        (result(" \n", (5, 6)), "the answer shows nothing: its 2 tokens are spaces, or special ones"),
        (result("", (), "stop"), "the answer is empty: it begins with a stop sequence"),
        (result("", ()), "the answer is empty: the model ends its text with the first token"),
    ],
)
def test_why_empty(given, expected):
    assert words.why_empty(SimpleNamespace(name="a folder"), given) == expected


def test_the_verdict_speaks_of_what_was_run():
    vanilla, fast = row("vanilla", [True, False], 10.0, 128), row("fast", [True, True], 0.5, 4)
    assert words.verdict([vanilla, fast]).splitlines() == [
        "fast has 2 of 2 right, vanilla 1.",
        "Its answers take 4.0 forwards in place of 128.0, and are there 20 times as fast.",
    ]
    assert words.verdict([fast]) is None and words.verdict([vanilla]) is None
    unjudged = [row("vanilla", [None], 1.0, 8), row("blockbatch", [None], 1.0, 4)]
    assert words.verdict(unjudged).startswith("Its answers take 4.0 forwards in place of 8.0")


def test_progress_says_how_much_is_left():
    assert words.progress(0, 66, "vanilla", time.monotonic()) == f"[{'':20}] 0 of 66 decodes: vanilla"
    told = words.progress(33, 66, "fast", time.monotonic() - 60)
    assert told == f"[{'#' * 10:20}] 33 of 66 decodes, about 60 seconds left: fast"


@pytest.mark.parametrize(
    "seconds, told", [(3, "some seconds"), (44, "40 seconds"), (100, "2 minutes"), (400, "7 minutes")]
)
def test_durations_are_round(seconds, told):
    assert words.duration(seconds) == told
