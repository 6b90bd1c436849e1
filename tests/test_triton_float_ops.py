"""The float operators in Triton against the reference: in the interpreter on the CPU, and on a GPU.

Whether Triton interprets its kernels is settled when they are defined, so the tests of the interpreter run in
a process of their own; here they are skipped.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from blockbatch_kernels import reference, triton, tuning
from blockbatch_kernels.tuning import AttentionShape

pytest.importorskip("triton", reason="the package triton is not installed")

in_interpreter = pytest.mark.skipif(not triton.interpreted(), reason="runs in a process of the interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cpu" if triton.interpreted() else "cuda"


@pytest.mark.skipif(triton.interpreted(), reason="this is that process")
def test_in_the_interpreter():
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def poisoned():
    """Memory that is allocated here holds NaN, or the largest integer, until it is written."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    was_on, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def rand(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def nan(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_no_worse_than_torch(got, in_dtype, truth):
    """Against an fp64 truth, at most twice the error of torch in that dtype, and one rounding."""
    assert got.dtype == in_dtype.dtype and got.shape == in_dtype.shape
    error = (got.double() - truth).abs().max().item()  # NaN, and so a failure, where nothing was written
    torch_error = (in_dtype.double() - truth).abs().max().item()
    rounding = torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= 2 * torch_error + rounding, f"{error=} {torch_error=} {rounding=}"


# --- rms_norm, swiglu, rope_kv_write, linear_rope_kv_write --------------------------------------------------


def compare_rms_norm(tokens, dim, dtype, strided):
    x, residual = rand(tokens, 2 * dim, dtype=dtype), rand(tokens, dim, dtype=dtype)
    weight = rand(dim, dtype=dtype)
    x = x[:, dim:] if strided else x[:, :dim].contiguous()
    expected_residual = residual.clone()
    expected = reference.rms_norm(x, weight, eps=1e-5, residual=expected_residual)
    with poisoned():
        got = triton.rms_norm(x, weight, eps=1e-5, residual=residual)
        alone = triton.rms_norm(residual, weight, eps=1e-5)
    assert torch.equal(residual, expected_residual)
    exact = residual.double()
    truth = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_no_worse_than_torch(got, expected, truth)
    assert torch.equal(alone, got)


