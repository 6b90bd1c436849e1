"""Ranks that part: an error on all of them, and never a hang."""

import os
import subprocess
import sys

import pytest

import blockbatch
import rank_cases
import rank_processes
from blockbatch.cli import main
from command_runs import ROOT
from plain_models import write_dream
from test_conformance import DATA

pytestmark = pytest.mark.xdist_group("rank_failures")

# More than the 16 forwards between two comparisons.
LONG = {"method": "blockbatch", "gen_length": 64, "block_sizes": (4, 8), "refresh_interval": None}
PROMPT = [5, 1, 2]
WAIT = 60  # seconds that an answer may take on a busy machine; a hang takes forever

ranks = rank_processes.fixture(2)
# Ranks that a test may kill.
mortal = rank_processes.fixture(2, scope="function")


@pytest.mark.parametrize("at_forward", [1, 17])
def test_a_state_that_differs_is_found(ranks, at_forward):
    answers = ranks.values(rank_cases.diverge, str(DATA), at_forward, PROMPT, LONG, timeout=WAIT)
    (forwards, message), other = answers
    assert other == (forwards, message)
    assert at_forward <= forwards < at_forward + 16
    assert message.startswith("the state of the decode after forward ")
    assert message.endswith("expected the same on all ranks, rank 1 differs from rank 0")


def test_a_state_that_differs_at_the_very_end_is_found(ranks):
    last = len(ranks.same(rank_cases.steps, str(DATA), PROMPT, LONG)) - 1
    answers = ranks.values(rank_cases.diverge, str(DATA), last, PROMPT, LONG, timeout=WAIT)
    assert [forwards for forwards, _ in answers] == [last, last] and "rank 1 differs" in answers[0][1]


def test_a_rank_that_dies_ends_the_others(mortal):
    first, second = mortal.run(rank_cases.break_off, str(DATA), 3, PROMPT, LONG, "dies", timeout=WAIT)
    mortal.processes[1].join(WAIT)
    assert (second.type, mortal.processes[1].exitcode) == ("Ended", 9)
    assert (first.type, first.text) == ("RankError", "rank 1 ended")


def test_a_rank_that_fails_ends_the_others(ranks):
    first, second = ranks.run(rank_cases.break_off, str(DATA), 3, PROMPT, LONG, "fails", timeout=WAIT)
    assert (second.type, second.text) == ("MemoryError", "expected room for this test, got none")
    assert (first.type, first.text) == ("RankError", "rank 1: expected room for this test, got none")


def test_a_rank_that_waits_in_a_call_ends(mortal):
    first, second = mortal.run(rank_cases.wait_in_a_call, timeout=WAIT)
    mortal.processes[0].join(WAIT)
    assert (first.type, second.type, mortal.processes[0].exitcode) == ("Ended", "Ended", 70)


def test_a_rank_that_does_not_come_is_not_waited_for(ranks):
    for answer in ranks.run(rank_cases.keep_waiting, timeout=WAIT):
        assert answer.type == "RankError"
        assert answer.text.startswith("rank 0: expected a meeting to end within 1 s, it has not")


def test_prompts_that_differ(ranks):
    for answer in ranks.run(rank_cases.disagree, str(DATA), timeout=WAIT):
        assert answer.type == "RankError" and "prompts and settings" in answer.text


def test_calls_that_differ(ranks):
    first, second = ranks.run(rank_cases.be_elsewhere, timeout=WAIT)
    assert first.text == "place 0: expected all ranks here, rank 1 is elsewhere"
    assert second.text == "place 1: expected all ranks here, rank 0 is elsewhere"


def test_two_threads_are_refused(ranks):
    for (message,) in ranks.values(rank_cases.two_threads, timeout=WAIT):
        assert message.startswith("model: expected one thread at a time to use a model of several ranks")


def test_numbers_that_break_end_the_decode_on_all_ranks(ranks):
    options = {"method": "blockbatch", "gen_length": 16, "block_sizes": (4, 8)}
    found = ranks.same(rank_cases.poison, str(DATA), PROMPT, options, timeout=WAIT)
    assert [str(error)[:38] for error in found[::2]] == ["prompt: expected finite logits, got NaN"[:38]] * 2
    assert [tuple(shape) for shape in found[1::2]] == [(1, 3, 160)] * 2


def test_numbers_of_ranks_that_do_not_fit(ranks, tmp_path):
    write_dream(tmp_path, num_attention_heads=6, hidden_size=36, num_key_value_heads=3)
    message = "expected a number that divides num_kv_heads = 3 or is a multiple of it, got 2"
    for answer in ranks.run(rank_cases.load, str(tmp_path), timeout=WAIT):
        assert (answer.type, answer.text) == ("ValueError", f"tensor_parallel: {message}")
    for size, message in (
        (3, "expected the number of processes, 2, got 3"),
        (0, "expected a positive integer"),
    ):
        for answer in ranks.run(rank_cases.load, "tiny", tensor_parallel=size, timeout=WAIT):
            assert answer.type == "ValueError" and answer.text.startswith(f"tensor_parallel: {message}")


def test_a_process_alone_cannot_hold_a_part():
    with pytest.raises(ValueError, match="^tensor_parallel: expected 2 processes, of `torchrun "):
        blockbatch.load_model("tiny", device="cpu", tensor_parallel=2)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "blockbatch", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_the_command_by_two_processes(tmp_path, capfd):
    trace = tmp_path / "trace.json"
    arguments = ("generate", "Reverse: 3 1 4 1 5", "--device", "cpu", "--gen-length", "32")
    assert main(arguments) == 0
    expected = capfd.readouterr().out
    done = torchrun(*arguments, "--whole-rows", "--trace", str(trace))
    assert (done.returncode, done.stdout) == (0, expected)
    assert blockbatch.load_trace(trace)


def test_the_command_says_an_error_once():
    done = torchrun("generate", "-", "--device", "cpu")
    assert done.returncode != 0 and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith(("blockbatch: error", "rank "))]
    assert said == [
        "blockbatch: error: PROMPT: expected a file, which every process can read, got standard input"
    ]


def test_commands_that_are_refused(monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["eval", "--limit", "1"]) == 2
    message = "torchrun: expected one of the commands generate, compare, serve in 2 processes, got eval"
    assert capsys.readouterr().err == f"blockbatch: error: {message}\n"
