"""The benchmarks of the LM head and of whole decodes in e4m3 in their smallest form, on the CPU."""

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


def test_clock_fp8(tmp_path):
    setting = "blockbatch 4..64, leap, open"
    report = run(
        "clock_fp8.py", tmp_path / "clock_fp8.json", "--device", "cpu", "--shapes", "small-llada", "--dtype",
        "float32", "--problems", "1", "--rounds", "2", "--prompt-lengths", "32", "--settings", setting,
    )  # fmt: skip
    (line,) = report["lines"]
    assert (line["setting"], line["prompt_length"], line["problems"]) == (setting, 32, 3)
    assert set(line["ms"]) == {"bf16", "fp8", "fp8-all"} and min(line["ms"].values()) > 0
    for kind in ("fp8", "fp8-all"):
        low, high = line[f"times_as_fast_{kind}_95"]
        assert 0 < low <= line[f"times_as_fast_{kind}"] <= high
    assert report["targets"] == []  # they are those of a large shape
