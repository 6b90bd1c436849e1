"""Lengths that the usual block sizes do not divide: a size that nobody gave is never the reason to refuse."""

import json

import pytest

import blockbatch
from blockbatch import METHODS, DecodeConfig
from blockbatch.cli import main
from blockbatch.evaluation.harness_options import decode_options
from blockbatch.evaluation.presets import METHOD_SETTINGS, PRESETS
from blockbatch.evaluation.settings import parse_setting, preset_settings, table_settings
from blockbatch.methods import PRESET_TABLE

BASELINES = METHODS[1:]


@pytest.mark.parametrize(
    "gen_length, size", [(100, 4), (8, 8), (16, 16), (24, 8), (96, 32), (256, 32), (7, 7), (1, 1), (101, 101)]
)
def test_the_largest_usual_size_that_divides(gen_length, size):
    for method in BASELINES:
        assert DecodeConfig(method, gen_length=gen_length).block_size == size
    with pytest.raises(ValueError, match=f"block_size: expected divisors of gen_length = {gen_length}, got"):
        DecodeConfig("vanilla", gen_length=gen_length, block_size=gen_length + 1)


def test_steps_go_with_the_size_that_was_chosen():
    assert DecodeConfig("vanilla", gen_length=100, steps=50).steps == 50
    with pytest.raises(ValueError, match=r"steps: expected a multiple of the 25 blocks, .*block_size is 4"):
        DecodeConfig("vanilla", gen_length=100, steps=10)


@pytest.mark.parametrize("gen_length", [1, 2, 3, 6, 100, 101, 128])
@pytest.mark.parametrize("name", PRESET_TABLE)
def test_presets_fit_any_length(name, gen_length):
    config = DecodeConfig.preset(name, gen_length=gen_length)
    for draft in config.drafts or ():
        assert draft < config.block_size
    (setting,) = preset_settings([name], gen_length)
    assert setting.config.drafts == config.drafts
    assert parse_setting(f"own:preset={name}", gen_length).config.drafts == config.drafts
    if gen_length >= 100:
        assert (config.drafts or ()) == tuple(PRESET_TABLE[name].options.get("drafts", ()))


def test_drafts_that_were_given_are_refused_where_they_do_not_fit():
    with pytest.raises(ValueError, match="drafts: expected numbers below block_size = 4"):
        DecodeConfig.preset("careful", gen_length=100, drafts=(1, 4))
    assert DecodeConfig.preset("careful", gen_length=100, block_size=2).drafts == (1,)


@pytest.mark.parametrize("gen_length", [36, 100, 101])
def test_published_settings_of_another_length(gen_length):
    rows = table_settings(METHODS, gen_length, options=METHOD_SETTINGS)
    for setting in rows:
        sizes = setting.config.block_sizes or (setting.config.block_size,)
        assert not any(gen_length % size for size in sizes)
    for preset in PRESETS.values():
        for method in METHODS:
            config = preset.config(method, gen_length=gen_length)
            options = decode_options(preset.name, {"method": method, "gen_length": gen_length})
            assert DecodeConfig(**options) == config and config.gen_length == gen_length
    assert preset.config("dual_cache").block_size == 32
    assert preset.config().block_sizes == (4, 8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.mark.parametrize("method", BASELINES)
def test_decodes_of_a_hundred_tokens(tiny, method):
    result = blockbatch.generate(tiny, "a = 3\n", DecodeConfig(method, gen_length=100))
    given = blockbatch.generate(tiny, "a = 3\n", DecodeConfig(method, gen_length=100, block_size=4))
    assert len(result.canvas) == 100 and result.block_size == 4
    assert (result.canvas, result.nfe) == (given.canvas, given.nfe)


def test_compare_and_eval_of_a_length_that_32_does_not_divide(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a = 3\n", "answer": "3"}))
    device = ["--device", "cpu", "--gen-length", "20"]
    assert main(["compare", "--prompt-file", "own.jsonl", *device, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["method"] for row in rows} == set(METHODS)
    assert main(["eval", "--tasks", "own.jsonl", *device, "--preset", "gsm8k", "--out", "out"]) == 0
    assert (tmp_path / "out" / "report.md").exists()
