"""Triton's lm_head_confidence against the reference: in the interpreter on the CPU, and on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from blockbatch_kernels import reference, triton, tuning
from float_errors import DTYPES, assert_no_worse_than_torch
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from triton_floats import poisoned, rand

pytest.importorskip("triton", reason="the package triton is not installed")


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def compare_lm_head(rows, vocab_size, dim, dtype, suppress, monkeypatch, part_bytes):
    """Small integers, whose products every order of summation gives exactly: many ties, the same bits."""
    config = tuning.TritonLmHead(part_bytes, block=64, num_warps=4)
    monkeypatch.setattr(tuning, "TRITON_LM_HEAD", config)
    hidden = torch.randint(-2, 3, (rows, dim), device=DEVICE).to(dtype)
    weight = torch.randint(-1, 2, (vocab_size, dim), device=DEVICE).to(dtype)
    probes = torch.randint(0, vocab_size, (rows,), dtype=torch.int32, device=DEVICE)
    probes[0] = suppress
    with poisoned():
        top, confidence, probed = triton.lm_head_confidence(
            hidden, weight, probe_tokens=probes, suppress_token=suppress
        )
        without = triton.lm_head_confidence(hidden, weight)
    logits = F.linear(hidden, weight).double()
    assert torch.equal(without[0].long(), logits.cpu().max(-1)[1].to(DEVICE)) and without[2] is None
    logits[:, suppress] = -float("inf")
    probabilities = logits.softmax(-1)
    expected = reference.lm_head_confidence(hidden, weight, probe_tokens=probes, suppress_token=suppress)
    assert torch.equal(top, expected[0])
    torch.testing.assert_close(confidence, probabilities.amax(-1).float(), rtol=1e-5, atol=0)
    exact = probabilities.gather(1, probes.long().unsqueeze(1)).squeeze(1).float()
    torch.testing.assert_close(probed, exact, rtol=1e-5, atol=1e-30)
    assert probed[0] == 0


@in_interpreter
@pytest.mark.parametrize("part_bytes", [1, 4 * 7 * 64 * 2, 1 << 20])
def test_lm_head(monkeypatch, part_bytes):
    compare_lm_head(7, 203, 12, torch.float32, 5, monkeypatch, part_bytes)
    assert triton.lm_head_confidence(torch.zeros(0, 4), torch.zeros(9, 4))[0].shape == (0,)


@in_interpreter
def test_lm_head_takes_what_is_not_a_number_for_the_highest():
    weight = torch.tensor([[1.0], [float("inf")], [float("nan")], [float("nan")], [3.0]])
    hidden = torch.tensor([[2.0], [-1.0]])
    for tokens, highest in ((5, [2, 2]), (2, [1, 0])):
        top, confidence, _ = triton.lm_head_confidence(hidden, weight[:tokens])
        assert top.tolist() == reference.lm_head_confidence(hidden, weight[:tokens])[0].tolist() == highest
        assert confidence.isnan().tolist() == [True, tokens == 5]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part_bytes", [1, 200_000, 1 << 30])
def test_lm_head_on_a_gpu(dtype, part_bytes, monkeypatch):
    compare_lm_head(65, 5003, 64, dtype, 4001, monkeypatch, part_bytes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lm_head_on_a_gpu_errs_no_more_than_torch(dtype):
    hidden, weight = rand(252, 512, dtype=dtype), rand(126464, 512, dtype=dtype, scale=0.2)
    top, confidence, _ = triton.lm_head_confidence(hidden, weight)
    expected_top, expected, _ = reference.lm_head_confidence(hidden, weight)
    logits = hidden.double() @ weight.double().T
    assert_no_worse_than_torch(confidence, expected, logits.softmax(-1).amax(-1))
    missed = logits.amax(-1) - logits.gather(1, top.long().unsqueeze(1)).squeeze(1)
    torch_missed = logits.amax(-1) - logits.gather(1, expected_top.long().unsqueeze(1)).squeeze(1)
    assert missed.max() <= 2 * torch_missed.max() + torch.finfo(dtype).eps * logits.abs().max()
