"""The benchmarks of e4m3 in their smallest form, on the CPU."""

import json

import pytest

from bench_scripts import ROOT, run, start
from blockbatch_kernels import tuning


def test_fp8_step(tmp_path):
    report = run(
        "fp8_step.py", tmp_path / "fp8_step.json", "--device", "cpu", "--shapes", "small-llada", "--tokens",
        "8", "12", "--length", "64", "--repeats", "2", "--kv-dtype", "fp8",
    )  # fmt: skip
    (shape,) = report["shapes"]
    assert [(line["tokens"], line["pages"]) for line in shape["steps"]] == [
        (8, "separate"),
        (12, "shared"),
        (12, "separate"),
    ]
    assert len(shape["products"]) == 8
    assert all({"ours", "bf16"} <= set(line["ms"]) for line in shape["products"])
    for line in shape["steps"]:
        kinds = ("bf16", "fp8", "bf16_apart", "fp8_apart", "bf16_kv8", "fp8_kv8")
        assert all(line[f"{kind}_ms"] > 0 for kind in kinds)
        assert all(0 < line["checks"][kind]["hidden_error"] < 0.02 for kind in kinds)
    assert [line["tokens"] for line in shape["rotated"]] == [8, 12]
    for line in shape["rotated"]:
        kinds = {f"{kind}, cache in {cache}" for kind in ("bf16", "fp8") for cache in ("16 bits", "e4m3")}
        assert set(line["ms"]) == {f"{kind}, {way}" for kind in kinds for way in ("together", "apart")}
    assert shape["row"]["fp8_difference_from_reference"] < 1e-3


def test_fp8_tiles(tmp_path):
    report = run(
        "fp8_tiles.py", tmp_path / "fp8_tiles.json", "--device", "cpu", "--shapes", "small-llada", "--tokens",
        "3", "--repeats", "2",
    )  # fmt: skip
    lines = report["models"]["small-llada"]
    assert [line["best"] for line in lines] == ["library", "library", "library", "apart", "library"]
    assert not any(line["failed"] for line in lines)


def test_fp8_tiles_of_the_head(tmp_path):
    report = run(
        "fp8_tiles.py", tmp_path / "fp8_tiles_head.json", "--of", "head", "--device", "cpu", "--shapes",
        "small-llada", "--tokens", "3", "1280", "--repeats", "2",
    )  # fmt: skip
    (line,) = report["models"]["small-llada"]
    assert (line["product"], line["tokens"], line["out_features"]) == ("lm_head", 3, 2048)
    assert line["best"] == "library" and not line["failed"]


def test_the_table_follows_from_the_results(monkeypatch):
    """`python bench/fp8_tiles.py --write` brings it up to date."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import fp8_tiles as bench

    table = ROOT / "blockbatch_kernels" / "tuning" / "rows_fp8.py"
    if stored := bench.stored_reports():
        assert table.read_text() == bench.source_of(stored)
    times = {"library": 10.05, "64x64": 10.0, "64x128": 11.0}
    line = dict(product="out", tokens=64, out_features=8, in_features=16, gated=False, us=times)
    report = {"models": {"m": [line, line | dict(tokens=32, us={"library": 12.0, "32x64": 9.0})]}}
    report["device_kind"] = dict(capability=[9, 0], num_sms=132)
    (row,) = bench.rows_of(report)
    assert row.choices == ((32, "32x64"), (64, "library"))
    # What rotates q and k may take 5% longer.
    for us, choice in ((10.4, "64x128"), (10.6, "64x192")):
        ways = {"64x192": 10.0, "64x128": us}
        assert bench.choice_of(line | dict(product="qkv", us=ways)) == choice
        assert bench.choice_of(line | dict(us=ways)) == "64x192"
    found: dict = {}
    head = line | dict(product="lm_head", out_features=4096)
    reports = {"fp8_tiles.json": report, "fp8_tiles_head.json": report | {"models": {"m": [head]}}}
    exec(bench.source_of(reports), found)
    last = tuning.Fp8Row("fp8_tiles_head.json: m/lm_head", 4096, 16, False, ((64, "library"),))
    assert found["PRODUCTS"] == {tuning.H100: (row, last)}
    other = report | {"device_kind": dict(capability=[9, 0], num_sms=114)}
    with pytest.raises(RuntimeError, match="expected results of one kind of device"):
        bench.source_of({**reports, "fp8_tiles_head.json": other})


def test_attention_fp8(tmp_path):
    report = run(
        "attention_fp8.py", tmp_path / "attention_fp8.json", "--device", "cpu", "--shapes", "small-llada",
        "--quick",
    )  # fmt: skip
    lines = report["models"]["small-llada"]
    assert [line["tokens"] for line in lines] == [12, 12, 64]
    assert all({"units", "tiles", "triton", "16 bits", "write"} <= set(line["us"]) for line in lines)


@pytest.mark.parametrize("part", ["layers", "kv", "head"])
def test_fp8_accuracy(tmp_path, part):
    out = tmp_path / "fp8_accuracy.json"
    start(
        "fp8_accuracy.py", "--of", part, "--out", str(out), "--count", "2", "--together", "2", "--methods",
        "dual_cache",
        "--processes", "1", "--layer-count", "1",
    )  # fmt: skip
    report = json.loads(out.read_text())
    line, *others = report["decodes"]
    assert [one["right_fp8"] for one in others] == ([line["right_fp8"]] if part == "head" else [])
    assert all(0 <= one["right_layers"] <= 2 for one in others)
    errors = report.get("logits", {})
    assert set(errors) == ({"error_bf16", "error_layers", "error_fp8"} if part == "head" else set())
    assert part != "head" or errors["error_bf16"] < errors["error_layers"] < errors["error_fp8"] < 0.5
    assert line["problems"] == 2 and 0 <= line["right_fp8"] <= 2 and line["nfe_ratio"] > 0
    assert all(0 < layer["error_bf16"] < layer["error_fp8"] < 0.5 for layer in report["layers"])
