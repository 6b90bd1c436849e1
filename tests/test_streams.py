"""Operators on several streams and from several threads at once."""

import threading

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels.cuda import attention
from operator_arguments import arguments_of

INTS = dict(dtype=torch.int32)


@pytest.fixture
def plan(monkeypatch):
    """A plan with `arrivals`, on a machine that may have no GPU, and the calls of `record_stream`."""
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    made = arguments_of("varlen_attention")["plan"]
    return made._replace(arrivals=torch.zeros(8, **INTS)), recorded


def test_a_plan_serves_its_first_stream_and_lends_others_zeros(plan):
    made, recorded = plan
    assert (
        attention._arrivals_of(made, 5) is made.arrivals and attention._arrivals_of(made, 5) is made.arrivals
    )
    assert recorded == []
    made.arrivals[:] = 1  # as if a call were on its way
    other, third = attention._arrivals_of(made, 6), attention._arrivals_of(made, 7)
    assert not other.any() and not third.any() and other.data_ptr() != third.data_ptr()
    assert recorded == ["current"] * 16
    assert attention._arrivals_of(made, 5) is made.arrivals


def test_threads_agree_whose_a_plan_is(plan):
    made, _ = plan
    found, start = [], threading.Barrier(8)

    def ask(stream):
        start.wait()
        found.append(attention._arrivals_of(made, stream) is made.arrivals)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False] * 7 + [True]


def windows(seed):
    """Attention of six windows over 1280 keys, in the shape whose tiles are shared by processors."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    table = torch.arange(480, **INTS, device="cuda").view(6, 80)
    table[:, :60] = table[0, :60]
    bounds = torch.arange(0, 253, 42, **INTS, device="cuda")
    tensors = dict(page_table=table, cu_seqlens_q=bounds)
    tensors["seqlens_k"] = torch.full((6,), 1280, **INTS, device="cuda")
    return dict(
        q=rand(252, 32, 128), k_cache=rand(480, 16, 32, 128), v_cache=rand(480, 16, 32, 128), **tensors
    )


def plan_of(tensors):
    names = ("page_table", "cu_seqlens_q", "seqlens_k")
    sizes = dict(page_size=16, num_tokens=252, num_heads=32, num_kv_heads=32)
    return bbk.attention_plan(*(tensors[name] for name in names), **sizes, backend="cuda")


@pytest.mark.gpu
def test_one_plan_on_several_streams_at_once(unchecked):
    first, second = windows(1), windows(2)
    made = plan_of(first)
    calls = (first, second, first)
    expected = [bbk.varlen_attention(**one, plan=made, backend="cuda") for one in calls]
    streams = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    results = [], [], []
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, tensors, kept in zip(streams, calls, results):
            with torch.cuda.stream(stream):
                kept.append(bbk.varlen_attention(**tensors, plan=made, backend="cuda"))
    torch.cuda.synchronize()
    for kept, right in zip(results, expected):
        assert all(torch.equal(one, right) for one in kept)


@pytest.mark.gpu
def test_one_plan_from_two_threads(unchecked):
    tensors = windows(3)
    made = plan_of(tensors)
    expected = bbk.varlen_attention(**tensors, plan=made, backend="cuda")
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                got = bbk.varlen_attention(**tensors, plan=made, backend="cuda")
                wrong.append(not torch.equal(got, expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 200 and not any(wrong)


@pytest.mark.gpu
def test_a_plan_is_kept_while_another_stream_reads_it(unchecked):
    """Given back by the thread right behind the launch, and its memory filled by the next to ask for it."""
    tensors = windows(4)
    expected = bbk.varlen_attention(**tensors, plan=plan_of(tensors), backend="cuda")
    side = torch.cuda.Stream()
    for _ in range(20):
        made = plan_of(tensors)
        bbk.varlen_attention(**tensors, plan=made, backend="cuda")  # the current stream's
        size = made.tiles.untyped_storage().nbytes()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            got = bbk.varlen_attention(**tensors, plan=made, backend="cuda")
        del made
        torch.full((size // 4,), 2**30, **INTS, device="cuda")
        side.synchronize()
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_copies_that_an_operator_makes_outlive_its_launch(backend, unchecked):
    """Each tensor that a kernel cannot read where it is gets copied; the copies are given back at once."""
    side = torch.cuda.Stream()
    x = torch.randn(512, 1024, device="cuda").t()[:, ::2]
    weight = torch.randn(1024, device="cuda")[::4].contiguous()
    weight = torch.stack((weight, weight), 1)[:, 0]
    expected = bbk.rms_norm(x, weight, eps=1e-6, backend="reference")
    torch.cuda.synchronize()
    for _ in range(30):
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000)
            got = bbk.rms_norm(x, weight, eps=1e-6, backend=backend)
            for _ in range(4):
                torch.full((x.numel(),), float("nan"), device="cuda")
                torch.full((weight.numel(),), float("nan"), device="cuda")
        side.synchronize()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
