"""The paper's settings by name, and what the arguments of lm-evaluation-harness mean; without its package."""

import importlib
import shlex
import sys

import pytest

from blockbatch.config import METHODS, DecodeConfig
from blockbatch.evaluation import presets, registration
from blockbatch.evaluation.harness_options import Wishes, decode_options, length_unit, read_batch_size
from checkpoint_files import run_python


@pytest.mark.parametrize("name, shots", [("gsm8k", 5), ("math", 4), ("humaneval", 0), ("mbpp", 3)])
def test_the_settings_of_the_paper(name, shots):
    preset = presets.get_preset(name)
    assert (preset.num_fewshot, preset.gen_length) == (shots, 256)
    config = preset.config()
    assert config == DecodeConfig(
        gen_length=256,
        block_sizes=(4, 8, 16, 32, 64, 128),
        threshold=0.9,
        merge_threshold=0.5,
        sync_threshold=8,
        refresh_interval=32,
        policy="published",
    )
    for method in METHODS:
        published = DecodeConfig.preset("paper", method=method, gen_length=256)
        assert preset.config(method) == published, "the baselines run as published"
    assert preset.config("dual_cache", eos_exit="prefix").eos_exit == "prefix"


def test_printed_commands_name_the_task_and_its_examples(capsys):
    presets.main(["gsm8k", "--model", "a b", "--method", "dual_cache"])
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["lm_eval", "--model", "blockbatch"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--model_args"] == "pretrained=a b,method=dual_cache,preset=gsm8k"
    assert (options["--tasks"], options["--num_fewshot"]) == ("gsm8k", "5")
    presets.main(["gsm8k", "--model", "Dream-org/Dream-v0-Base-7B"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    words = shlex.split(line)
    given = dict(part.split("=") for part in words[words.index("--model_args") + 1].split(","))
    assert (given["policy"], given["block_sizes"]) == ("dream_published", "4:8:16:32:64:128")
    presets.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(lines) == 4
    assert [line.startswith("HF_ALLOW_CODE_EVAL=1 ") for line in lines] == [False, False, True, True]
    assert [line.endswith("--confirm_run_unsafe_code") for line in lines] == [False, False, True, True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gsm9k"], "preset: expected one of gsm8k, math"),
        (["math", "--method", "x"], "method: expected one of"),
    ],
)
def test_unknown_presets_and_methods(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        presets.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "gen_kwargs, until, length",
    [
        ({}, (), 256),
        ({"until": "Q:", "max_gen_toks": 10, "do_sample": False, "temperature": 0.7}, ("Q:",), 10),
        ({"until": ["a", "", "b"], "temperature": 0.0, "max_tokens": 7, "max_new_tokens": 9}, ("a", "b"), 9),
        ({"until": None, "max_gen_toks": None, "top_p": 0.95}, (), 256),
    ],
)
def test_wishes(gen_kwargs, until, length):
    assert Wishes.read(gen_kwargs) == (until, length)


@pytest.mark.parametrize(
    "gen_kwargs, error, message",
    [
        ({"do_sample": True}, ValueError, "gen_kwargs: expected greedy decoding .* got do_sample=True"),
        ({"temperature": 0.2}, ValueError, "expected greedy decoding .* temperature=0.2"),
        ({"num_beams": 4}, ValueError, "gen_kwargs: expected some of until, .* got 'num_beams'"),
        ({"until": [1]}, TypeError, "until: expected texts, got"),
        ({"max_gen_toks": 0}, ValueError, "max_gen_toks: expected an integer of at least 1, got 0"),
        ({"max_gen_toks": "8"}, ValueError, "max_gen_toks: expected an integer of at least 1, got '8'"),
    ],
)
def test_bad_wishes(gen_kwargs, error, message):
    with pytest.raises(error, match=message):
        Wishes.read(gen_kwargs)


def test_model_args():
    for sizes in ("4:8", [4, 8], (4, 8)):
        assert decode_options(None, {"block_sizes": sizes}) == {"block_sizes": (4, 8)}
    assert decode_options(None, {"block_sizes": 4, "threshold": "None"}) == {
        "block_sizes": (4,),
        "threshold": None,
    }
    # One of the harness's parsers reads the word none, which is a value of this option.
    for word in (None, "none"):
        assert decode_options(None, {"eos_exit": word}) == {"eos_exit": "none"}
    options = decode_options("gsm8k", {"method": "dual_cache", "eos_exit": "prefix"})
    assert DecodeConfig(**options) == presets.get_preset("gsm8k").config("dual_cache", eos_exit="prefix")


@pytest.mark.parametrize(
    "preset, options, message",
    [
        (
            None,
            {"treshold": 0.9},
            "model_args: expected pretrained, preset, decode_preset or one of temperature, .* got 'treshold'",
        ),
        (None, {"trace": True}, "model_args: .* got 'trace'"),
        (None, {"block_sizes": "4-8"}, "block_sizes: expected integers such as 4:8:16, got '4-8'"),
        ("gsm9k", {}, "preset: expected one of"),
        ("gsm8k", {"method": "fast"}, "method: expected one of"),
    ],
)
def test_bad_model_args(preset, options, message):
    with pytest.raises(ValueError, match=message):
        decode_options(preset, options)


@pytest.mark.parametrize(
    "options, length, unit",
    [
        ({}, 256, 128),
        ({}, 300, 128),
        ({}, 20, 16),
        ({}, 3, 1),
        ({"block_sizes": (6, 4)}, 20, 12),
        ({"method": "vanilla"}, 20, 32),
        ({"method": "vanilla", "block_size": 8}, 20, 8),
        ({"method": "unknown", "block_size": 0}, 20, 1),
    ],
)
def test_lengths_are_multiples_of_every_block(options, length, unit):
    assert length_unit(options, length) == unit


def test_batch_size():
    assert read_batch_size("3") == read_batch_size(3) == 3
    for value in ("auto", 0, None):
        with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, got"):
            read_batch_size(value)


def test_registration_is_nothing_where_the_harness_does_not_run():
    """The entry point is called by every import of torch."""
    out = run_python(
        "import sys\nfrom blockbatch.evaluation import registration\nregistration.register_if_wanted()\n"
        "print(sorted({'lm_eval', 'torch', 'blockbatch.evaluation.harness'} & set(sys.modules)))"
    )
    assert out == "[]\n"


def test_a_missing_harness_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "blockbatch.evaluation.harness", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'blockbatch\[lm-eval\]'"):
        importlib.import_module("blockbatch.evaluation.harness")
    with pytest.raises(ImportError, match=r"pip install 'blockbatch\[lm-eval\]'"):
        registration.register()
    registration.register_if_wanted()
