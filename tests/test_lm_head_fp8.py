"""The LM head in e4m3: the reference against plain arithmetic, backends and ranks against the reference."""

import math

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import tuning
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from sampling_cases import every_rule, heads_of
from test_quantized import FLOATS, back, quantised
from test_sharded_head import assert_same, by_ranks

HALVES = (torch.bfloat16, torch.float16)


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def random_head(rows, vocab_size, dim, dtype, device="cpu", seed=0):
    """Hidden states whose logits spread over some units, and a weight of random numbers in e4m3."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, device=device) * 3
    weight = torch.randn(vocab_size, dim, generator=generator, device=device) * dim**-0.5
    return hidden.to(dtype), *bbk.quantize_rows(weight, backend="reference")


def whole_head(rows, vocab_size, dim, dtype, device="cpu", seed=0):
    """Small whole numbers and scales of powers of two: logits of any order of the sums, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, dim), generator=generator)
    hidden[:, 0] = 2
    weight = torch.randint(-1, 2, (vocab_size, dim), generator=generator).float()
    scale = 2.0 ** torch.randint(-2, 0, (vocab_size,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, torch.float8_e4m3fn), scale.to(device)


def sampled(rows, vocab_size, device):
    """What `lm_head_sample_fp8` takes behind the weight, for every kind of rules."""
    request = torch.arange(rows, device=device).int() % 4
    positions = torch.arange(rows, device=device).int() * 3
    for _, rules in every_rule(device, vocab_size):
        yield rules, request, positions


def calls(rows, vocab_size, device, seed=0, *, with_drawn=True):
    """Operator, what it takes behind the weight, and options; `with_drawn`: of `lm_head_sample` too."""
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randint(0, vocab_size, (rows,), generator=generator, dtype=torch.int32).to(device)
    for suppress in (None,) if vocab_size == 1 else (None, 0, vocab_size - 1):
        for probe_tokens in (None, probes):
            options = dict(probe_tokens=probe_tokens, suppress_token=suppress)
            yield "lm_head_confidence", (), options
        yield "lm_head_likely", (), dict(suppress_token=suppress)
    if not with_drawn:
        return
    suppress = None if vocab_size == 1 else vocab_size - 1
    for place, drawn in enumerate(sampled(rows, vocab_size, device)):
        confidence = bbk.CONFIDENCES[(place + seed) % len(bbk.CONFIDENCES)]
        options = dict(probe_tokens=probes, suppress_token=suppress, confidence=confidence)
        yield "lm_head_sample", drawn, options


# The reference.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_said_is_that_of_the_logits_of_linear_fp8(dtype):
    """Bit for bit what the operators without e4m3 say of these logits."""
    for rows, vocab_size, dim in ((1, 1, 1), (7, 50, 33), (260, 43, 16), (5, 203, 100)):
        hidden, weight, scale = random_head(rows, vocab_size, dim, dtype, seed=rows)
        logits = bbk.linear_fp8(*bbk.quantize_rows(hidden), weight, scale, out_dtype=dtype)
        for name, drawn, options in calls(rows, vocab_size, "cpu", rows):
            got = getattr(bbk, f"{name}_fp8")(hidden, weight, scale, *drawn, **options)
            want = getattr(bbk, name)(*heads_of(logits), *drawn, **options)
            for one, other in zip(got, want, strict=True):
                assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_double(dtype):
    hidden, weight, scale = random_head(40, 300, 96, dtype)
    rows = back(*bbk.quantize_rows(hidden))
    logits = rows @ back(weight, scale).T
    spread = logits.amax() - logits.amin()
    assert spread > 10
    probes = torch.arange(40, dtype=torch.int32)
    top, confidence, probe = bbk.lm_head_confidence_fp8(hidden, weight, scale, probe_tokens=probes)
    rounding = torch.finfo(dtype).eps * logits.abs().amax() + 1e-5
    missed = logits.amax(-1) - logits.gather(1, top.long()[:, None])[:, 0]
    assert (missed <= 2 * rounding).all()
    truth = logits.softmax(-1)
    torch.testing.assert_close(confidence.double(), truth.amax(-1), rtol=float(3 * rounding), atol=1e-6)
    chosen = truth.gather(1, probes.long()[:, None])[:, 0]
    torch.testing.assert_close(probe.double(), chosen, rtol=float(3 * rounding), atol=1e-6)


def test_rows_without_a_softmax():
    hidden, weight, scale = random_head(5, 60, 32, torch.bfloat16)
    hidden[1, 3], hidden[2, 5], hidden[3, 0] = math.nan, math.inf, -math.inf
    broken = [False, True, True, True, False]
    assert bbk.lm_head_confidence_fp8(hidden, weight, scale)[1].isnan().tolist() == broken
    assert bbk.lm_head_likely_fp8(hidden, weight, scale)[1].isnan().tolist() == broken
    rules, request, positions = next(sampled(5, 60, "cpu"))
    drawn = bbk.lm_head_sample_fp8(hidden, weight, scale, rules, request, positions)
    assert drawn[1].isnan().tolist() == broken


def test_a_row_does_not_depend_on_the_others():
    hidden, weight, scale = random_head(300, 50, 48, torch.bfloat16)
    whole = bbk.lm_head_confidence_fp8(hidden, weight, scale)
    few = bbk.lm_head_confidence_fp8(hidden[255:258], weight, scale)
    assert torch.equal(whole[0][255:258], few[0]) and torch.equal(whole[1][255:258], few[1])


@pytest.mark.parametrize("backend", [None, "reference", "triton", "cuda"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(hidden=torch.ones(2, 0), weight=torch.ones(9, 0).to(torch.float8_e4m3fn)), ValueError,
         "hidden: expected at least one column, got none"),
        (dict(suppress_token=9), ValueError, "suppress_token: expected an id below 9, got 9"),
        (dict(suppress_token=-1), ValueError, "suppress_token: expected an id below 9, got -1"),
        (dict(weight=torch.ones(9, 16)), TypeError, "weight: expected torch.float8_e4m3fn, got"),
        (dict(weight_scale=torch.ones(8)), ValueError, r"weight_scale: expected shape \[9\], got \[8\]"),
        (dict(weight_scale=torch.ones(9).half()), TypeError, "weight_scale: expected torch.float32, got"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change, error, message, backend):
    given = dict(hidden=torch.ones(2, 16), weight=quantised(9, 16)[0], weight_scale=torch.ones(9)) | change
    for name in ("lm_head_confidence_fp8", "lm_head_likely_fp8"):
        with pytest.raises(error, match=message):
            getattr(bbk, name)(**given, backend=backend)
    rules, request, positions = next(sampled(2, 9, "cpu"))
    given |= dict(rules=rules, request=request, positions=positions)
    with pytest.raises(error, match=message):
        bbk.lm_head_sample_fp8(**given, backend=backend)
    if change.get("suppress_token") == 9:
        with pytest.raises(ValueError, match="confidence: expected one of probability, .*, got 'sure'"):
            bbk.lm_head_sample_fp8(**given | dict(suppress_token=1, confidence="sure"), backend=backend)


def test_gpus_without_e4m3_have_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    hidden = type("Hidden", (), dict(is_cuda=True, device=torch.device("cuda", 0)))()
    choose = bbk.ops.dispatch.module_for_e4m3
    assert choose(None, "lm_head_confidence_fp8", hidden) is bbk.reference
    with pytest.raises(
        RuntimeError, match="cuda cannot run lm_head_confidence_fp8: e4m3 needs compute capab"
    ):
        choose("cuda", "lm_head_confidence_fp8", hidden)


# Compiled versions.


def check(backend, rows, vocab_size, dim, dtype, changed=lambda tensor: tensor, *, with_drawn=True):
    """What a backend says against the reference, of logits that both have exactly."""
    hidden, weight, scale = whole_head(rows, vocab_size, dim, dtype, DEVICE, seed=vocab_size)
    head = changed(hidden), changed(weight), scale
    for name, drawn, options in calls(rows, vocab_size, DEVICE, with_drawn=with_drawn):
        want = getattr(bbk, f"{name}_fp8")(hidden, weight, scale, *drawn, **options, backend="reference")
        got = getattr(bbk, f"{name}_fp8")(*head, *drawn, **options, backend=backend)
        for one, other in zip(got, want, strict=True):
            if other is None or not other.is_floating_point():
                assert one is other is None or torch.equal(one, other), (name, options)
            else:
                torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)


def turned(matrix):
    """The same numbers, the elements of a row apart from each other."""
    return matrix.t().contiguous().t()


@in_interpreter
@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_triton(monkeypatch, part_bytes, poisoned):
    monkeypatch.setattr(tuning, "TRITON_LM_HEAD", tuning.TritonLmHead(part_bytes, block=64, num_warps=4))
    for rows, vocab_size, dim in ((3, 1, 5), (5, 7, 16), (4, 203, 24)):
        check("triton", rows, vocab_size, dim, torch.float32)
    empty = bbk.lm_head_likely_fp8(*whole_head(0, 9, 4, torch.float32), backend="triton")
    assert [tuple(one.shape) for one in empty] == [(0,), (0,), (0, 4), (0, 4)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_smallest(backend):
    """For a run under compute-sanitizer."""
    hidden, weight, scale = whole_head(5, 4104, 64, torch.bfloat16, "cuda")
    probes = torch.arange(5, dtype=torch.int32, device="cuda")
    options = dict(probe_tokens=probes, suppress_token=3)
    want = bbk.lm_head_confidence_fp8(hidden, weight, scale, **options, backend="reference")
    got = bbk.lm_head_confidence_fp8(hidden, weight, scale, **options, backend=backend)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1:], want[1:], rtol=2e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_on_a_gpu(backend, dtype, monkeypatch, poisoned):
    """Sizes that the extension's tiles, the library and neither of them take.

    Behind its logits `lm_head_sample_fp8` is `lm_head_sample`: tokens are drawn at some of the sizes. Triton
    compiles a version for each kind of rules and each dtype, so that it draws in one dtype.
    """
    draws = backend == "cuda" or dtype == torch.bfloat16
    for rows, vocab_size, dim in (
        (1, 1, 16), (5, 7, 33), (33, 4096, 64), (128, 4104, 64), (252, 4096, 64), (65, 5003, 48),
        (300, 4112, 64), (520, 4097, 32),
    ):  # fmt: skip
        with_drawn = draws and vocab_size in ((4104, 5003, 4112) if backend == "cuda" else (5003,))
        check(backend, rows, vocab_size, dim, dtype, with_drawn=with_drawn)
    monkeypatch.setattr(tuning, "LM_HEAD_LOGITS_BYTES", 1)
    monkeypatch.setattr(tuning, "TRITON_LM_HEAD", tuning.TritonLmHead(1, block=4096, num_warps=8))
    check(backend, 9, 12296, 64, dtype, with_drawn=draws)
    check(backend, 9, 4104, 64, dtype, turned, with_drawn=False)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "rows, vocab_size", [(32, 126464), (128, 126464), (252, 126464), (252, 63232), (600, 152064)]
)
def test_of_a_large_vocabulary_and_inside_a_graph(backend, dtype, rows, vocab_size, poisoned):
    hidden, weight, scale = random_head(rows, vocab_size, 1024, dtype, "cuda")
    other = random_head(rows, 8, 1024, dtype, "cuda", seed=1)[0]
    probes = torch.arange(rows, dtype=torch.int32, device="cuda")

    def run():
        return bbk.lm_head_confidence_fp8(hidden, weight, scale, probe_tokens=probes, backend=backend)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    hidden.copy_(other)
    graph.replay()
    again = run()
    for ours, replayed in zip(again, captured, strict=True):
        assert torch.equal(ours, replayed)
    want = bbk.lm_head_confidence_fp8(hidden, weight, scale, probe_tokens=probes, backend="reference")
    same = captured[0] == want[0]
    assert same.float().mean() > 0.9  # the products round their logits apart now and then
    torch.testing.assert_close(captured[1][same], want[1][same], rtol=0.1, atol=1e-4)
    torch.testing.assert_close(captured[2], want[2], rtol=0.1, atol=1e-4)


# A vocabulary that is dealt out.


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_ranks(size, dtype):
    """Parts of uneven sizes; every rank says the same."""
    for seed in range(6):
        hidden, weight, scale = whole_head(9, 37, 24, dtype, seed=seed)
        for name, about, options in calls(9, 37, "cpu", seed):
            want = getattr(bbk, f"{name}_fp8")(hidden, weight, scale, *about, **options)
            for found in by_ranks(f"{name}_fp8", hidden, weight, size, scale, about, **options):
                assert_same(found, want)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "cuda", "triton", "reference"])
@pytest.mark.parametrize("vocab_size, rows", [(37, 9), (9001, 65), (60_032, 128), (60_032, 300)])
def test_by_ranks_on_a_gpu(backend, vocab_size, rows, poisoned):
    hidden, weight, scale = whole_head(rows, vocab_size, 64, torch.bfloat16, "cuda")
    for name, about, options in calls(rows, vocab_size, "cuda"):
        want = getattr(bbk, f"{name}_fp8")(hidden, weight, scale, *about, **options, backend="reference")
        for found in by_ranks(f"{name}_fp8", hidden, weight, 2, scale, about, **options, backend=backend):
            assert_same(found, want)
