"""The benchmark of the server in its smallest form: what it verifies, and what it writes."""

import pytest

from bench_scripts import ROOT, run
from serving_fakes import ScriptedEngine  # noqa: F401 (skips where the server's packages lack)


@pytest.mark.parametrize(
    "model, setting", [("tiny", "careful"), ("small-llada", "blockbatch, branches by load")]
)
def test_a_run(tmp_path, model, setting):
    report = run(
        "serve.py", tmp_path / "serve.json", "--model", model, "--dtype", "float32", "--requests", "3",
        "--clients", "1", "3", "--batches", "3", "--gen-length", "32", "--prompt-length", "24",
        "--max-requests", "4", "--settings", setting,
    )  # fmt: skip
    lines = report["lines"]
    assert [(one["by"], one["at_a_time"]) for one in lines] == [
        ("one by one", 1), ("batches of 3", 3), ("engine", 1), ("engine", 3), ("server", 1), ("server", 3),
    ]  # fmt: skip
    assert all(one["tokens_per_s"] > 0 and one["setting"] == setting for one in lines)
    for one in lines[-2:]:
        assert 0 < one["first_s"]["p50"] <= one["whole_s"]["p50"] <= one["whole_s"]["p99"]
    assert lines[0]["tokens"] == lines[1]["tokens"]
    assert [(one["setting"], one["streams"]) for one in report["compared"]] == [(setting, 1), (setting, 3)]


def test_another_text_ends_the_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import serve
    import serve_model

    given = {"model": "tiny", "device": "cpu", "dtype": "float32", "requests": 1, "prompt_length": 8}
    model, prompts = serve_model.load({**given, "gen_length": 32, "backend": None})
    expected = serve.Expected(model, prompts, "careful", 32)
    expected.check(0, expected.result(0).text)
    with pytest.raises(SystemExit, match="another text than alone"):
        expected.check(0, expected.result(0).text + "x")
