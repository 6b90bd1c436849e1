"""What bench/tuning_rows.py makes of results, and that a candidate is really the one that is launched."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from blockbatch_kernels import tuning


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench"))


@pytest.fixture
def results(bench, monkeypatch, tmp_path):
    """tuning_rows, reading results that a test writes."""
    import tuning_rows

    monkeypatch.setattr(tuning_rows, "RESULTS", tmp_path)

    def write(name, lines, **header):
        (tmp_path / name).write_text(json.dumps({**header, "models": {"a-model": lines}}))
        return tuning_rows

    return write


def line(tokens, candidates, product="out", rows=4096, columns=4096):
    return dict(product=product, tokens=tokens, rows=rows, columns=columns, candidates=candidates)


@pytest.mark.parametrize(
    "times, choice",
    [
        ({"cublas": 10.0, "64x64 split_k 2": 9.0, "64x64": 8.0}, "64x64"),
        # The launch of the rule stays where it is as good.
        ({"cublas": 10.0, "64x64 split_k 2": 8.05, "64x64": 8.0}, "64x64 split_k 2"),
        ({"cublas": 8.01, "64x64 split_k 2": 8.05, "64x64": 8.0}, "64x64"),
        ({"cublas": 7.99, "64x64 split_k 2": 8.05, "64x64": 8.0}, "cublas"),
    ],
)
def test_the_fastest_way_of_a_product(results, times, choice):
    module = results("gemm.json", [line(64, times)])
    ((row,),) = module.rows_now()["PRODUCTS"].values()
    assert row == ("gemm.json: a-model/out", 4096, 4096, False, ((64, choice),))


def test_rows_belong_to_the_device_that_was_measured(results):
    kind = dict(capability=[9, 0], num_sms=114)
    module = results("gemm.json", [line(64, {"cublas": 1.0})], device_kind=kind)
    assert list(module.rows_now()["PRODUCTS"]) == [tuning.DeviceKind((9, 0), 114)]
    assert "    DeviceKind((9, 0), 114): (\n" in module.sources()["rows.py"]


def test_a_file_for_each_kind_of_device(results):
    kind, times = dict(capability=[9, 0], num_sms=132), {"cublas": 1.5, "64x64": 2.0}
    results("gemm.json", [line(64, times | {"64x64": 1.0})], device_kind=kind)
    module = results("gemm_h200.json", [line(64, times)], device_kind=kind | {"large_memory": True})
    found = module.rows_now()["PRODUCTS"]
    assert [(of, rows[0].choices) for of, rows in found.items()] == [
        (tuning.H100, ((64, "64x64"),)),
        (tuning.H200, ((64, "cublas"),)),
    ]
    assert "    DeviceKind((9, 0), 132, large_memory=True): (\n" in module.sources()["rows.py"]
    results("gemm_h200.json", [line(64, times)], device_kind=kind)
    with pytest.raises(ValueError, match="gemm_h200.json: expected results of another device"):
        module.rows_now()


def test_lm_head_and_attention(results):
    heads = [
        line(8, {"cublas": 3.0, "16": 2.0, "64": 1.0, "128": 4.0}, "lm_head", 126464),
        line(252, {"cublas": 3.0}, "lm_head", 126464),
    ]
    results("gemm.json", heads)
    sizes = dict(tokens=12, keys=64, distinct_rows=2, num_heads=28, num_kv_heads=4)
    case = dict(case="4+8 queries, 64 keys, 0 shared", **sizes, candidates={"units": 2.0, "triton": 1.0})
    module = results("attention.json", [case])
    found = module.rows_now()
    assert found["LM_HEADS"] == {
        tuning.H100: (("gemm.json: a-model/lm_head", 126464, 4096, ((8, 64), (252, 0))),)
    }
    ((row,),) = found["ATTENTION"].values()
    assert row[1:] == (28, 4, 12, 64, 2, "triton")
    assert module.line_of(row.result) == case
    assert module.line_of("gemm.json: a-model/lm_head/252") == heads[1]
    for wrong in ("gemm.json: a-model/lm_head/64", "gemm.json: other/lm_head/8", "none.json: a-model/out/8"):
        with pytest.raises(KeyError):
            module.line_of(wrong)


def test_the_text_of_the_tables_makes_the_tables(results, tmp_path):
    module = results("gemm.json", [line(8, {"cublas": 2.0, "16x64": 1.0}), line(16, {"cublas": 1.0})])
    sizes = dict(tokens=252, keys=1280, distinct_rows=1, num_heads=32, num_kv_heads=32)
    name = "4+8+16+32+64+128 queries, 1280 keys, 1024 shared"
    names = name, "64+128 queries, 1280 keys, 0 shared", "8 queries, 9 keys"
    cases = [dict(case=name, **sizes, candidates={"units": 1.0}) for name in names]
    results("attention.json", cases)
    made: dict = {}
    for text in module.sources().values():
        exec(text, made)
    for table, expected in module.rows_now().items():
        assert made[table] == expected
    assert made["PRODUCTS"] and made["ATTENTION"] and not made["LM_HEADS"]
    formatter = shutil.which("ruff")
    for file, text in module.sources().items():
        assert max(map(len, text.splitlines())) <= 110
        if formatter is not None:
            (tmp_path / file).write_text(text)
            command = [formatter, "format", "--check", "--line-length", "110", str(tmp_path / file)]
            subprocess.run(command, check=True, capture_output=True)


def test_a_forced_choice_that_nothing_asks_for_is_an_error(bench):
    from candidates import forced

    device = torch.device("cuda")
    with forced("linear_parts", "this", device):
        assert tuning.linear_parts(8, 4096, 4096, gated=False) == "this"
    assert tuning.linear_parts(8, 4096, 4096, gated=False) != "this"
    with pytest.raises(RuntimeError, match="tuning.lm_head_tile: expected the launch to ask for it"):
        with forced("lm_head_tile", 16, device):
            pass
    with forced("lm_head_tile", 16, torch.device("cpu")):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [12, 200])
def test_every_candidate_computes_the_product(bench, tokens):
    """Both raise where one errs by more than twice what torch does, or is not the one that is launched."""
    from candidates import layer_products, time_lm_head, time_product
    from random_models import random_model

    device = torch.device("cuda", torch.cuda.current_device())
    with torch.inference_mode():
        model = random_model("small-dream", device, torch.bfloat16)
        for product in layer_products(model, tokens, torch.bfloat16).values():
            times = time_product(product, tokens, device, torch.bfloat16, 1)
            assert times and all(value > 0 for value in times.values())
        assert time_lm_head(model, tokens, device, torch.bfloat16, 1)["cublas"] > 0
