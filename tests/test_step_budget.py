"""`max_step_tokens`: which branches it leaves, and that a block step keeps within it."""

import json
import re
from itertools import accumulate

import pytest

import blockbatch
from blockbatch import METHODS, DecodeConfig
from blockbatch.cli import main
from blockbatch.evaluation import ablations
from blockbatch.evaluation.settings import parse_setting
from blockbatch.tracing import load_trace
from command_runs import ROOT, generate_arguments, write_model
from plain_models import write_dream

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def llada():
    return blockbatch.load_model(ROOT / "tests/data/conformance", device="cpu")


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dream")
    write_dream(folder, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    return blockbatch.load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "budget, left",
    [
        (None, (4, 8, 16, 32, 64, 128)),
        (252, (4, 8, 16, 32, 64, 128)),
        (251, (4, 8, 16, 32, 64)),
        (128, (4, 8, 16, 32, 64)),
        (123, (4, 8, 16, 32)),
        (12, (4, 8)),
        (11, (4,)),
        (4, (4,)),
    ],
)
def test_the_largest_sizes_are_left_out_until_the_rest_fits(budget, left):
    assert DecodeConfig(max_step_tokens=budget).block_sizes == left


@pytest.mark.parametrize("budget", range(7, 120))
def test_the_smallest_sizes_stay_and_no_larger_set_of_them_fits(budget):
    sizes = (64, 7, 16, 32)
    left = DecodeConfig(gen_length=448, block_sizes=sizes, max_step_tokens=budget).block_sizes
    assert left == tuple(sorted(sizes))[: len(left)]
    sums = list(accumulate(sorted(sizes)))
    assert sums[len(left) - 1] <= budget and all(total > budget for total in sums[len(left) :])


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"max_step_tokens": 3},
            ValueError,
            "max_step_tokens: expected at least 4, the window of the smallest of block_sizes = "
            "(4, 8, 16, 32, 64, 128), got 3",
        ),
        ({"max_step_tokens": 31, "block_sizes": (64, 32)}, ValueError, "expected at least 32, the window"),
        ({"max_step_tokens": 0}, ValueError, "max_step_tokens: expected at least 1, got 0"),
        ({"max_step_tokens": 64.0}, TypeError, "max_step_tokens: expected an integer, got 64.0"),
        ({"max_step_tokens": True}, TypeError, "max_step_tokens: expected an integer, got True"),
        *(
            ({"max_step_tokens": 64, "method": method}, ValueError, f"not an option of {method}")
            for method in METHODS
            if method != "blockbatch"
        ),
    ],
)
def test_bad_budgets(options, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        DecodeConfig(**options)
    assert str(raised.value).startswith("max_step_tokens: ")


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("commit", ["threshold", "local_leap"])
def test_windows_of_a_step_keep_within_it_and_tokens_are_those_of_the_sizes_left(request, family, commit):
    model = request.getfixturevalue(family)
    options = dict(gen_length=64, threshold=0.5, commit=commit, trace=True)
    whole = blockbatch.generate(model, PROMPT, DecodeConfig(**options))
    assert max(record["packed_tokens"] for record in whole.trace if record["kind"] == "block") > 60
    for budget, sizes in ((60, (4, 8, 16, 32)), (30, (4, 8, 16))):
        result = blockbatch.generate(model, PROMPT, DecodeConfig(max_step_tokens=budget, **options))
        steps = [record for record in result.trace if record["kind"] == "block"]
        assert 0 < max(record["packed_tokens"] for record in steps) <= budget
        expected = blockbatch.generate(model, PROMPT, DecodeConfig(block_sizes=sizes, **options))
        assert (result.canvas, result.nfe) == (expected.canvas, expected.nfe)
        assert tuple(branch.block_size for branch in result.branches) == sizes


def test_open_queries_compute_the_masks_of_the_windows_that_fit(llada):
    options = dict(gen_length=64, query_span="open", refresh_interval=None, eos_exit="none", trace=True)
    result = blockbatch.generate(llada, PROMPT, DecodeConfig(max_step_tokens=32, **options))
    for record in result.trace[1:]:
        stale = sum(map(len, record["query_stale"]))
        assert record["packed_tokens"] - stale <= sum(end - start for start, end in record["windows"]) <= 32


def test_command_line_and_trace_header_tell_it(tmp_path, capsys):
    folder, trace = write_model(tmp_path), tmp_path / "trace.json"
    arguments = generate_arguments(folder, "--max-step-tokens", "64", "--json", "--trace", str(trace))
    assert main(arguments) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    header = load_trace(trace)
    assert settings["max_step_tokens"] == header["settings"]["max_step_tokens"] == 64
    assert settings["block_sizes"] == header["block_sizes"] == [4, 8, 16, 32]
    assert main(generate_arguments(folder, "--max-step-tokens", "2")) == 2
    assert capsys.readouterr().err.startswith("blockbatch: error: max_step_tokens: expected at least 4")


def test_settings_of_an_evaluation_take_it():
    config = parse_setting("small:max_step_tokens=64", 128).config
    assert config == DecodeConfig(gen_length=128, max_step_tokens=64)
    assert parse_setting("all:max_step_tokens=none", 128).config == DecodeConfig(gen_length=128)


def test_ablation_turns_it():
    settings, default = ablations.ablation_settings("max-step-tokens", 128)
    assert default == "off"
    left = {setting.label: len(setting.config.block_sizes) for setting in settings}
    assert left == {"off": 6, "128": 5, "64": 4, "32": 3, "16": 2}
    # 4 does not divide 27, which has one block of 27 and budgets of less are of no use.
    short = [setting.label for setting in ablations.ablation_settings("max-step-tokens", 27)[0]]
    assert short == ["off", "128", "64", "32"]
