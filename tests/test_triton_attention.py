"""Triton's attention_plan and varlen_attention against the reference.

In the interpreter on the CPU, and on a GPU.
"""

import pytest
import torch

from blockbatch_kernels import reference, triton, tuning
from blockbatch_kernels.tuning import AttentionShape
from float_errors import DTYPES, assert_no_worse_than_torch
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from triton_floats import nan, poisoned, rand

pytest.importorskip("triton", reason="the package triton is not installed")


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def attention_inputs(num_queries, num_keys, padding, heads, kv_heads, head_dim, dtype, page_size, seed=0):
    """Rows whose first pages are those of an earlier row, in caches that hold NaN wherever no row reads."""
    generator = torch.Generator().manual_seed(seed)
    # The values too: the bound is twice torch's largest error, which few values reach now and then.
    torch.manual_seed(seed)
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
