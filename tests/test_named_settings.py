"""Named settings of a decode: the table, every place that takes their names, and what is said of others."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

import blockbatch
from blockbatch import models
from blockbatch.cli import main
from blockbatch.config import DecodeConfig
from blockbatch.evaluation.harness_options import decode_options
from blockbatch.evaluation.presets import PRESETS, get_preset
from blockbatch.evaluation.records import read_run
from blockbatch.evaluation.settings import TABLE_PRESETS, parse_setting, preset_settings
from blockbatch.methods import METHODS, PRESET_TABLE
from blockbatch.tiny import generate_problems

NAMES = ", ".join(PRESET_TABLE)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The built-in model on the CPU, loaded once for a test."""
    model = blockbatch.load_model("tiny", device="cpu")
    monkeypatch.setattr(models, "load_model", lambda *arguments, **options: model)
    return model


def test_the_table_is_whole():
    assert list(PRESET_TABLE)[:2] == ["paper", "fast"] and TABLE_PRESETS[-1] == list(PRESET_TABLE)[-1]
    assert not set(PRESET_TABLE) & set(PRESETS), "one option takes both"
    for name, row in PRESET_TABLE.items():
        config = DecodeConfig.preset(name)
        assert {option: getattr(config, option) for option in row.options} == dict(row.options)
        # Whoever reads the sentence knows whose rule it is; a table has room for it on one line.
        assert ("ours" in row.summary, "published" in row.summary) == (not row.published, row.published)
        assert len(row.summary) <= 70 and "\n" not in row.summary


def test_paper_is_the_rule_of_the_models_family_and_else_what_the_class_does(tiny):
    paper, dream = DecodeConfig.preset("paper"), SimpleNamespace(family="dream", prediction_offset=1)
    assert paper.for_model(tiny.spec) == DecodeConfig()
    assert paper.for_model(dream) == DecodeConfig(policy="dream_published")
    assert paper.for_model(dream).eos_exit == "none" and DecodeConfig().for_model(dream) == DecodeConfig()
    kept = DecodeConfig.preset("paper", eos_exit="prefix", gen_length=64).for_model(dream)
    assert kept == DecodeConfig(gen_length=64, eos_exit="prefix", policy="dream_published")
    for method in METHODS[1:]:
        assert DecodeConfig.preset("paper", method=method) == DecodeConfig(method=method)


def test_fast_and_what_changes_it():
    fast = DecodeConfig.preset("fast")
    assert fast.eos_exit == "prefix"
    assert fast.block_sizes == (4, 8, 16, 32, 64), "of the default sizes those whose windows fit into a step"
    changed = DecodeConfig.preset("fast", gen_length=128, eos_exit="none", threshold=0.8)
    assert changed == dataclasses.replace(fast, gen_length=128, eos_exit="none", threshold=0.8)


@pytest.mark.parametrize("gen_length, sizes", [(32, (4, 8, 16, 32)), (100, (4,)), (250, (125,)), (251, (1,))])
def test_fast_fits_any_length(gen_length, sizes):
    assert DecodeConfig.preset("fast", gen_length=gen_length).block_sizes == sizes


def test_a_method_without_the_presets_options():
    message = (
        "method: expected dual_cache or local_leap for preset 'careful', which sets drafts, got 'blockbatch'"
    )
    with pytest.raises(ValueError, match=message):
        DecodeConfig.preset("careful", method="blockbatch")
    leap = DecodeConfig.preset("careful", method="local_leap")
    assert leap.drafts == DecodeConfig.preset("careful").drafts
    with pytest.raises(ValueError, match="method: expected one of blockbatch, vanilla"):
        DecodeConfig.preset("fast", method="magic")


