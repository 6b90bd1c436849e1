"""The benchmarks in their smallest form, on the CPU: they verify, measure and write what they promise."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from bench_scripts import ROOT, run
from blockbatch_kernels import reference


def test_step_latency(tmp_path):
    report = run(
        "step_latency.py", tmp_path / "step_latency.json", "--dtype", "float32", "--shapes", "small-llada",
        "small-dream", "--tokens", "8", "12", "--lengths", "64", "--repeats", "2",
    )  # fmt: skip
    assert {"copy_gb_per_s", "matmul_tflops"} <= set(report["ceilings"])
    lines = report["lines"]
    found = [(line["model"], line["tokens"], line["pages"]) for line in lines]
    kinds = [(8, "separate"), (12, "shared"), (12, "separate")]
    assert found == [(model, *kind) for model in ("small-llada", "small-dream") for kind in kinds]
    for line in lines:
        assert line["ours_ms"] > 0 and line["eager_ms"] > 0 and line["products_ms"] > 0
        assert line["floor_ms"] == max(line["floor_bytes_ms"], line["floor_flop_ms"])
        assert line["checks"]["committed"] == [1] * len(line["branches"])
    # Twelve tokens on pages of their own read more than on shared ones.
    assert lines[2]["floor_bytes_ms"] > lines[1]["floor_bytes_ms"]


def test_block_steps(tmp_path):
    report = run(
        "block_steps.py", tmp_path / "block_steps.json", "--dtype", "float32", "--stored", "64",
        "--prompt", "96", "--shapes", "small-sdar", "small-fast-dllm-v2", "--repeats", "2",
    )  # fmt: skip
    assert all(check["top_tokens_equal_to_fp32"] == 1.0 for check in report["checks"].values())
    lines = [line for line in report["lines"] if line["model"] == "small-sdar"]
    kinds = [(line["forward"], line["tokens"]) for line in lines]
    assert kinds[:4] == [("denoise", 32), ("denoise", 64), ("denoise", 128), ("fused", 64)]
    assert kinds[4:] == [("prefill", 96), ("prefill", 96), ("found", 96), ("found", 64), ("found", 32)]
    assert all(line["ours_ms"] > 0 for line in report["lines"])


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    parts = ("products", "attention", "norm_rope_swiglu", "lm_head", "around_the_model", "gaps")
    times = {"ours_ms": 8.0, "products_ms": 7.0, "floor_ms": 5.0, "eager_ms": 20.0}
    steps = [
        {"model": model, "tokens": tokens, "length": 1280, "pages": pages, "branches": [4] * rows, **times,
         "parts_ms": dict.fromkeys(parts, 1.0)}
        for model in ("llada-8b", "dream-7b")
        for tokens, rows in ((8, 1), (252, 6))
        for pages in ("separate", "shared")[:rows]
    ]  # fmt: skip
    refreshes = [{"model": "llada-8b", "distinct_rows": rows, "length": 1280, **times} for rows in (1, 6)]
    for name, lines in (("step_latency", steps), ("refresh", refreshes)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"device": "a GPU", "lines": lines}))
    command = [sys.executable, str(ROOT / "bench" / "plots.py"), "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for name in ("step_latency", "refresh"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_draft_equality(tmp_path):
    report = run(
        "draft_equality.py", tmp_path / "equality.json", "--count", "1", "--thresholds", "0.99",
        "--drafts", "1", "1,3", "--gen-length", "32", "--methods", "dual_cache,local_leap",
    )  # fmt: skip
    lines = report["lines"]
    found = [(line["method"], line["drafts"]) for line in lines]
    assert found == [(method, drafts) for method in ("dual_cache", "local_leap") for drafts in ([1], [1, 3])]
    for line in lines:
        assert line["equal"] == line["total"] == line["steps_saved_as_adopted"] == 3
        saved = line["block_steps_without"] - line["block_steps_with"]
        assert saved == line["adopted"] > 0
        parts = line["families"].values()
        assert saved == sum(part["adopted"] for part in parts) and len(parts) == 3


def test_dream_rules(tmp_path):
    report = run(
        "dream_rules.py", tmp_path / "rules.json", "--count", "1", "--changes", "sync_leaves_the_map",
        "full_forwards_commit_by_threshold",
    )  # fmt: skip
    lines = report["lines"]
    rules = ["llada_published"] * 2 + ["dream_published"] * 2
    changes = ["sync_leaves_the_map", "full_forwards_commit_by_threshold"]
    assert [line["label"] for line in lines] == rules + changes
    assert [line["policy"] for line in lines] == rules + ["dream_published"] * 2
    assert all(line["problems"] == 3 and line["forwards"] > 1 for line in lines)


def test_refresh(tmp_path):
    report = run(
        "refresh.py", tmp_path / "refresh.json", "--dtype", "float32", "--shapes", "small-llada",
        "--length", "64", "--rows", "1", "3", "--repeats", "1",
    )  # fmt: skip
    found = [(line["scope"], line["distinct_rows"], line["tokens"]) for line in report["lines"]]
    assert found == [("canvas", 1, 64), ("generation", 1, 32), ("canvas", 3, 192), ("generation", 3, 96)]


def test_cheaper_steps(tmp_path):
    report = run(
        "cheaper_steps.py", tmp_path / "steps.json", "--dtype", "float32", "--shapes", "small-llada",
        "small-dream", "--length", "320", "--repeats", "1",
    )  # fmt: skip
    tokens = {(line["model"], line["step"]): line["tokens"] for line in report["lines"]}
    for model in ("small-llada", "small-dream"):
        assert [tokens[model, f"drafts {count}"] for count in (1, 2, 3)] == [64, 96, 128]
        assert tokens[model, "windows"] == 124 and tokens[model, "one window"] == 32
        # Half of 248 positions are decoded; one more is committed by every branch before its step.
        assert 90 < tokens[model, "scattered"] < 160
    assert all(line["ours_ms"] > 0 and sum(line["checks"]["committed"]) > 0 for line in report["lines"])


def test_ops(tmp_path):
    report = run(
        "ops.py", tmp_path / "ops.json", "--dtype", "float32", "--shapes", "small-dream",
        "--length", "64", "--repeats", "1",
    )  # fmt: skip
    lines = report["models"]["small-dream"]
    assert {line["op"] for line in lines} == {
        "rms_norm", "swiglu", "rope_kv_write", "linear_rope_kv_write", "varlen_attention", "attention_plan",
        "lm_head_confidence", "lm_head_sample", "pack_windows", "decode_policy", "share_pages", "copy_pages",
    }  # fmt: skip
    for line in lines:
        assert {"torch", "reference"} <= set(line["versions"])
        assert line["floor_us"] > 0
        for version in line["versions"].values():
            assert {"us", "gb_per_s", "tflops", "percent_of_floor"} <= set(version)


def test_gemm_candidates(tmp_path):
    report = run(
        "gemm.py", tmp_path / "gemm.json", "--candidates", "--dtype", "float32", "--shapes", "small-dream",
        "--tokens", "12", "70", "--repeats", "1",
    )  # fmt: skip
    lines = report["models"]["small-dream"]
    products = ["qkv", "out", "gate_up", "down", "layers", "lm_head"]
    assert [(line["product"], line["tokens"]) for line in lines] == [
        (p, t) for t in (12, 70) for p in products
    ]
    for line in lines:
        if line["product"] == "layers":
            assert line["ours_ms"] > 0 and line["cublas_ms"] > 0
            continue
        taken = line["candidates"]
        assert {"cublas"} < set(taken) and all(value > 0 for value in taken.values())
        assert taken[line["choice"]] == min(taken.values())
    # Tiles without room for the tokens are left out.
    assert "16x64" in lines[0]["candidates"] and "16x64" not in lines[6]["candidates"]
    assert set(lines[5]["candidates"]) == {"cublas", "16", "64", "128"}
    assert set(lines[11]["candidates"]) == {"cublas", "128"}


def test_attention(tmp_path):
    report = run(
        "attention.py",
        tmp_path / "attention.json",
        "--dtype",
        "float32",
        "--shapes",
        "small-llada",
        "--quick",
    )
    lines = report["models"]["small-llada"]
    assert [(line["tokens"], line["distinct_rows"]) for line in lines] == [(12, 1), (12, 2), (64, 1)]
    for line in lines:
        assert set(line["candidates"]) == set(line["plan_us"]) == {"units", "tiles", "triton"}
        assert line["candidates"][line["choice"]] == min(line["candidates"].values())


def test_decode(tmp_path):
    report = run(
        "decode.py", tmp_path / "decode.json", "--dtype", "float32", "--shapes", "small-llada",
        "--prompt-length", "16", "--gen-length", "64", "--quick",
    )  # fmt: skip
    found = report["models"]["small-llada"]
    # One token a branch and forward fills 64 positions in 64 forwards; a refresh falls due after 32.
    assert found["random"]["blockbatch, ours"]["nfe"] == [1, 62, 1]
    assert found["random"]["dual_cache, ours"]["nfe"] == [1, 62, 1]
    assert found["random"]["blockbatch, eager"]["nfe"] == [1, 62, 1]
    assert {line["method"] for line in found["traces"]} == {"blockbatch", "dual_cache"}


def test_runs_take_turns(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from timing import in_turns

    calls = []
    runs = [(lambda: calls.append("a"), lambda: calls.append("before a")), (lambda: calls.append("b"), None)]
    found = in_turns(runs, torch.device("cpu"), 3)
    assert calls == ["before a", "a", "b"] * 6  # two rounds of three
    assert len(found) == 2 and all(median > 0 and spread >= 0 for median, spread in found)


class TestChecks:
    """What verify.py is for: a step that computes something else does not pass."""

    @pytest.fixture
    def case(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "bench"))
        from cases import StepCase
        from random_models import random_model

        with torch.inference_mode():
            model = random_model("small-llada", torch.device("cpu"), torch.float32)
            yield StepCase(model, (4, 8), 16, 16)

    def test_right_step_passes(self, case):
        from verify import check_step

        assert check_step(case)["committed"] == [1, 1]

    def test_wrong_hidden_states(self, case):
        from verify import Wrong, check_hidden, hidden_states

        hidden = hidden_states(case)
        hidden.ours = hidden.ours * 1.01
        with pytest.raises(Wrong, match="hidden states"):
            check_hidden(hidden, case.model.dtype, None)

    def test_wrong_top_token(self, case):
        from verify import Wrong, check_policy, check_predictions, hidden_states

        hidden = hidden_states(case)
        top_token, confidence, _ = check_policy(case, hidden.predict_target)
        top_token[3] = (top_token[3] + 1) % 1000
        with pytest.raises(Wrong, match="top tokens"):
            check_predictions(case, hidden, top_token, confidence)

    def test_wrong_commit(self, case):
        from verify import Wrong, check_policy, hidden_states

        hidden = hidden_states(case)
        run = case.run

        def tampered():
            run()
            case.batch.state.tokens[0, 3] = 7

        case.run = tampered
        with pytest.raises(Wrong, match="state.tokens"):
            check_policy(case, hidden.predict_target)

    def test_kernels_fall_into_parts(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "bench"))
        from parts import Kernel, split

        names = [
            "copy_pages_kernel", "pack_kernel", "attention_plan_kernel", "vectorized_gather_kernel",
            "rms_norm_kernel", "nvjet_qkv", "rope_kv_write_kernel", "attention_mma_kernel",
            "combine_pieces_kernel", "nvjet_out", "rms_norm_kernel", "nvjet_up", "swiglu_kernel",
            "elementwise_kernel<direct_copy_kernel_cuda>", "nvjet_down", "rms_norm_kernel",
            "index_elementwise_kernel", "nvjet_head",
            "lm_head_reduce_kernel", "policy_and_plan_kernel", "share_pages_kernel", "Memcpy DtoH",
        ]  # fmt: skip
        # Each takes one microsecond, with half a microsecond in between.
        kernels = [Kernel(name, 1.5 * at, 1.5 * at + 1) for at, name in enumerate(names)]
        found = {part: round(1e3 * value, 3) for part, value in split(kernels, num_layers=1).items()}
        assert found == {
            "products": 4, "attention": 3, "norm_rope_swiglu": 7, "lm_head": 3, "around_the_model": 5,
            "gaps": 10.5, "span": 32.5,
        }  # fmt: skip


class TestRounding:
    """Differences that are as exact as what they replace, and that a decode meets."""

    @pytest.fixture(autouse=True)
    def path(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "bench"))

    def test_products(self):
        import rounding

        x, weight, bias = (torch.randn(*shape) for shape in ((7, 48), (32, 48), (32,)))
        torch.testing.assert_close(rounding.split_sums(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(rounding.exact_gates(x, weight), reference.linear_swiglu(x, weight))
        x, weight = x.bfloat16(), weight.bfloat16()
        exact = rounding.exact_gates(x, weight)
        truth = reference.linear_swiglu(x.double(), weight.double())
        error, rounded_error = (
            (result.double() - truth).abs().mean() for result in (exact, reference.linear_swiglu(x, weight))
        )
        assert exact.dtype == torch.bfloat16 and error < rounded_error

    def test_attention(self):
        import rounding

        q, k, v = (torch.randn(1, 2, count, 16, dtype=torch.bfloat16) for count in (5, 33, 33))
        truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
        by_torch = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        got = rounding.rounded_weights(q, k, v, scale=0.3, attend=None)
        error, torch_error = ((result.double() - truth).abs().max() for result in (got, by_torch))
        assert got.dtype == q.dtype and error <= 2 * torch_error

    def test_a_decode_meets_every_difference(self, monkeypatch):
        import rounding

        met = []
        plain = {name: rounding.patches_of(name) for name in rounding.DIFFERENCES}

        def noting(name):
            def note(function):
                return lambda *args, **options: (met.append(name), function(*args, **options))[1]

            return [(module, attribute, note(function)) for module, attribute, function in plain[name]]

        monkeypatch.setattr(rounding, "patches_of", noting)
        before = reference.linear, reference.linear_swiglu, F.scaled_dot_product_attention
        lines = rounding.measure("dual_cache", 1)
        assert [line["difference"] for line in lines] == ["fp32", *rounding.DIFFERENCES]
        assert set(met) == set(rounding.DIFFERENCES)
        assert (reference.linear, reference.linear_swiglu, F.scaled_dot_product_attention) == before
