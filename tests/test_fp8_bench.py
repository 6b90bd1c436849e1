"""The benchmarks of e4m3 in their smallest form, on the CPU."""

import json

from bench_scripts import run, start


def test_fp8_step(tmp_path):
    report = run(
        "fp8_step.py", tmp_path / "fp8_step.json", "--device", "cpu", "--shapes", "small-llada", "--tokens",
        "8", "12", "--length", "64", "--repeats", "2",
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
        assert all(0 < line["checks"][kind]["hidden_error"] < 0.02 for kind in ("bf16", "fp8"))
    assert shape["row"]["fp8_difference_from_reference"] < 1e-3


def test_fp8_accuracy(tmp_path):
    out = tmp_path / "fp8_accuracy.json"
    start(
        "fp8_accuracy.py", "--out", str(out), "--count", "2", "--together", "2", "--methods", "dual_cache",
        "--processes", "1", "--layer-count", "1",
    )  # fmt: skip
    report = json.loads(out.read_text())
    (line,) = report["decodes"]
    assert line["problems"] == 2 and 0 <= line["right_fp8"] <= 2 and line["nfe_ratio"] > 0
    assert all(0 < layer["error_bf16"] < layer["error_fp8"] < 0.5 for layer in report["layers"])