def test_generate(tiny, capsys):
    arguments = ["generate", "--prompt", "a = 3\n", "--gen-length", "64", "--json", "--preset", "careful"]
    assert main([*arguments, "--threshold", "0.99"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = DecodeConfig.preset("careful", gen_length=64, threshold=0.99)
    result = blockbatch.generate(tiny, "a = 3\n", config)
    assert (report["method"], report["tokens"]) == (config.method, result.tokens)
    assert report["settings"]["drafts"] == list(config.drafts) and len(report["branches"]) == 1
    assert report["adopted"] == report["branches"][0]["adopted"] == result.adopted > 0


def test_compare(capsys):
    arguments = ["compare", "--gen-length", "32", "--count", "1", "--family", "symbolic"]

    def labels(*more):
        assert main([*arguments, *more, "--json", "-"]) == 0
        return [row["label"] for row in json.loads(capsys.readouterr().out)["rows"]]

    assert labels("--methods", "blockbatch") == ["blockbatch"]
    assert labels("--methods", "blockbatch", "--preset", "fast,paper") == ["blockbatch", "fast", "paper"]
    assert main([*arguments, "--methods", "dual_cache", "--preset", "fast"]) == 0
    text = capsys.readouterr().out
    assert f"\nfast      {PRESET_TABLE['fast'].summary}\n" in text
    rows = [line.split()[0] for line in text.splitlines() if line.startswith(("dual_cache", "fast"))]
    assert rows == ["dual_cache", "dual_cache", "fast", "fast"], "below the rows with the same end"


def test_eval(tiny, tmp_path):
    arguments = ["eval", "--tasks", "symbolic", "--limit", "1", "--gen-length", "32", "--out", str(tmp_path)]
    own = ["--set", "own:preset=careful,drafts=1/3,threshold=0.99"]
    assert main([*arguments, "--methods", "dual_cache", "--preset", "fast", *own]) == 0
    run = read_run(tmp_path / "results.jsonl")
    assert [record.setting for record in run.records] == ["dual_cache", "dual_cache +eos", "fast", "own"]
    assert run.header["settings"]["own"]["drafts"] == [1, 3] and run.header["preset"] is None
    assert run.header["settings"]["fast"]["eos_exit"] == "prefix"
    prompt = generate_problems("symbolic", "test", 1, 0)[0].prompt
    config = parse_setting("own:preset=careful,drafts=1/3,threshold=0.99", 32).config
    assert run.records[-1].adopted == blockbatch.generate(tiny, prompt, config).adopted > 0
    summary = json.loads((tmp_path / "summary.json").read_text())["overall"]
    assert summary["own"]["adopted"] == run.records[-1].adopted and summary["dual_cache"]["adopted"] == 0


def test_records_of_before_have_no_drafts(tmp_path):
    lines = [{"run": {"format": 1}}]
    lines.append(
        {"task": "t", "problem": "1", "setting": "a", "text": "", "tokens": 0, "right": None, "seconds": 1.0}
        | {"nfe": {"init": 1, "block": 0, "refresh": 0, "total": 1}}
        | {"stop_reason": "eos", "block_size": 4, "prompt": ""}
    )
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(path).records[0].adopted == 0
    lines[1]["adopted"] = "many"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="expected a record with adopted, got 'many'"):
        read_run(path)


def test_model_args():
    for name in ("fast", "careful"):
        assert decode_options(name, {}) == decode_options(None, {}, name) == dict(PRESET_TABLE[name].options)
    assert decode_options("careful", {"drafts": "1:3"})["drafts"] == (1, 3)
    assert decode_options("careful", {"drafts": "none"})["drafts"] is None
    # Beside a benchmark: its length, and what else the decode's settings leave to the method as published.
    both = DecodeConfig(**decode_options("gsm8k", {"threshold": 0.95}, "fast"))
    assert both == DecodeConfig.preset("fast", gen_length=256, threshold=0.95)
    assert DecodeConfig(**decode_options("gsm8k", {}, "paper")) == get_preset("gsm8k").config()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DecodeConfig.preset("quick"), f"preset: expected one of {NAMES}, got 'quick'"),
        (lambda: preset_settings(("quick",), 64), f"--preset: expected one of {NAMES}, got 'quick'"),
        (
            lambda: parse_setting("a:preset=quick", 64),
            f"--set: a: preset: expected one of {NAMES}, got 'quick'",
        ),
        (lambda: decode_options("quick", {}), f"preset: expected one of gsm8k, .*{NAMES}, got 'quick'"),
        (
            lambda: decode_options("gsm8k", {}, "quick"),
            f"decode_preset: expected one of {NAMES}, got 'quick'",
        ),
        (
            lambda: decode_options("gsm8k", {"method": "blockbatch"}, "careful"),
            "method: expected dual_cache or local_leap for decode_preset 'careful'",
        ),
        (
            lambda: decode_options("fast", {}, "paper"),
            "preset: expected one of gsm8k, .* beside decode_preset",
        ),
    ],
)
def test_what_there_is_not(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "--prompt", "x", "--preset", "quick"], f"preset: expected one of {NAMES}, got 'quick'"),
        (["compare", "--preset", "fast,quick"], f"--preset: expected one of {NAMES}, got 'quick'"),
        (
            ["eval", "--preset", "quick"],
            f"preset: expected one of gsm8k, math, humaneval, mbpp, {NAMES}, got",
        ),
        (["eval", "--preset", "gsm8k", "--preset", "math"], "--preset: expected at most one of gsm8k, math"),
        (
            ["generate", "--prompt", "x", "--preset", "fast", "--method", "vanilla"],
            "method: expected blockbatch for preset 'fast', which sets",
        ),
    ],
)
def test_one_line_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"blockbatch: error: {message}") and error.count("\n") == 1
