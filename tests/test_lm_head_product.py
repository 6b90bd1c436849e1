"""The LM head whose logits nobody stores: which sizes it serves, what it refuses, and results on a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from blockbatch_kernels import cuda, reference, tuning
from blockbatch_kernels.cuda import lm_head
from described_tensors import Described, change

DTYPES = [torch.bfloat16, torch.float16]
ROWS = [1, 7, 16, 17, 33, 64, 65, 100, 128]


def test_sizes_that_have_a_tile():
    for rows in range(1, 129):
        tile = tuning.lm_head_tile(rows, 131072, 4096)
        assert tile in (16, 64, 128) and (tile // 4 < rows or tile == 16) and rows <= tile
    for rows, vocab_size, dim in (
        (0, 126464, 4096),
        (129, 131072, 4096),
        (8, 20000, 4096),
        (8, 126464, 4100),
    ):
        assert tuning.lm_head_tile(rows, vocab_size, dim) == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden", dict(shape=(-1, 64)), "num_rows: expected at least 0, got -1"),
        ("hidden", dict(shape=(17, 64)), "num_rows: expected at most tile_rows, 16, got 17"),
        ("hidden", dict(shape=(16, 0)), "dim: expected at least 1, got 0"),
        ("hidden", dict(shape=(16, 60)), "dim: expected a multiple of 8, got 60"),
        ("weight", dict(shape=(0, 64)), "vocab_size: expected at least 1, got 0"),
        ("partials", dict(shape=(16, 3, 4)), "num_pieces: expected 2, got 3"),
        ("hidden", dict(address=2), "hidden: expected rows aligned to 16 bytes, got .* 2 bytes past"),
        (
            "weight",
            dict(strides=(65, 1)),
            "weight: expected rows aligned to 16 bytes, got a row stride of 65",
        ),
        ("tile_rows", 256, "tile_rows: expected 16, 64 or 128, got 256"),
    ],
)
def test_wrong_arguments_raise(arguments, name, value, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    arguments = change(arguments, name, **value) if isinstance(value, dict) else {**arguments, name: value}
    with pytest.raises(ValueError, match=f"lm_head_confidence: {message}"):
        extension.lm_head_product(**arguments)


def test_fp32_raises(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    for name in ("hidden", "weight"):
        arguments = change(arguments, name, dtype=torch.float32)
    with pytest.raises(ValueError, match="lm_head_confidence: dtype: expected code 1 or 2, got 0"):
        extension.lm_head_product(**arguments)


@pytest.fixture
def arguments():
    # Never launched: each test makes one of them wrong.
    return dict(
        hidden=Described((16, 64), torch.bfloat16),
        weight=Described((300, 64), torch.bfloat16),
        partials=Described((16, 2, 4)),
        suppress_token=None,
        tile_rows=16,
        stream=0,
    )


def draw(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def by_product(hidden, weight, suppress=None):
    assert lm_head._product_takes(hidden, weight)
    top, confidence, probe = cuda.lm_head_confidence(hidden, weight, suppress_token=suppress)
    assert probe is None and top.dtype == torch.int32 and confidence.dtype == torch.float32
    return top, confidence


def assert_no_worse(got, torchs, truth):
    error = (got.double() - truth).abs().max()  # NaN, and so a failure, where an element was left out
    rounding = torch.finfo(torchs.dtype).eps * truth.abs().max()
    assert error <= 2 * (torchs.double() - truth).abs().max() + rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [25344, 25345, 25535, 25537, 40001, 126464])
@pytest.mark.parametrize("scale", [0.05, 4.0, 3000.0])
def test_given_logits(sm90, poisoned, dtype, vocab_size, scale):
    for rows in (8, 64, 128) if vocab_size < 50000 else (16, 104):
        # Few different values, so that ties are common; the last rows are below any starting value.
        logits = draw(rows, vocab_size, scale=scale, seed=rows).mul(4).round().div(4)
        logits[-1] -= 30000
        logits = logits.to(dtype)
        hidden, weight = torch.eye(rows, dtype=dtype, device="cuda"), logits.t().contiguous()
        for suppress in (None, 0, vocab_size - 1, int(logits[0].float().argmax())):
            wide = logits.double()
            if suppress is not None:
                wide[:, suppress] = -math.inf
            top, confidence = by_product(hidden, weight, suppress)
            assert torch.equal(top.long(), wide.argmax(-1))
            assert_no_worse(confidence, wide.float().softmax(-1).amax(-1), wide.softmax(-1).amax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_random_hidden_states(sm90, poisoned, dtype, rows):
    for dim in (8, 72, 1024):
        # Neither side is contiguous, and the tied embedding has more rows than the vocabulary.
        hidden = draw(rows, dim + 16, dtype=dtype)[:, 8:-8]
        embedding = draw(30100, dim + 8, dtype=dtype, scale=8 * dim**-0.5, seed=1)
        weight = embedding[:30000, :dim]
        top, confidence = by_product(hidden, weight, 11)
        wide, logits = hidden.double() @ weight.double().t(), F.linear(hidden, weight)
        wide[:, 11] = logits[:, 11] = -math.inf
        # Its logit is the highest, up to the rounding of logits.
        chosen, highest = wide.gather(1, top.long().unsqueeze(1))[:, 0], wide.amax(-1)
        assert (chosen >= highest - 2 * torch.finfo(dtype).eps * highest.abs() - 1e-6).all()
        torchs = logits.float().softmax(-1).amax(-1)
        assert_no_worse(confidence, torchs.to(dtype), wide.softmax(-1).amax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_a_row_does_not_depend_on_the_others(sm90, rows):
    hidden, weight = draw(rows, 512, dtype=torch.bfloat16), draw(30000, 512, dtype=torch.bfloat16, seed=1)
    whole = by_product(hidden, weight)
    for _ in range(3):
        assert all(map(torch.equal, by_product(hidden, weight), whole))
    part = by_product(hidden[3 : rows - 2], weight)
    for some, every in zip(part, whole, strict=True):
        assert torch.equal(some, every[3 : rows - 2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_special_values_are_taken_as_torch_does(sm90, poisoned, dtype, special):
    hidden = torch.zeros(3, 8, dtype=dtype, device="cuda")
    hidden[:, 0] = 1
    size = 25600
    for places in ([0], [9001], [191, 192], [77, 85, 93, 9001], [25599], range(192), range(size)):
        weight = torch.zeros(size, 8, dtype=dtype, device="cuda")
        weight[:, 0] = draw(size, dtype=dtype)
        weight[list(places), 0] = special
        for suppress in (None, 0, 9001):
            expected = reference.lm_head_confidence(hidden, weight, suppress_token=suppress)
            top, confidence = by_product(hidden, weight, suppress)
            assert torch.equal(top, expected[0])
            torch.testing.assert_close(confidence, expected[1], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_inside_a_graph(sm90):
    hidden, weight = draw(100, 1024, dtype=torch.bfloat16), draw(30000, 1024, dtype=torch.bfloat16, seed=1)
    by_product(hidden, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        top, confidence = by_product(hidden * 2, weight)
    hidden.copy_(draw(100, 1024, dtype=torch.bfloat16, seed=2))
    graph.replay()
    again = by_product(hidden * 2, weight)
    assert torch.equal(top, again[0]) and torch.equal(confidence, again[1])
