"""The benchmarks of the LM head in e4m3 in their smallest form, on the CPU."""

from bench_scripts import run


def test_fp8_head(tmp_path):
    report = run(
        "fp8_head.py", tmp_path / "fp8_head.json", "--device", "cpu", "--shapes", "small-llada", "--tokens",
        "8", "12", "--length", "64", "--repeats", "2",
    )  # fmt: skip
    (shape,) = report["shapes"]
    assert [line["predictions"] for line in shape["heads"]] == [8, 12]
    for line in shape["heads"]:
        assert line["vocabulary"] == 2048 and min(line["ms"].values()) > 0
    assert [line["tokens"] for line in shape["steps"]] == [8, 12, 12]
    for line in shape["steps"]:
        assert min(line[f"{kind}_ms"] for kind in ("bf16", "fp8", "fp8_all")) > 0
        assert all(0 < line["checks"][kind]["hidden_error"] < 0.02 for kind in ("bf16", "fp8", "fp8_all"))
