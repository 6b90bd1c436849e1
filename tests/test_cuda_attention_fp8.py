"""The compiled attention over caches in e4m3, on the packs of tests/test_cuda_attention.py."""

import pytest
import torch

from blockbatch_kernels import ops, reference
from test_cuda_attention import HALVES, MIXES, poison, problem

E4M3 = torch.float8_e4m3fn


def has_e4m3():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_e4m3(), reason="needs a GPU that knows e4m3")]


def in_e4m3(inputs):
    """The inputs with caches in e4m3 and the scales behind them; free slots hold NaN."""
    q, k_cache, v_cache, *where = inputs
    # Scales with room for all numbers: beyond 448 torch gives NaN or 448, by its version.
    powers = torch.arange(k_cache.shape[2], device="cuda") % 4
    k_scale, v_scale = 2.0 ** (powers - 6), 2.0 ** (-2 - powers)
    # As from one cache for both, whose strides they have.
    caches = torch.stack((k_cache.float() / k_scale[:, None], v_cache.float() / v_scale[:, None]))
    caches = caches.clamp(-448, 448).to(E4M3)  # as rope_kv_write_fp8 stores them; free slots stay NaN
    return q, caches[0], caches[1], k_scale, v_scale, *where


def compare(inputs, message, backend="cuda", plan=None):
    out = ops.varlen_attention_fp8(*inputs, backend=backend, plan=plan)
    q, k_cache, v_cache, k_scale, v_scale, *where = inputs
    options = dict(softmax_scale=q.shape[2] ** -0.5)
    exact = [
        cache.double() * scale.double()[:, None] for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    ]
    truth = reference.varlen_attention(q.double(), *exact, *where, **options)
    plain = reference.varlen_attention(q, *(cache.to(q.dtype) for cache in exact), *where, **options)
    rounding = torch.finfo(q.dtype).eps * truth.abs().max()
    plain_error, error = (plain - truth).abs().max(), (out - truth).abs().max()
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(), message
    assert error <= 2 * plain_error + rounding, (message, float(error), float(plain_error))
    assert not out[int(where[1][-1]) :].any(), message
    return out


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (14, 2)], ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 8])
def test_packs(monkeypatch, page_size, heads, head_dim, dtype, backend):
    for number, (queries, lengths) in enumerate(MIXES):
        for sharing in (0.0, 1.0):
            options = dict(heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
            inputs = in_e4m3(problem(queries, lengths, sharing=sharing, seed=number, **options))
            with monkeypatch.context() as patch:
                poison(patch)
                compare(inputs, (queries, lengths, sharing), backend)


def plan_of(inputs, **options):
    q, k_cache, *_, page_table, bounds, seqlens = inputs
    return ops.attention_plan(
        page_table,
        bounds,
        seqlens,
        page_size=k_cache.shape[1],
        num_tokens=len(q),
        num_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        backend="cuda",
        **options,
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_plans_of_both_kinds(head_dim):
    """Units, tiles whose keys are cut in pieces, and tiles of whole rows."""
    several = in_e4m3(problem(*MIXES[4], heads=(8, 8), head_dim=head_dim, sharing=1.0))
    compare(several, "units", plan=plan_of(several))
    compare(several, "tiles", plan=plan_of(several, fixed_cut=True))
    whole = in_e4m3(problem([1280, 1100], [1280, 1100], heads=(8, 8), head_dim=head_dim, sharing=0.0))
    compare(whole, "a whole row", plan=plan_of(whole))
    compare(whole, "fixed", plan=plan_of(whole, fixed_cut=True))


def test_many_calls_give_the_same_bits():
    inputs = in_e4m3(problem([4, 8, 16, 32, 64, 128], [1280] * 6, heads=(32, 32), head_dim=128, sharing=0.5))
    plan = plan_of(inputs)
    first = compare(inputs, "first", plan=plan)
    for _ in range(50):
        assert torch.equal(ops.varlen_attention_fp8(*inputs, backend="cuda", plan=plan), first)


def test_a_graph_gives_the_same_bits():
    inputs = in_e4m3(problem([8, 24], [700, 650], heads=(8, 8), head_dim=128))
    plan = plan_of(inputs)
    expected = ops.varlen_attention_fp8(*inputs, backend="cuda", plan=plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.varlen_attention_fp8(*inputs, backend="cuda", plan=plan)
    out.fill_(float("nan"))
    graph.replay()
    assert expected.isfinite().all() and torch.equal(out, expected)


def test_caches_that_are_no_vectors():
    """Strides of K and V that differ, and rows that do not begin at 16 bytes."""
    q, k_cache, v_cache, *rest = in_e4m3(problem([5, 9], [70, 40], heads=(4, 4), head_dim=64))
    wide = torch.zeros(*v_cache.shape[:3], 96, device="cuda").to(E4M3)
    other = wide[..., :64]
    other.copy_(v_cache)
    odd = torch.zeros(k_cache.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view(E4M3)
    odd = odd.view(k_cache.shape)
    odd.copy_(k_cache)
    compare((q, k_cache, other, *rest), "strides")
    compare((q, odd, v_cache, *rest), "addresses")


@pytest.mark.parametrize("fixed_cut", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_comes_out_as_it_is(dtype, fixed_cut):
    """Of a single key's value attention makes itself: all 256 bytes, over two heads."""
    every = torch.arange(256, dtype=torch.uint8, device="cuda").view(1, 1, 2, 128)
    v_cache = torch.zeros(1, 16, 2, 128, dtype=torch.uint8, device="cuda")
    v_cache[:, :1] = every
    where = (torch.zeros(1, 1), torch.tensor([0, 1]), torch.tensor([1]))
    where = [tensor.to("cuda", torch.int32) for tensor in where]
    one = torch.ones(2, device="cuda")
    q = torch.ones(1, 4, 128, dtype=dtype, device="cuda")
    k_cache = torch.ones(1, 16, 2, 128, device="cuda").to(E4M3)
    inputs = (q, k_cache, v_cache.view(E4M3), one, one, *where)
    out = ops.varlen_attention_fp8(*inputs, backend="cuda", plan=plan_of(inputs, fixed_cut=fixed_cut))
    expected = every.view(2, 128).view(E4M3).to(dtype).repeat_interleave(2, 0)
    torch.testing.assert_close(out[0], expected, rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() == 4  # two bytes stand for NaN
