"""lm_head_likely: the reference against its definition, and the backends against the reference."""

import math

import pytest
import torch

import blockbatch_kernels as bbk
import fast_interpreter
from blockbatch_kernels import reference, triton, tuning
from blockbatch_kernels.shapes import LEAST_LIKELY, NUM_LIKELY
from float_errors import DTYPES
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from triton_floats import poisoned

pytest.importorskip("triton", reason="the package triton is not installed")
if triton.interpreted():
    fast_interpreter.replace_language_once()


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def whole_numbers(rows, vocab_size, dim, dtype, seed, device="cpu", scale=1.0):
    """Small integers, whose products every order of summation gives exactly: many ties, the same logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, dim), generator=generator).to(device, dtype) * scale
    weight = torch.randint(-1, 2, (vocab_size, dim), generator=generator).to(device, dtype)
    return hidden, weight


def check(hidden, weight, suppress, backend, rtol=1e-5):
    """Every result against the definition in fp64; the likely tokens in their order."""
    with poisoned():
        got = bbk.lm_head_likely(hidden, weight, suppress_token=suppress, backend=backend)
    top, confidence, token, probability = (tensor.cpu() for tensor in got)
    logits = (hidden.float() @ weight.float().T).to(hidden.dtype).double().cpu()
    without = logits.clone()
    if suppress is not None:
        without[:, suppress] = -math.inf
    assert torch.equal(top.long(), without.max(-1)[1])
    torch.testing.assert_close(confidence, without.softmax(-1).amax(-1).float(), rtol=rtol, atol=0)
    ranked = torch.sort(logits, dim=-1, descending=True, stable=True)[1][:, :NUM_LIKELY]
    expected = logits.softmax(-1).gather(1, ranked)
    count = ranked.shape[1]
    assert (token[:, count:] == -1).all() and (probability[:, count:] == 0).all()
    token, probability = token[:, :count], probability[:, :count]
    at_bound = (expected - LEAST_LIKELY).abs() < 1e-6  # there rounding decides
    is_likely = expected > LEAST_LIKELY
    wanted = torch.where(is_likely, ranked, -1).int()
    assert torch.equal(token[~at_bound], wanted[~at_bound])
    assert ((token == ranked) | (token == -1))[at_bound].all()
    wanted = torch.where(token >= 0, expected, 0.0).float()
    torch.testing.assert_close(probability, wanted, rtol=rtol, atol=0)
    return int((token >= 0).sum())


SIZES = [(7, 203), (5, 3), (4, 64), (6, 65), (3, 1), (2, 500)]


@pytest.mark.parametrize("rows, vocab_size", SIZES)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_reference(rows, vocab_size, scale):
    hidden, weight = whole_numbers(rows, vocab_size, 12, torch.float32, vocab_size, scale=scale)
    for suppress in (None,) if vocab_size == 1 else (None, 0, vocab_size - 1):
        check(hidden, weight, suppress, "reference")


def test_there_are_up_to_four():
    hidden, found = torch.eye(5), set()
    for number in range(1, 6):
        weight = torch.full((20, 5), -9.0)
        weight[:number] = 0.0
        weight[7] = 30.0  # a MASK that holds nearly all of it
        likely = bbk.lm_head_likely(hidden, weight, suppress_token=7)
        assert likely[2][0].tolist() == [7, -1, -1, -1] and likely[0][0] == 0
        likely = bbk.lm_head_likely(hidden, torch.cat((weight[:7], weight[8:])))
        found.add(int((likely[2][0] >= 0).sum()))
    assert found == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_reference_takes_special_values_as_softmax_does(special):
    weight = torch.tensor([[1.0], [special], [3.0]])
    got = bbk.lm_head_likely(torch.ones(1, 1), weight)
    if special == -math.inf:
        assert got[2][0].tolist() == [2, -1, -1, -1]
    else:
        assert got[0].item() == 1 and got[2].max() == -1 and got[3].max() == 0


@in_interpreter
@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_triton(monkeypatch, part_bytes):
    monkeypatch.setattr(tuning, "TRITON_LM_HEAD", tuning.TritonLmHead(part_bytes, block=64, num_warps=4))
    found = 0
    for rows, vocab_size, suppress in ((7, 203, 202), (5, 3, 0), (4, 64, None), (6, 65, 64), (3, 1, None)):
        hidden, weight = whole_numbers(rows, vocab_size, 12, torch.float32, rows, DEVICE)
        found += check(hidden, weight, suppress, "triton")
    assert found > 10
    assert triton.lm_head_likely(torch.zeros(0, 4), torch.zeros(9, 4))[2].shape == (0, NUM_LIKELY)


@in_interpreter
def test_triton_takes_special_values_as_the_reference():
    assert_special_values_are_the_references("triton")


def assert_special_values_are_the_references(backend):
    for special in (math.nan, math.inf, -math.inf):
        for places in ([0], [2, 70], range(100)):
            weight = torch.linspace(0, 9, 100, device=DEVICE).unsqueeze(1)
            weight[list(places)] = special
            hidden = torch.ones(2, 1, device=DEVICE)
            for suppress in (None, 2):
                expected = reference.lm_head_likely(hidden, weight, suppress_token=suppress)
                got = bbk.lm_head_likely(hidden, weight, suppress_token=suppress, backend=backend)
                assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])
                for ours, theirs in ((got[1], expected[1]), (got[3], expected[3])):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_special_values_on_a_gpu(backend):
    assert_special_values_are_the_references(backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(backend, dtype, monkeypatch):
    found = 0
    for rows, vocab_size in ((1, 1), (5, 7), (9, 50), (33, 4096), (5, 4097), (65, 5003), (600, 12289)):
        for scale in (0.25, 0.5, 1.0):
            hidden, weight = whole_numbers(rows, vocab_size, 16, dtype, vocab_size, "cuda", scale)
            for suppress in (None,) if vocab_size == 1 else (None, 0, vocab_size - 1):
                found += check(hidden, weight, suppress, backend)
    assert found > 100
    # A row of the weight that is not aligned, and views.
    hidden, weight = whole_numbers(8, 5003, 16, dtype, 3, "cuda", 0.5)
    wide = torch.cat((weight, weight), 1)[:, 16:]
    check(hidden.t().contiguous().t(), wide, 3, backend)
    if backend == "cuda":
        monkeypatch.setattr(tuning, "LM_HEAD_LOGITS_BYTES", 1)
        check(hidden, weight, 3, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_of_a_large_vocabulary_and_inside_a_graph(backend):
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(96, 256, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(152064, 256, generator=generator, device="cuda") * 0.3).bfloat16()

    def run():
        return bbk.lm_head_likely(hidden * 2, weight, suppress_token=151666, backend=backend)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    hidden.copy_(torch.randn(96, 256, generator=generator, device="cuda"))
    graph.replay()
    expected = bbk.lm_head_likely(hidden * 2, weight, suppress_token=151666, backend="reference")
    again = run()
    for ours, replayed in zip(again, captured, strict=True):
        assert torch.equal(ours, replayed)
    same = captured[0] == expected[0]
    assert same.float().mean() > 0.9  # the products round their logits apart now and then
    both = same.unsqueeze(1) & (captured[2] == expected[2])
    assert both.float().mean() > 0.9 and int((expected[2] >= 0).sum()) > 50
    torch.testing.assert_close(captured[3][both], expected[3][both], rtol=0.05, atol=1e-3)
