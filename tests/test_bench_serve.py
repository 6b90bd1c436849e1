"""The benchmark of the server in its smallest form: what it verifies, and what it writes."""

import pytest

from bench_scripts import ROOT, run
from serving_fakes import ScriptedEngine  # noqa: F401 (skips where the server's packages lack)


@pytest.mark.parametrize("model", ["tiny", "small-llada"])
def test_a_run(tmp_path, model):
    report = run(
        "serve.py", tmp_path / "serve.json", "--model", model, "--dtype", "float32", "--requests", "4",
        "--clients", "1", "4", "--batches", "4", "--gen-length", "32", "--prompt-length", "24",
        "--max-requests", "4", "--settings", "careful", "blockbatch, branches by load",
    )  # fmt: skip
    lines = report["lines"]
    for setting in ("careful", "blockbatch, branches by load"):
        found = [(one["by"], one["at_a_time"]) for one in lines if one["setting"] == setting]
        assert found == [
            ("one by one", 1), ("batches of 4", 4), ("engine", 1), ("engine", 4), ("server", 1), ("server", 4),
        ]  # fmt: skip
    assert all(one["tokens_per_s"] > 0 for one in lines)
    for one in lines:
        if one["by"] == "server":
            assert 0 < one["first_s"]["p50"] <= one["whole_s"]["p50"] <= one["whole_s"]["p99"]
    tokens = {one["tokens"] for one in lines if one["setting"] == "careful"}
    assert len(tokens) == 1
    assert {(one["setting"], one["streams"]) for one in report["compared"]} == {
        (setting, count) for setting in ("careful", "blockbatch, branches by load") for count in (1, 4)
    }


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
