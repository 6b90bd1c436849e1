"""Which backend an operator takes by default, and that nothing it would refuse is handed to it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import reference, tuning
from blockbatch_kernels.ops import dispatch
from operator_arguments import PARAMS, attention

STEP = dict(num_tokens=252, num_keys=1280, head_dim=128, element_size=2)
SOURCES = Path(__file__).parent.parent / "csrc"


@pytest.mark.parametrize(
    "change, first",
    [
        ({}, "triton"),
        (dict(num_tokens=1024), "triton"),
        (dict(num_tokens=1025), "cuda"),
        (dict(num_tokens=1025, head_dim=64), "cuda"),
        (dict(num_keys=4352), "triton"),
        (dict(num_tokens=1280, element_size=4), "triton"),  # fp32 has no tensor cores in CUDA C++
        (dict(num_tokens=1280, head_dim=96), "triton"),
        (dict(units=1), "cuda"),
        (dict(units=1, element_size=4), "triton"),
        (dict(units=1, head_dim=96), "triton"),
    ],
)
def test_attention_by_shape(change, first):
    order = tuning.preference("varlen_attention", **STEP | change)
    assert order[0] == first and sorted(order) == ["cuda", "triton"]


@pytest.mark.parametrize(
    "change, first", [({}, "cuda"), (dict(element_size=4), "triton"), (dict(head_dim=96), "triton")]
)
def test_attention_over_e4m3_by_shape(change, first):
    order = tuning.preference("varlen_attention_fp8", **STEP | change)
    assert order[0] == first and sorted(order) == ["cuda", "triton"]


@pytest.mark.parametrize(
    "change, planned",
    [
        (dict(distinct_rows=1), True),
        (dict(distinct_rows=3, pages_per_row=300), True),
        (dict(distinct_rows=6), False),  # 120 MiB of keys and values
        (dict(distinct_rows=6, num_tokens=252), True),  # windows
        (dict(distinct_rows=6, pages_per_row=32), True),  # which stay in L2
        (dict(distinct_rows=6, num_heads=28, num_kv_heads=4), True),
        (dict(distinct_rows=6, num_tokens=252, e4m3=True), False),  # windows over caches in e4m3
        (dict(distinct_rows=3, num_tokens=252, e4m3=True), True),
        (dict(distinct_rows=1, page_size=8), False),
        (dict(distinct_rows=1, num_heads=128, num_kv_heads=1), False),  # a token fills more than a block
    ],
)
def test_units_by_shape(monkeypatch, change, planned):
    sizes = dict(num_heads=32, num_kv_heads=32, page_size=16, pages_per_row=80, num_tokens=7680) | change
    device = torch.device("cuda")
    monkeypatch.setattr(tuning.attention, "_runs_units", lambda device: True)
    assert tuning.plans_units(**sizes, device=device) == planned
    monkeypatch.setattr(tuning.attention, "_runs_units", lambda device: False)
    assert not tuning.plans_units(**sizes, device=device)


def test_limits_are_those_of_the_sources():
    def constant(file, name):
        return int(re.search(rf"{name} = (\d+);", (SOURCES / file).read_text()).group(1))

    branches, eos = constant("decode/policy.h", "kMaxBranches"), constant("decode/policy.h", "kMaxEosTokens")
    for op in ("initial_plan", "decode_policy"):
        assert tuning.preference(op, num_branches=branches, num_eos_tokens=eos) == ("cuda", "triton")
        assert tuning.preference(op, num_branches=branches + 1, num_eos_tokens=1) == ("triton",)
        assert tuning.preference(op, num_branches=1, num_eos_tokens=eos + 1) == ("triton",)
    pages = constant("decode/pages.h", "kMaxPageBranches")
    assert tuning.preference("copy_pages", num_branches=pages)[0] == "cuda"
    assert tuning.preference("copy_pages", num_branches=pages + 1) == ("triton",)
    head_dim = constant("attention/attention.cu", "kMaxHeadDim")
    assert len(tuning.preference("varlen_attention", head_dim=head_dim)) == 2
    assert tuning.MAX_HEAD_DIM == head_dim
    assert tuning.preference("varlen_attention", head_dim=head_dim + 1) == ()


@pytest.fixture
def chosen(monkeypatch):
    """What `_backend` picks for a tensor on a GPU where both compiled backends run every operator."""

    def backend(name, available):
        operators = ("varlen_attention", "attention_plan", "decode_policy")
        reason = None if available else "not here"
        return SimpleNamespace(
            __name__=name, why_unavailable=lambda device: reason, **dict.fromkeys(operators, object())
        )

    def choose(op, *, cuda=True, triton=True, **options):
        modules = {"reference": reference, "triton": backend("triton", triton), "cuda": backend("cuda", cuda)}
        monkeypatch.setattr(dispatch, "MODULES", modules)
        example = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
        module = dispatch.module_for(None, op, example, **options)
        return next(name for name, other in modules.items() if other is module)

    return choose


def test_the_next_backend_takes_what_one_refuses(chosen):
    long = STEP | dict(num_tokens=1280)
    assert chosen("varlen_attention", **long) == "cuda"
    assert chosen("varlen_attention", **long, cuda=False) == "triton"
    assert chosen("varlen_attention", **long, excluded=("cuda",)) == "triton"
    assert chosen("varlen_attention", **STEP, triton=False) == "cuda"
    assert chosen("varlen_attention", **STEP | dict(head_dim=320)) == "reference"
    assert chosen("decode_policy", num_branches=33, num_eos_tokens=1) == "triton"
    assert chosen("decode_policy", num_branches=33, num_eos_tokens=1, triton=False) == "reference"


@pytest.mark.parametrize("name", ["cuda", "triton", None])
def test_attention_without_a_plan_makes_one(monkeypatch, name):
    """The same as with the plan of the same backend."""
    inputs, seen = attention("cpu", torch.float32), []

    def varlen_attention(*tensors, plan, **options):
        seen.append(plan)
        return reference.varlen_attention(*tensors, **options)

    module = SimpleNamespace(attention_plan=reference.attention_plan, varlen_attention=varlen_attention)

    def backend(asked, op, example, **sizes):
        assert asked == name
        return module

    monkeypatch.setattr(dispatch, "module_for", backend)
    out = bbk.varlen_attention(**inputs, backend=name)
    assert torch.equal(out, bbk.varlen_attention(**inputs, plan=seen[0], backend=name))
    tensors = [inputs[key] for key in ("page_table", "cu_seqlens_q", "seqlens_k")]
    want = bbk.attention_plan(
        *tensors, page_size=16, num_tokens=10, num_heads=4, num_kv_heads=2, backend=name
    )
    for got, expected in zip(seen[0], want):
        assert got == expected if isinstance(got, int) else torch.equal(got, expected)
    assert seen[1] is seen[0]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, scale, spread", [(320, 0.1, False), (128, -0.1, False), (128, 0.1, True)])
def test_the_default_attention_runs_what_a_backend_refuses(head_dim, scale, spread):
    inputs = attention("cuda", torch.bfloat16, head_dim=head_dim)
    inputs["q"] = torch.randn(1100, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    if spread:
        inputs["k_cache"] = torch.stack((inputs["k_cache"],) * 2, dim=-1)[..., 0]
    got = bbk.varlen_attention(**inputs, softmax_scale=scale)
    want = bbk.varlen_attention(**inputs, softmax_scale=scale, backend="reference")
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_the_default_policy_runs_many_branches():
    ints = dict(dtype=torch.int32, device="cuda")
    sizes = torch.full((40,), 4, **ints)
    state = bbk.BranchState.create(torch.ones(1, 3, **ints), torch.full((1,), 3, **ints), sizes, 16, 49)
    got = bbk.initial_plan(state, PARAMS)
    want = bbk.initial_plan(state, PARAMS, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(got, want))
