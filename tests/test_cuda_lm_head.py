"""lm_head_confidence of the compiled backend, from logits in memory.

Errors against an fp64 truth are compared with torch's own in the same dtype. The product whose
logits nobody stores: test_lm_head_product.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import blockbatch_kernels as bbk
from blockbatch_kernels import tuning
from cuda_float_checks import draw
from described_tensors import Described
from float_errors import DTYPES, assert_no_worse_than_torch


def head_of(logits):
    """Hidden states and weights whose product is exactly `logits`."""
    return torch.eye(logits.shape[0], dtype=logits.dtype, device="cuda"), logits.t().contiguous()


def check_lm_head(logits, probes, suppress, **got):
    """Results against the definition in fp64, and torch's own softmax in fp32."""
    wide = logits.double()
    if suppress is not None:
        wide[:, suppress] = -math.inf
    truth, torchs = wide.softmax(-1), wide.float().softmax(-1)
    assert torch.equal(got["top"].long(), wide.argmax(-1))
    index = got["top"].long().unsqueeze(1)
    assert_no_worse_than_torch(got["confidence"], torchs.gather(1, index)[:, 0], truth.gather(1, index)[:, 0])
    index = probes.long().unsqueeze(1)
    assert_no_worse_than_torch(got["probe"], torchs.gather(1, index)[:, 0], truth.gather(1, index)[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 50, 4096, 4097, 12289, 126464])
@pytest.mark.parametrize("scale", [0.05, 4.0, 3000.0])
def test_lm_head_confidence(poisoned, dtype, vocab_size, scale):
    for rows in (1, 5, 256) if vocab_size < 50000 else (9,):
        # Few different values, so that ties are common; the last rows are below any starting value.
        logits = draw(rows, vocab_size, scale=scale, seed=rows).mul(4).round().div(4)
        logits[-1] -= 30000
        logits = logits.to(dtype)
        hidden, weight = head_of(logits)
        generator = torch.Generator().manual_seed(vocab_size)
        probes = torch.randint(0, vocab_size, (rows,), dtype=torch.int32, generator=generator).cuda()
        for suppress in (
            (None,) if vocab_size == 1 else (None, vocab_size - 1, int(logits[0].float().argmax()))
        ):
            top, confidence, probe = bbk.lm_head_confidence(
                hidden,
                weight,
                probe_tokens=probes,
                suppress_token=suppress,
                backend="cuda",
            )
            check_lm_head(logits, probes, suppress, top=top, confidence=confidence, probe=probe)
        top, confidence, probe = bbk.lm_head_confidence(hidden, weight, backend="cuda")
        assert probe is None and torch.equal(top.long(), logits.float().argmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 600, 1100])
def test_lm_head_of_random_hidden_states(poisoned, dtype, rows):
    hidden = draw(rows, 256, dtype=dtype)
    embedding = draw(9000, 256, dtype=dtype, scale=0.25, seed=1)
    weight = embedding[:8888]  # the tied embedding may have more rows than the vocabulary
    top, confidence, _ = bbk.lm_head_confidence(hidden, weight, suppress_token=11, backend="cuda")
    wide = hidden.double() @ weight.double().t()
    logits = F.linear(hidden, weight)
    wide[:, 11] = logits[:, 11] = -math.inf
    # Its logit is the highest, up to the rounding of logits.
    chosen = wide.gather(1, top.long().unsqueeze(1))[:, 0]
    assert (chosen >= wide.amax(-1) - 2 * torch.finfo(dtype).eps * wide.amax(-1).abs() - 1e-6).all()
    torchs = logits.float().softmax(-1).amax(-1)
    assert_no_worse_than_torch(confidence, torchs.to(dtype), wide.softmax(-1).amax(-1))


@pytest.mark.gpu
def test_lm_head_of_a_row_does_not_depend_on_rows_and_chunks(monkeypatch):
    logits = draw(300, 20000, scale=5.0).bfloat16()
    hidden, weight = head_of(logits)
    together = bbk.lm_head_confidence(hidden, weight, backend="cuda")
    few = bbk.lm_head_confidence(hidden[7:9], weight, backend="cuda")
    monkeypatch.setattr(tuning, "LM_HEAD_LOGITS_BYTES", 1)
    chunked = bbk.lm_head_confidence(hidden, weight, backend="cuda")
    for one, two, three in zip(together[:2], few[:2], chunked[:2], strict=True):
        assert torch.equal(one[7:9], two) and torch.equal(one, three)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_lm_head_takes_special_values_as_torch_does(dtype, special):
    hidden = torch.ones(1, 1, dtype=dtype, device="cuda")
    for places in ([0], [9001], [4095, 4096], [77, 78, 9001], range(10000)):
        weight = draw(10000, 1, dtype=dtype)
        weight[list(places)] = special
        expected = bbk.lm_head_confidence(hidden, weight, backend="reference")
        got = bbk.lm_head_confidence(hidden, weight, backend="cuda")
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_lm_head_of_nothing_and_probes_outside(unchecked):
    hidden, weight = draw(4, 16), draw(5000, 16, seed=1)
    probes = torch.tensor([-1, 5000, 4999, 2**31 - 1], dtype=torch.int32, device="cuda")
    probe = bbk.lm_head_confidence(hidden, weight, probe_tokens=probes, backend="cuda")[2]
    assert probe.isnan().tolist() == [True, True, False, True]
    top, confidence, _ = bbk.lm_head_confidence(hidden[:0], weight, backend="cuda")
    assert top.shape == confidence.shape == (0,)
    # Neither side has to be contiguous, and a weight may be a parameter.
    weight.requires_grad_()
    expected = bbk.lm_head_confidence(hidden, weight, backend="cuda")
    turned = bbk.lm_head_confidence(hidden.t().contiguous().t(), weight.t().contiguous().t(), backend="cuda")
    assert torch.equal(turned[0], expected[0])


@pytest.mark.parametrize(
    ("first_token", "num_pieces", "message"),
    [
        (8, 2, "first_token: expected a multiple of 4096, got 8"),
        (8192, 2, "num_pieces: expected at least 3, got 2"),
    ],
)
def test_wrong_chunks_of_the_vocabulary_raise(first_token, num_pieces, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match=message):
        extension.lm_head_reduce(
            logits=Described((2, 8)),
            probe_tokens=None,
            partials=Described((2, num_pieces, 4)),
            first_token=first_token,
            suppress_token=None,
            stream=0,
        )
