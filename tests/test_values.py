"""Values that no operator may take: refused with `BBK_CHECK=1`, under which the tests run, and without it
where that takes no wait; on a GPU nothing outside of the tensors is touched."""

import os
import subprocess
import sys

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels.ops import values
from contract_cases import with_change
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from operator_arguments import arguments_of, policy


def put(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


WRONG = [
    ("attention_plan", "seqlens_k", put(1, 81), "seqlens_k: expected at most 80 keys, 5 pages of 16, got 81"),
    ("attention_plan", "seqlens_k", put(0, -1), "seqlens_k: expected at most 80 keys, .* got -1 in row 0"),
    ("attention_plan", "cu_seqlens_q", put(0, 1), "cu_seqlens_q: expected ascending values from 0"),
    ("attention_plan", "cu_seqlens_q", put(1, 10), "cu_seqlens_q: expected ascending values from 0"),
    ("attention_plan", "cu_seqlens_q", put(2, 11), r"cu_seqlens_q: .* at most 10, got \[0, 3, 11\]"),
    ("attention_plan", "page_table", put((1, 2), -1), "page_table: expected pages from 0 .* got -1 in row 1"),
    (
        "varlen_attention",
        "seqlens_k",
        put(1, 81),
        "seqlens_k: expected at most 80 keys, 5 pages of 16, got 81",
    ),
    (
        "varlen_attention",
        "page_table",
        put((0, 4), 10),
        "page_table: expected pages from 0 to 9, got 10 in row 0",
    ),
    ("varlen_attention", "cu_seqlens_q", put(1, 4), "plan: expected one made of these cu_seqlens_q"),
    ("rope_kv_write", "positions", put(3, 40), "positions: expected values from 0 to 39, got 40"),
    ("rope_kv_write", "positions", put(3, -1), "positions: expected values from 0 to 39, got -1"),
    ("rope_kv_write", "slot_mapping", put(3, 48), "slot_mapping: expected values below 48, got 48"),
    ("linear_rope_kv_write", "positions", put(3, 40), "positions: expected values from 0 to 39, got 40"),
    ("linear_rope_kv_write", "slot_mapping", put(3, 48), "slot_mapping: expected values below 48, got 48"),
    ("linear_rope_kv_write_fp8", "positions", put(3, 40), "positions: expected values from 0 to 39, got 40"),
    ("linear_rope_kv_write_fp8", "slot_mapping", put(3, 48), "slot_mapping: expected values below 48, got"),
    ("lm_head_confidence", "probe_tokens", put(3, 50), "probe_tokens: expected values from 0 to 49, got 50"),
    ("lm_head_confidence", "probe_tokens", put(3, -1), "probe_tokens: expected values from 0 to 49, got -1"),
    (
        "pack_windows",
        "plan.query_end",
        put(0, 33),
        "plan.query_end: expected positions below 32, 2 pages of 16",
    ),
    ("pack_windows", "page_table", put((0, 1), -1), r"page_table: expected a page .* got \[0, -1\] in row 0"),
    (
        "pack_windows",
        "capacity",
        lambda x: 3,
        "capacity: expected at least the plan's [0-9]+ query tokens, got 3",
    ),
    (
        "pack_windows",
        "predict_capacity",
        lambda x: 3,
        "predict_capacity: expected at least the plan's .* got 3",
    ),
    ("pack_windows", "state.prompt_length", put(0, 4), "state.prompt_length: expected at most 3, got 4"),
    ("share_pages", "source_row", put(1, 4), "source_row: expected values from -1 to 3, got 4"),
    ("share_pages", "source_row", put(1, -2), "source_row: expected values from -1 to 3, got -2"),
    ("copy_pages", "write_end", put(0, 33), "write_end: expected values from 0 to 32, got 33"),
    ("copy_pages", "write_start", put(0, -1), "write_start: expected values from 0 to 31, got -1"),
    (
        "copy_pages",
        "write_positions",
        put((1, 18), 40),
        "write_positions: expected values from 0 to 31, got 40",
    ),
    ("copy_pages", "write_positions", put((1, 18), 17), "write_positions: expected ascending positions"),
    ("copy_pages", "page_table", put((1, 1), 8), "page_table: expected pages from 0 to 7, got 8 in row 1"),
    ("decode_policy", "predictions.target", put(0, 64), "predictions.target: .* from -1 to 63, got 64"),
    (
        "decode_policy",
        "predictions.target",
        put(0, 1),
        "predictions.target: expected each position once, got 1",
    ),
]
IDS = [f"{operator}-{path}-{message[-12:]}" for operator, path, _, message in WRONG]
# Of tensors in host memory these are seen without the switch, too.
FREE = {
    ("varlen_attention", "seqlens_k"),
    ("rope_kv_write", "positions"),
    ("rope_kv_write", "slot_mapping"),
    ("linear_rope_kv_write", "positions"),
    ("linear_rope_kv_write", "slot_mapping"),
    ("linear_rope_kv_write_fp8", "positions"),
    ("linear_rope_kv_write_fp8", "slot_mapping"),
    ("copy_pages", "page_table"),
}


def arguments(operator, device="cpu"):
    if operator == "pack_windows":
        return dict(arguments_of(operator, device), capacity=64, predict_capacity=64)
    return arguments_of(operator, device)


@pytest.mark.parametrize("operator, path, change, message", WRONG, ids=IDS)
def test_refused(operator, path, change, message):
    assert values.ENABLED
    getattr(bbk, operator)(**arguments(operator))
    with pytest.raises(ValueError, match=message):
        getattr(bbk, operator)(**with_change(arguments(operator), path, change))


@pytest.mark.parametrize("operator, path, change, message", WRONG, ids=IDS)
def test_without_the_switch_what_takes_no_wait_is_refused(operator, path, change, message, monkeypatch):
    if (operator, path) not in FREE:
        pytest.skip("looked at with BBK_CHECK=1 alone")
    wrong = with_change(arguments(operator), path, change)
    monkeypatch.setattr(values, "ENABLED", False)
    with pytest.raises(ValueError, match=message.split(",")[0].split(" got")[0].replace(" from 0 to 39", "")):
        getattr(bbk, operator)(**wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("operator, path, change, message", WRONG, ids=IDS)
def test_refused_on_a_gpu(operator, path, change, message, backend):
    with pytest.raises(ValueError, match=message):
        getattr(bbk, operator)(**with_change(arguments(operator, "cuda"), path, change), backend=backend)


def test_rows_without_queries_may_have_anything():
    wrong = arguments("varlen_attention")
    del wrong["plan"]
    wrong["cu_seqlens_q"] = torch.tensor([0, 10, 10], dtype=torch.int32)
    wrong["seqlens_k"][1], wrong["page_table"][1] = 7777, -1
    bbk.varlen_attention(**wrong)
    state, plan, _ = policy("cpu")
    table = torch.arange(8, dtype=torch.int32).view(4, 2)
    table[plan.query_start == plan.query_end] = -1
    bbk.pack_windows(state, plan, table, page_size=16, capacity=64, predict_capacity=64)


def test_rows_without_keys_are_no_part_of_a_plan():
    given = arguments("varlen_attention")
    given["seqlens_k"][1] = 0
    table = {name: given[name] for name in ("page_table", "cu_seqlens_q", "seqlens_k")}
    sizes = dict(page_size=16, num_tokens=10, num_heads=4, num_kv_heads=2)
    given["plan"] = bbk.attention_plan(**table, **sizes)
    assert not bbk.varlen_attention(**given)[3:].any()
    given["seqlens_k"][1] = 1
    with pytest.raises(ValueError, match="plan: expected one made of these cu_seqlens_q"):
        bbk.varlen_attention(**given)


def check_rope(device, backend):
    """Positions that the tables lack give NaN, slots that the cache lacks are left out, the rest is right."""
    wrong, right = (arguments_of("rope_kv_write", "cpu") for _ in range(2))
    eps = {"norm_eps": wrong.pop("norm_eps")}
    for name in ("k_cache", "v_cache"):  # the last page lies behind the cache that the operator is given
        wrong[name] = right[name] = torch.zeros(4, *wrong[name].shape[1:])
    right["positions"][2], right["slot_mapping"][5] = 0, -1
    wrong["positions"][2:4], wrong["slot_mapping"][5] = torch.tensor([40, -1]), 3 * 16 + 2
    right["positions"][3] = 0
    whole = {name: wrong[name].to(device) for name in ("k_cache", "v_cache")}
    given = {name: value.to(device) for name, value in wrong.items()} | whole | eps
    bbk.rope_kv_write(**given | {name: cache[:3] for name, cache in whole.items()}, backend=backend)
    bbk.rope_kv_write(**right, backend="reference")
    q = given["q"].cpu()
    assert q[2:4].isnan().all()
    keep = [0, 1, 4, 5, 6, 7, 8]
    torch.testing.assert_close(q[keep], right["q"][keep])
    assert not whole["k_cache"][3].any() and not whole["v_cache"][3].any()
    torch.testing.assert_close(whole["v_cache"].cpu(), right["v_cache"])


def check_keys(device, backend):
    """Keys behind the last page are left out: the same as the longest that there can be."""
    results = []
    for length in (80, 100, 10**6):
        given = arguments_of("varlen_attention", "cpu")
        del given["plan"]
        given["seqlens_k"] = torch.tensor([length, 40], dtype=torch.int32)
        given = {name: value.to(device) for name, value in given.items()}
        results.append(bbk.varlen_attention(**given, backend=backend).cpu())
        assert results[-1].isfinite().all()
        torch.testing.assert_close(results[-1], results[0], rtol=0, atol=0)


def check_packing(device, backend):
    """A query behind the row's pages, or on a page that is not there, has no slot."""
    given = arguments("pack_windows", device)
    given["plan"].query_end[0] = 40
    given["page_table"][2, 0] = -1
    packed = bbk.pack_windows(**given, backend=backend)
    behind = (packed.positions >= 32) & (packed.row_index == 0)
    assert behind.sum() == 8 and (packed.slot_mapping[behind] < 0).all()
    missing = (packed.row_index == 2) & (packed.positions < 16)
    assert missing.any() and (packed.slot_mapping[missing] < 0).all()


CHECKS = [check_rope, check_keys, check_packing]


def test_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "test_triton")


@in_interpreter
@pytest.mark.parametrize("check", CHECKS)
def test_triton_reads_and_writes_nothing_outside(check, monkeypatch):
    monkeypatch.setattr(values, "ENABLED", False)
    check(DEVICE, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("check", CHECKS)
def test_compiled_versions_read_and_write_nothing_outside(check, backend, monkeypatch):
    monkeypatch.setattr(values, "ENABLED", False)
    check("cuda", backend)


@pytest.mark.gpu
def test_the_reference_on_a_gpu_keeps_the_context(monkeypatch):
    """An index outside of a tensor would end in an assertion on the device; nothing would run after it."""
    monkeypatch.setattr(values, "ENABLED", False)
    check_rope("cuda", "reference")


@pytest.mark.gpu
def test_nothing_is_checked_while_a_graph_is_captured():
    given = arguments_of("rope_kv_write", "cuda")
    bbk.rope_kv_write(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bbk.rope_kv_write(**given)
    graph.replay()
    torch.cuda.synchronize()


@pytest.mark.parametrize(("value", "enabled"), [(None, False), ("0", False), ("1", True), ("2", None)])
def test_the_switch(value, enabled):
    environment = {name: text for name, text in os.environ.items() if name != "BBK_CHECK"}
    if value is not None:
        environment["BBK_CHECK"] = value
    code = "from blockbatch_kernels.ops import values; print(values.ENABLED)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if enabled is None:
        assert "ValueError: BBK_CHECK: expected 0 or 1, got '2'" in done.stderr
    else:
        assert done.stdout.strip() == str(enabled)