def compare_swiglu(tokens, intermediate, dtype, strided):
    gate_up = rand(tokens, 2 * intermediate + 3, dtype=dtype, scale=4.0)
    gate_up = gate_up[:, 3:] if strided else gate_up[:, 3:].contiguous()
    with poisoned():
        got = triton.swiglu(gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_no_worse_than_torch(got, reference.swiglu(gate_up), F.silu(gate) * up)


def compare_rope(tokens, heads, kv_heads, head_dim, dtype):
    pages, page_size, half = 7 + tokens // 2, 4, head_dim // 2
    angle = torch.outer(torch.arange(64.0), 100.0 ** (-torch.arange(half) / half)).to(DEVICE)
    qkv = rand(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    parts = qkv.split((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), dim=1)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in parts)
    positions = torch.randint(0, 64, (tokens,), dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(pages * page_size, device=DEVICE)[:tokens]
    slots[tokens // 2] = -1
    caches = nan(2, 2, pages, page_size, kv_heads, head_dim, dtype=dtype)
    inputs = (positions, slots, angle.cos(), angle.sin())
    expected = q.clone()
    reference.rope_kv_write(expected, k, v, *inputs, *caches[1])
    kept = k.clone(), v.clone()

    def turned(x):
        first, second = x.double().chunk(2, dim=-1)
        cos, sin = (table[positions.long()].double().unsqueeze(1) for table in (angle.cos(), angle.sin()))
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    truth, k_truth = turned(q), turned(k)
    triton.rope_kv_write(q, k, v, *inputs, *caches[0])
    assert_no_worse_than_torch(q, expected, truth)
    assert torch.equal(k, kept[0]) and torch.equal(v, kept[1])
    stored = slots >= 0
    (k_cache, v_cache), (k_expected, v_expected) = (cache.flatten(1, 2) for cache in caches)
    assert_no_worse_than_torch(k_cache[slots[stored]], k_expected[slots[stored]], k_truth[stored])
    assert torch.equal(v_cache[slots[stored]], v[stored])
    for cache, other in ((k_cache, k_expected), (v_cache, v_expected)):
        assert torch.equal(cache.isnan(), other.isnan())  # nothing is written anywhere else


def compare_linear_rope(tokens, heads, kv_heads, head_dim, dtype, bias):
    """Against the two operators, whose own tests say what they compute."""
    rows, in_features, pages, page_size = (heads + 2 * kv_heads) * head_dim, 24, 3 + tokens // 2, 4
    angle = torch.rand(64, head_dim // 2, device=DEVICE)
    x, weight = rand(tokens, in_features, dtype=dtype), rand(rows, in_features, dtype=dtype)
    bias = rand(rows, dtype=dtype) if bias else None
    positions = torch.randint(0, 64, (tokens,), dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(pages * page_size, device=DEVICE)[:tokens]
    slots[tokens // 2 :] = -1
    inputs = (positions, slots, angle.cos(), angle.sin())
    caches = nan(2, 2, pages, page_size, kv_heads, head_dim, dtype=dtype)
    product = triton.linear(x, weight, bias).unflatten(1, (-1, head_dim))
    expected, k, v = product.split((heads, kv_heads, kv_heads), dim=1)
    triton.rope_kv_write(expected, k, v, *inputs, *caches[1])
    with poisoned():
        got = triton.linear_rope_kv_write(x, weight, bias, *inputs, *caches[0], num_heads=heads)
    assert got.shape == (tokens, heads, head_dim) and torch.equal(got, expected)
    torch.testing.assert_close(caches[0], caches[1], rtol=0, atol=0, equal_nan=True)


# --- attention ----------------------------------------------------------------------------------------------


def attention_inputs(num_queries, num_keys, padding, heads, kv_heads, head_dim, dtype, page_size, seed=0):
    """Rows whose first pages are those of an earlier row, in caches that hold NaN wherever no row reads."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = len(num_queries), max(1, -(-max(num_keys) // page_size))
    pages = rows * columns + 2
    page_table = torch.randperm(pages, generator=generator)[: rows * columns].view(rows, columns).int()
    for row in range(1, rows):
        shared = int(torch.randint(0, columns + 1, (1,), generator=generator))
        page_table[row, :shared] = page_table[row - 1, :shared]
    read = torch.zeros(pages, page_size, dtype=torch.bool)
    for row, length in enumerate(num_keys):
        for page in range(-(-length // page_size)):
            read[page_table[row, page], : length - page * page_size] = True
        page_table[row, -(-length // page_size) :] = -1
    kv = nan(3, 2, pages, page_size, kv_heads, head_dim, dtype=dtype)
    values = rand(2, pages, page_size, kv_heads, head_dim, dtype=dtype)
    kv[1] = torch.where(read[None, :, :, None, None].to(DEVICE), values, kv[1])
    tokens = sum(num_queries) + padding
    qkv = rand(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, scale=2.0)
    return dict(
        q=qkv[:, :heads],
        k_cache=kv[1, 0],
        v_cache=kv[1, 1],
        page_table=page_table.to(DEVICE),
        cu_seqlens_q=torch.tensor(
            [0, *torch.tensor(num_queries).cumsum(0)], dtype=torch.int32, device=DEVICE
        ),
        seqlens_k=torch.tensor(num_keys, dtype=torch.int32, device=DEVICE),
    )


def plan_arguments(inputs, shape=None):
    """What `attention_plan` takes for these inputs; without a shape the default one."""
    q, k_cache, page_table = inputs["q"], inputs["k_cache"], inputs["page_table"]
    page_size = k_cache.shape[1]
    if shape is None:
        processors = tuning.num_processors(q.device)
        heads = q.shape[1], k_cache.shape[2]
        shape = tuning.attention_shape(q.shape[0], *heads, page_size, page_table.shape[1], processors)
    arguments = (page_table, inputs["cu_seqlens_q"], inputs["seqlens_k"])
    return arguments, dict(page_size=page_size, num_tokens=q.shape[0], shape=shape)


def attend(inputs, scale, plan=None):
    if plan is None:
        arguments, options = plan_arguments(inputs)
        plan = triton.attention_plan(*arguments, **options)
    return triton.varlen_attention(**inputs, softmax_scale=scale, plan=plan)


def compare_plan(inputs, shape):
    """The plan of that shape (None: the default), which must be the reference's bit for bit."""
    arguments, options = plan_arguments(inputs, shape)
    with poisoned():
        plan = triton.attention_plan(*arguments, **options)
    expected = reference.attention_plan(*arguments, **options)
    for name, got, want in zip(plan._fields, plan, expected):
        assert got == want if isinstance(got, int) else torch.equal(got, want), name
    return plan


def compare_attention(inputs, plan, scale=None):
    q, head_dim = inputs["q"], inputs["q"].shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    with poisoned():
        got = attend(inputs, scale, plan)
    in_dtype = reference.varlen_attention(**inputs, softmax_scale=scale)
    exact = {name: inputs[name].double() for name in ("q", "k_cache", "v_cache")}
    truth = reference.varlen_attention(**{**inputs, **exact}, softmax_scale=scale)
    assert got.is_contiguous()
    assert_no_worse_than_torch(got, in_dtype, truth)
    unanswered = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
    bounds = inputs["cu_seqlens_q"].tolist()
    for row, length in enumerate(inputs["seqlens_k"].tolist()):
        unanswered[bounds[row] : bounds[row + 1]] = length == 0
    assert (got[unanswered] == 0).all()
    return got


def shape_of(inputs, tile_tokens, segment_pages, max_pieces, target_tiles, min_segments=1):
    tokens, columns = inputs["q"].shape[0], inputs["page_table"].shape[1]
    max_tiles = max_pieces * -(-tokens // tile_tokens)
    max_segments = -(-columns // segment_pages)
    return AttentionShape(
        tile_tokens, segment_pages, max_segments, max_pieces, max_tiles, target_tiles, min_segments
    )


# --- the interpreter ----------------------------------------------------------------------------------------


@in_interpreter
@pytest.mark.parametrize("tokens, dim", [(1, 1), (3, 96), (2, 129)])
def test_row_operators(tokens, dim):
    for strided in (False, True):
        compare_rms_norm(tokens, dim, torch.float32, strided)
        compare_swiglu(tokens, dim, torch.float32, strided)
    assert triton.rms_norm(torch.zeros(0, 4), torch.zeros(4), eps=1e-5).shape == (0, 4)
    assert triton.swiglu(torch.zeros(0, 4)).shape == (0, 2)


@in_interpreter
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 16), (3, 3, 6), (1, 1, 128)])
def test_rope(heads, kv_heads, head_dim):
    compare_rope(5, heads, kv_heads, head_dim, torch.float32)
    for bias in (False, True):
        compare_linear_rope(5, heads, kv_heads, head_dim, torch.float32, bias)


@in_interpreter
@pytest.mark.parametrize(
    "num_queries, num_keys, padding, heads, kv_heads, head_dim, page_size",
    [
        ([1], [1], 0, 1, 1, 16, 1),
        ([5, 0, 1, 4], [40, 17, 8, 33], 2, 6, 2, 16, 8),
        ([2, 3, 2], [0, 37, 37], 1, 2, 2, 64, 4),
        ([1, 2, 1, 0, 3, 1, 1, 1, 1], [20, 20, 13, 5, 0, 20, 7, 20, 16], 1, 2, 1, 12, 4),
        ([3, 2], [50, 50], 0, 3, 1, 128, 16),
    ],
)
def test_attention(num_queries, num_keys, padding, heads, kv_heads, head_dim, page_size):
    inputs = attention_inputs(
        num_queries, num_keys, padding, heads, kv_heads, head_dim, torch.float32, page_size
    )
    compare_attention(inputs, compare_plan(inputs, None))
    # Several pieces, and one piece for rows that share a part of it.
    for sizes in ((3, 2, 8, 50), (4, 1, 1, 1)):
        compare_attention(inputs, compare_plan(inputs, shape_of(inputs, *sizes)))


@in_interpreter
def test_plan_of_random_rows():
    generator = torch.Generator().manual_seed(1)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    pieces = set()
    for seed in range(8):
        rows, page_size = number(1, 20), number(1, 5)
        longest = number(1, 40)
        num_keys = [longest if number(0, 1) else number(0, longest) for _ in range(rows)]
        num_queries = [number(0, 4) for _ in range(rows)]
        inputs = attention_inputs(
            num_queries, num_keys, number(0, 3), 1, 1, 1, torch.float32, page_size, seed=seed
        )
        shape = shape_of(inputs, number(1, 4), number(1, 3), number(1, 6), number(1, 20), number(1, 2))
        pieces.add(compare_plan(inputs, shape).counts[1].item())
    assert len(pieces) > 2


@in_interpreter
def test_attention_makes_its_own_plan_and_takes_any_scale():
    inputs = attention_inputs([1, 2], [9, 12], 1, 2, 1, 16, torch.float32, 4)
    compare_attention(inputs, None, scale=-0.3)
    compare_attention(inputs, None, scale=0.0)


@in_interpreter
@pytest.mark.parametrize("rows", [0, 2])
def test_attention_without_any_query(rows):
    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    k_cache, sequences = rand(2, 4, 1, 16), (zeros(rows, 2), zeros(rows + 1), zeros(rows))
    for tokens in (0, 3):
        with poisoned():
            inputs = dict(q=rand(tokens, 2, 16), k_cache=k_cache, v_cache=k_cache)
            got = attend(inputs | dict(zip(("page_table", "cu_seqlens_q", "seqlens_k"), sequences)), 1.0)
        assert torch.equal(got, torch.zeros(tokens, 2, 16))


def test_attention_refuses_a_head_dim_beyond_its_limit():
    inputs = dict(
        q=torch.zeros(1, 1, 264), k_cache=torch.zeros(1, 1, 1, 264), v_cache=torch.zeros(1, 1, 1, 264)
    )
    with pytest.raises(ValueError, match="q: expected a head_dim of at most 256, got 264"):
        triton.varlen_attention(
            **inputs, page_table=None, cu_seqlens_q=None, seqlens_k=None, softmax_scale=1.0, plan=None
        )


@pytest.mark.parametrize("shared_bytes", [101376, 166912, 232448])  # of compute capabilities 8.9, 8.0, 9.0
@pytest.mark.parametrize("block_d", [16, 64, 128, 256])
@pytest.mark.parametrize("element_size", [2, 4])
def test_attention_fits_into_shared_memory(shared_bytes, block_d, element_size):
    for tile_rows in (1, 16, 63, 64, 128, 300):
        config = tuning.triton_attention(tile_rows, block_d, element_size, shared_bytes)
        assert config.shared_bytes(block_d, element_size) <= shared_bytes
        assert config.block_m >= 16 and config.block_n >= 16 and config.num_stages >= 1


# --- lm_head_confidence -------------------------------------------------------------------------------------


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


# --- a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_operators_on_a_gpu(dtype):
    for tokens, dim in ((1, 8), (3, 129), (257, 4096), (5, 12288)):
        for strided in (False, True):
            compare_rms_norm(tokens, dim, dtype, strided)
            compare_swiglu(tokens, dim, dtype, strided)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_on_a_gpu(dtype):
    for tokens, heads, kv_heads, head_dim in (
        (2, 4, 2, 16),
        (33, 32, 32, 128),
        (252, 28, 4, 128),
        (9, 3, 1, 6),
    ):
        compare_rope(tokens, heads, kv_heads, head_dim, dtype)
        compare_linear_rope(tokens, heads, kv_heads, head_dim, dtype, bias=True)


ROW_MIXES = [
    ([1], [1], 0),
    ([4, 8, 16, 32, 64, 128], [1280] * 6, 4),
    ([5, 0, 1, 19], [400, 17, 8, 333], 3),
    ([3] * 64, list(range(0, 640, 10)), 8),
    ([1300, 7], [1300, 1300], 0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(4, 4, 128), (14, 2, 128), (6, 2, 64), (2, 1, 40), (2, 2, 256)]
)
def test_attention_on_a_gpu(dtype, heads, kv_heads, head_dim):
    for seed, (num_queries, num_keys, padding) in enumerate(ROW_MIXES):
        inputs = attention_inputs(
            num_queries, num_keys, padding, heads, kv_heads, head_dim, dtype, 16, seed=seed
        )
        first = compare_attention(inputs, compare_plan(inputs, None))
        with poisoned():
            again = attend(inputs, head_dim**-0.5)
        assert torch.equal(first, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_on_a_gpu_in_several_pieces(dtype):
    for seed, (num_queries, num_keys, padding) in enumerate(ROW_MIXES[1:4]):
        inputs = attention_inputs(num_queries, num_keys, padding, 4, 4, 128, dtype, 16, seed=seed)
        for sizes in ((64, 8, 8, 50), (64, 4, 3, 100), (64, 3, 1, 1)):
            compare_attention(inputs, compare_plan(inputs, shape_of(inputs, *sizes)))


@pytest.mark.gpu
def test_attention_on_a_gpu_takes_any_layout():
    inputs = attention_inputs([5, 40], [70, 200], 1, 4, 2, 64, torch.bfloat16, 16)
    expected = compare_attention(inputs, None)
    by_dim = {
        name: inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in ("q", "k_cache")
    }
    assert torch.equal(compare_attention({**inputs, **by_dim}, None), expected)
    shifted = {}
    for name in ("q", "k_cache", "v_cache"):
        storage = torch.empty(inputs[name].numel() + 1, dtype=torch.bfloat16, device=DEVICE)
        shifted[name] = storage[1:].view(inputs[name].shape).copy_(inputs[name])
    assert torch.equal(compare_attention({**inputs, **shifted}, None), expected)


@pytest.mark.gpu
def test_attention_in_a_graph_follows_its_inputs():
    inputs = attention_inputs([4, 8, 16], [300, 300, 280], 4, 4, 4, 128, torch.bfloat16, 16)
    attend(inputs, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(inputs, 0.1)
    inputs["seqlens_k"].copy_(torch.tensor([120, 300, 0]))
    inputs["cu_seqlens_q"].copy_(torch.tensor([0, 10, 11, 28]))
    graph.replay()
    assert torch.equal(got, compare_attention(inputs, None, scale=0.1))


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
