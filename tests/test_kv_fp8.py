"""Caches in e4m3: write and attention against plain arithmetic, and compiled versions against them."""

import math

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, reference
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from operator_arguments import attention, kv_in_e4m3, rope

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# All numbers of e4m3, by their bits.
NUMBERS = torch.arange(256, dtype=torch.uint8).view(E4M3)


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def nearest(values):
    """A second witness: the nearest of all numbers of e4m3, of two the one whose last bit is 0."""
    numbers = NUMBERS.float()
    finite = numbers.nan_to_num(nan=math.inf)
    distance = (values.double()[..., None] - finite.double()).abs()
    least = distance.amin(-1, keepdim=True)
    even = (torch.arange(256) % 2 == 0) & (distance == least)
    place = torch.where(even.any(-1), even.int().argmax(-1), (distance == least).int().argmax(-1))
    return torch.where(values.isfinite(), finite[place], math.nan)


def write_arguments(dtype, device="cpu", **sizes):
    arguments = kv_in_e4m3(rope(device, dtype, **sizes))
    for name in ("k_cache", "v_cache"):
        arguments[name] = torch.full_like(arguments[name].float(), math.nan).to(E4M3)
    # Beyond what the scales leave room for, and subnormal numbers.
    size = 10.0 ** torch.linspace(-4, 4, len(arguments["v"]), device=device).view(-1, 1, 1)
    arguments["v"] = (arguments["v"].float() * size).clamp(-6e4, 6e4).to(dtype)
    arguments["v"][0, 0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    return arguments


def run_write(arguments, backend=None):
    arguments = {name: value.clone() for name, value in arguments.items()}
    bbk.rope_kv_write_fp8(**arguments, backend=backend)
    return {name: arguments[name] for name in ("q", "k_cache", "v_cache")}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_stored_is_the_nearest_number(dtype):
    torch.manual_seed(0)
    arguments = write_arguments(dtype)
    plain = {name: value.clone() for name, value in arguments.items() if not name.endswith("_scale")}
    for name in ("k_cache", "v_cache"):
        plain[name] = torch.full(plain[name].shape, math.nan, dtype=dtype)
    bbk.rope_kv_write(**plain)
    got = run_write(arguments)
    assert torch.equal(got["q"], plain["q"])
    for name, scale in (("k_cache", "k_scale"), ("v_cache", "v_scale")):
        want = nearest(plain[name].double() / arguments[scale][:, None])
        torch.testing.assert_close(got[name].float(), want, rtol=0, atol=0, equal_nan=True)
        # Free slots stay as they were.
        assert got[name].view(torch.uint8).count_nonzero() > 0
    stored = got["v_cache"].float()
    assert (stored.nan_to_num().abs() == 448).any() and ((stored != 0) & (stored.abs() < 2**-6)).any()


def attention_arguments(dtype, device="cpu", seed=0, **sizes):
    """Free slots hold NaN."""
    torch.manual_seed(seed)
    arguments = attention(device, dtype, **sizes)
    page_size = arguments["k_cache"].shape[1]
    used = torch.zeros(arguments["k_cache"].shape[:2], dtype=torch.bool, device=device)
    for table, length in zip(arguments["page_table"], arguments["seqlens_k"].tolist()):
        for key in range(length):
            used[int(table[key // page_size]), key % page_size] = True
    arguments = kv_in_e4m3(arguments)
    for name in ("k_cache", "v_cache"):
        exact = arguments[name].float().masked_fill(~used[:, :, None, None], math.nan)
        arguments[name] = exact.to(E4M3)
        assert (arguments[name].view(torch.uint8)[~used] & 0x7F == 0x7F).all()
    return arguments


def exact_attention(arguments, dtype):
    """What the caches stand for, attended to in `dtype`."""
    names = ("page_table", "cu_seqlens_q", "seqlens_k")
    caches = [
        (arguments[f"{name}_cache"].double() * arguments[f"{name}_scale"].double()[:, None]).to(dtype)
        for name in ("k", "v")
    ]
    where = (arguments[name] for name in names)
    q = arguments["q"].to(dtype)
    return reference.varlen_attention(q, *caches, *where, softmax_scale=q.shape[2] ** -0.5)


def check_attention(arguments, got):
    dtype = arguments["q"].dtype
    truth, plain = exact_attention(arguments, torch.float64), exact_attention(arguments, dtype)
    error, plain_error = ((one - truth).abs().max() for one in (got, plain))
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    assert got.dtype == dtype and error <= 2 * plain_error + rounding, (float(error), float(plain_error))
    assert not got[int(arguments["cu_seqlens_q"][-1]) :].any()


SIZES = [
    dict(),
    dict(heads=3, kv_heads=1, head_dim=32, page_size=8),
    dict(heads=4, kv_heads=4, head_dim=128),
    dict(heads=8, kv_heads=2, head_dim=96, page_size=4),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention(dtype, sizes):
    arguments = attention_arguments(dtype, **sizes)
    check_attention(arguments, bbk.varlen_attention_fp8(**arguments))


def test_scales_that_are_no_powers_of_two():
    arguments = attention_arguments(torch.float32)
    arguments["k_scale"] = arguments["k_scale"] * 1.3
    arguments["v_scale"] = arguments["v_scale"] * 0.7
    check_attention(arguments, bbk.varlen_attention_fp8(**arguments))


def test_nan_in_a_key_that_is_read_is_not_lost():
    arguments = attention_arguments(torch.float32)
    page = int(arguments["page_table"][0, 0])
    arguments["k_cache"].view(torch.uint8)[page, 3, 0, 0] = 0x7F
    got = bbk.varlen_attention_fp8(**arguments)
    assert got[:3, :2].isnan().all() and got[:3, 2:].isfinite().all() and got[3:].isfinite().all()


@pytest.mark.parametrize(
    "operator, arguments",
    [("varlen_attention_fp8", attention_arguments), ("rope_kv_write_fp8", write_arguments)],
)
@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda a: dict(k_cache=a["k_cache"].float()),
            TypeError,
            "k_cache: expected torch.float8_e4m3fn, got torch.float32",
        ),
        (lambda a: dict(v_scale=a["v_scale"][:1]), ValueError, r"v_scale: expected shape \[2\], got \[1\]"),
        (lambda a: dict(k_scale=a["k_scale"].half()), TypeError, "k_scale: expected torch.float32, got"),
        (lambda a: dict(k_scale=None), TypeError, "k_scale: expected a tensor, got NoneType"),
        (lambda a: dict(backend="cuda"), RuntimeError, "backend: cuda cannot run .*not on a GPU"),
    ],
)
def test_bad_arguments(operator, arguments, change, error, message):
    given = arguments(torch.float32)
    with pytest.raises(error, match=message):
        getattr(bbk, operator)(**{**given, **change(given)})


def test_pages_of_e4m3_move_as_they_are():
    cache = NUMBERS.repeat(2 * 2 * 4 * 4 * 2 * 8 // 256).view(2, 2, 4, 4, 2, 8).clone()
    before = cache.view(torch.uint8).clone()
    table = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    start, end = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([3, 0], dtype=torch.int32)
    bbk.copy_pages(cache, table, start, end, num_branches=2)
    assert table.tolist() == [[2, 1], [0, 1]]
    assert torch.equal(cache.view(torch.uint8)[:, :, 2], before[:, :, 0])
    with pytest.raises(ValueError, match="kv_cache: expected pairs of e4m3 .*an even head_dim"):
        bbk.copy_pages(cache[..., :7].contiguous(), table, start, end, num_branches=2)


# Compiled versions.


def check_write(backend, device, dtype, **sizes):
    torch.manual_seed(1)
    arguments = write_arguments(dtype, device, **sizes)
    want, got = run_write(arguments, "reference"), run_write(arguments, backend)
    torch.testing.assert_close(got["q"], want["q"], rtol=2**-7, atol=2**-7)
    for name in ("k_cache", "v_cache"):
        one, other = got[name].float(), want[name].float()
        if name == "v_cache" or dtype == torch.float32 and backend == "cuda":
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:  # a rotation may be rounded elsewhere, which is a step of e4m3 at most
            torch.testing.assert_close(one, other, rtol=2**-3, atol=2**-9, equal_nan=True)


@in_interpreter
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_interpreted(sizes):
    check_write("triton", DEVICE, torch.float32, **sizes)
    arguments = attention_arguments(torch.float32, DEVICE, **sizes)
    check_attention(arguments, bbk.varlen_attention_fp8(**arguments, backend="triton"))


def has_e4m3():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not has_e4m3(), reason="needs a GPU that knows e4m3")]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
class TestOnAGpu:
    pytestmark = on_a_gpu

    def test_write(self, sizes, dtype, backend):
        check_write(backend, "cuda", dtype, **sizes)

    def test_attention(self, sizes, dtype, backend):
        for seed in range(3):
            arguments = attention_arguments(dtype, "cuda", seed, **sizes)
            check_attention(arguments, bbk.varlen_attention_fp8(**arguments, backend=backend))


@pytest.mark.gpu
@pytest.mark.skipif(not has_e4m3(), reason="needs a GPU that knows e4m3")
def test_an_infinite_number_is_stored_as_nan_by_all():
    for backend in ("reference", "triton", "cuda"):
        if backend == "cuda" and not cuda.is_available(torch.device("cuda")):
            continue
        got = run_write(write_arguments(torch.bfloat16, "cuda"), backend)
        assert int(got["v_cache"].float().isnan().sum()) >= 3
