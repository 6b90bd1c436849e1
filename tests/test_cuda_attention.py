"""The compiled attention: three-way errors against an fp64 truth, odd layouts, and what it refuses."""

import itertools
import random

import pytest
import torch

from blockbatch_kernels import ops, reference, tuning
from blockbatch_kernels.cuda import attention as compiled
from blockbatch_kernels.structs import AttentionPlan
from described_tensors import Described, change

HALVES = [torch.bfloat16, torch.float16]


def problem(
    queries,
    lengths,
    *,
    heads=(4, 4),
    head_dim=64,
    page_size=16,
    dtype=torch.bfloat16,
    sharing=0.5,
    padding=3,
    seed=0,
):
    """(q, k_cache, v_cache, page_table, cu_seqlens_q, seqlens_k) on the GPU, with NaN in every free slot.

    `sharing`: how likely a row reads a stretch of an earlier row's pages.
    """
    rng = random.Random(seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    num_heads, num_kv_heads = heads
    rows, pages_per_row = len(queries), max(1, -(-max(lengths) // page_size))
    tables = []
    for row in range(rows):
        table = [row * pages_per_row + page for page in range(pages_per_row)]
        if tables and rng.random() < sharing:
            first = rng.choice([0, 0, rng.randrange(pages_per_row)])
            table[first:] = rng.choice(tables)[first:]
        if tables and rng.random() < sharing:
            last = rng.randint(0, pages_per_row)
            table[:last] = rng.choice(tables)[:last]
        tables.append(table)
    shuffled = torch.randperm(rows * pages_per_row + 5, generator=torch.Generator().manual_seed(seed))
    page_table = shuffled[torch.tensor(tables)].int()
    caches = torch.full(
        (2, len(shuffled), page_size, num_kv_heads, head_dim), float("nan"), device="cuda", dtype=dtype
    )
    slots = set()
    for row, length in enumerate(lengths):
        slots |= {
            int(page_table[row, key // page_size]) * page_size + key % page_size for key in range(length)
        }
    slots = torch.tensor(sorted(slots), device="cuda", dtype=torch.long)
    for cache in caches:
        cache.view(-1, num_kv_heads, head_dim)[slots] = torch.randn(
            len(slots), num_kv_heads, head_dim, device="cuda", generator=generator
        ).to(dtype)
    tokens = sum(queries) + padding
    q = (torch.randn(tokens, num_heads, head_dim, device="cuda", generator=generator) * 2).to(dtype)
    bounds = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    return q, *caches, page_table.cuda(), bounds.cuda(), torch.tensor(lengths, dtype=torch.int32).cuda()


def poison(monkeypatch):
    """Every buffer that is allocated from now on is full of NaN or of a number that is no index."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)


def attend(inputs, softmax_scale=None, plan=None):
    return ops.varlen_attention(*inputs, softmax_scale=softmax_scale, plan=plan, backend="cuda")


def compare(inputs, softmax_scale=None, plan=None, message=""):
    """Our error against torch's in the same dtype, both against fp64. Returns ours."""
    out = attend(inputs, softmax_scale, plan)
    q, k_cache, v_cache = inputs[:3]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    options = dict(softmax_scale=scale)
    doubles = (tensor.double() for tensor in (q, k_cache, v_cache))
    truth = reference.varlen_attention(*doubles, *inputs[3:], **options)
    torch_out = reference.varlen_attention(*inputs, **options)
    rounding = torch.finfo(q.dtype).eps * truth.abs().max()
    torch_error = (torch_out - truth).abs().max()
    error = (out - truth).abs().max()  # NaN, and so a failure, where an element was left out
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(), message
    assert error <= 2 * torch_error + rounding, (message, float(error), float(torch_error))
    bounds, lengths = inputs[4].tolist(), inputs[5].tolist()
    for row, length in enumerate(lengths):
        if length == 0:
            assert not out[bounds[row] : bounds[row + 1]].any(), message
    assert not out[bounds[-1] :].any(), message
    return out


MIXES = [
    ([1], [1]),
    ([16], [64]),
    ([5, 0, 3], [70, 40, 0]),
    ([4, 8, 16, 32, 64, 128], [333] * 6),
    ([4, 8, 16, 32, 64, 128], [1280] * 6),
    ([33, 64, 65, 17, 1], [1, 63, 64, 65, 200]),
    ([200], [1000]),
    ([8], [4096]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (14, 2), (3, 1)], ids=str)
def test_errs_no_more_than_torch(monkeypatch, heads, head_dim, dtype):
    poison(monkeypatch)
    for seed, (queries, lengths) in enumerate(MIXES):
        sharing = 0.7 * (seed % 2)
        inputs = problem(
            queries, lengths, heads=heads, head_dim=head_dim, dtype=dtype, sharing=sharing, seed=seed
        )
        compare(inputs, message=(queries, lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 7, 16, 48, 256])
def test_page_sizes(monkeypatch, page_size):
    poison(monkeypatch)
    for seed in range(4):
        rng = random.Random(100 * page_size + seed)
        queries = [rng.choice([0, 1, 4, 30, 90]) for _ in range(5)]
        lengths = [rng.randint(0, 900) for _ in range(4)] + [300]
        inputs = problem(queries, lengths, page_size=page_size, head_dim=128, heads=(4, 2), seed=seed)
        compare(inputs, message=(queries, lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 96, 128, 200, 256])
def test_any_head_dim(monkeypatch, head_dim, dtype):
    if dtype != torch.float32 and head_dim in (64, 128):
        pytest.skip("covered above")
    poison(monkeypatch)
    for seed, heads in enumerate([(4, 4), (6, 2)]):
        for queries, lengths in MIXES[:6]:
            inputs = problem(queries, lengths, heads=heads, head_dim=head_dim, dtype=dtype, seed=seed)
            compare(inputs, message=(queries, lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_fp32_is_exact_to_a_millionth(head_dim):
    inputs = problem([4, 8, 16, 32], [300, 300, 17, 290], head_dim=head_dim, dtype=torch.float32)
    out = attend(inputs).cpu()
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    truth = reference.varlen_attention(*(t.cpu() for t in doubles), softmax_scale=head_dim**-0.5)
    assert ((out - truth).norm() / truth.norm()) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_many_heads_a_kv_head_and_many_rows(monkeypatch, dtype):
    poison(monkeypatch)
    for heads in ((40, 1), (80, 1), (160, 1)):
        compare(problem([3, 9], [200, 133], heads=heads, dtype=dtype), message=heads)
    rng = random.Random(1)
    queries = [rng.choice([0, 1, 4, 32]) for _ in range(64)]
    lengths = [rng.randint(0, 400) for _ in range(64)]
    compare(problem(queries, lengths, dtype=dtype, head_dim=128))
    compare(problem([1500, 3, 900], [1500, 1500, 900], dtype=dtype, head_dim=128, heads=(2, 2)))


@pytest.mark.gpu
def test_long_rows():
    inputs = problem([4096], [4096], head_dim=128, heads=(2, 1), padding=0)
    compare(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_layouts(dtype, head_dim):
    """Queries inside a packed qkv product, caches in other memory orders, addresses of every alignment."""
    inputs = problem([4, 40, 7], [200, 99, 200], head_dim=head_dim, dtype=dtype, heads=(6, 2))
    q, k_cache, v_cache = inputs[:3]
    want = compare(inputs)
    packed = torch.full((q.shape[0], 10, head_dim), float("nan"), dtype=dtype, device="cuda")
    packed[:, :6] = q
    by_head = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache)]
    both = torch.stack((k_cache, v_cache), dim=1)
    variants = {
        "packed": (packed[:, :6], k_cache, v_cache),
        "head outermost": (q, *by_head),
        "k beside v": (q, both[:, 0], both[:, 1]),
    }
    for name, (q_view, k_view, v_view) in variants.items():
        assert torch.equal(attend((q_view, k_view, v_view, *inputs[3:])), want), name
    for offset in (1, 2, 4):
        shifted = []
        for tensor in (q, k_cache, v_cache):
            storage = torch.empty(tensor.numel() + 8, dtype=dtype, device="cuda")
            shifted.append(storage[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor))
        for index in range(3):
            some = [shifted[i] if i == index else inputs[i] for i in range(3)]
            compare((*some, *inputs[3:]), message=("offset", offset, index))
    every_other = torch.stack((q, q), dim=-1)[..., 0]
    assert torch.equal(attend((every_other, *inputs[1:])), want)


@pytest.mark.gpu
def test_extreme_scores():
    inputs = problem([4, 64], [500, 700], head_dim=128, padding=0)
    for scale in (1e-3, 1.0, 30.0):
        compare(inputs, softmax_scale=scale, message=scale)
    inputs[1].nan_to_num_()
    inputs[1][:] = 1.0  # equal scores: the mean of the values
    compare(inputs)


@pytest.mark.gpu
def test_results_depend_on_nothing_else(monkeypatch):
    """The same bits on every run, and for a row whatever the batch holds beside it."""
    inputs = problem([4, 8, 16, 32, 64, 128], [1280] * 6, heads=(32, 32), head_dim=128, sharing=0.5)
    want = attend(inputs)
    for _ in range(20):
        assert torch.equal(attend(inputs), want)
    plan = ops.attention_plan(
        *inputs[3:], page_size=16, num_tokens=inputs[0].shape[0], num_heads=32, num_kv_heads=32
    )
    assert torch.equal(attend(inputs, plan=plan), want)


@pytest.mark.gpu
@pytest.mark.parametrize("max_pieces", [1, 2, 5, 32])
def test_every_cut_of_the_keys(monkeypatch, max_pieces):
    poison(monkeypatch)
    mixes = [([4, 64, 9], [1000, 1000, 130]), ([1, 200, 30, 30], [128, 900, 500, 900])]
    for (queries, lengths), tile_rows, dtype in itertools.product(
        mixes, (16, 64, 128), [torch.float32, *HALVES]
    ):
        inputs = problem(queries, lengths, heads=(8, 2), head_dim=64, dtype=dtype, sharing=0.8)
        tokens = inputs[0].shape[0]
        tile_tokens = tile_rows // 4
        shape = tuning.AttentionShape(
            tile_tokens=tile_tokens,
            segment_pages=4,
            max_segments=16,
            max_pieces=max_pieces,
            max_tiles=max_pieces * -(-tokens // tile_tokens),
            target_tiles=1000,
            min_segments=1,
            num_heads=8,
            num_kv_heads=2,
        )
        options = dict(page_size=16, num_tokens=tokens, shape=shape)
        plan: AttentionPlan = compiled.attention_plan(*inputs[3:], **options)
        compare(inputs, plan=plan, message=(queries, tile_rows, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("processors", [1, 2, 7, 132, 400])
def test_units_on_any_number_of_processors(monkeypatch, processors):
    """Tiles that many processors share, processors with many tiles; the same bits again by the same plan."""
    poison(monkeypatch)
    for seed, (queries, lengths) in enumerate([*MIXES, ([3] * 40, [130, 257] * 20), ([150, 2], [900, 900])]):
        for heads, head_dim in (((4, 4), 128), ((14, 2), 64)):
            inputs = problem(queries, lengths, heads=heads, head_dim=head_dim, sharing=0.7, seed=seed)
            tokens, pages_per_row = inputs[0].shape[0], inputs[3].shape[1]
            shape = tuning.attention_shape(tokens, *heads, 16, pages_per_row, processors, units=True)
            plan = compiled.attention_plan(*inputs[3:], page_size=16, num_tokens=tokens, shape=shape)
            assert plan.units[0, 0] > 0
            out = compare(inputs, plan=plan, message=(queries, heads))
            assert torch.equal(attend(inputs, plan=plan), out)
            assert not plan.arrivals.any()


@pytest.mark.gpu
def test_runs_inside_a_graph():
    inputs = problem([4, 8, 100], [600] * 3, head_dim=128, heads=(8, 8))
    attend(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(inputs)
    inputs[0].normal_()
    inputs[3].copy_(inputs[3].flip(0))
    graph.replay()
    assert torch.equal(out, attend(inputs))


@pytest.mark.gpu
def test_no_tokens():
    inputs = problem([0, 0], [10, 20], padding=0)
    assert attend(inputs).shape == (0, 4, 64)


@pytest.mark.gpu
def test_wrong_layouts_raise():
    inputs = problem([4], [40], head_dim=64)
    strided = torch.stack((inputs[1], inputs[1]), dim=-1)[..., 0]
    with pytest.raises(ValueError, match="k_cache: expected a last stride of 1, got 2"):
        attend((inputs[0], strided, *inputs[2:]))


@pytest.fixture
def arguments():
    # Never launched: each test makes one of them wrong, or leaves nothing to do.
    cache, heads = Described((4, 16, 4, 64), torch.bfloat16), Described((8, 4, 64), torch.bfloat16)
    index = {
        "page_table": (1, 4),
        "seqlens_k": (1,),
        "tiles": (3, 4),
        "query_order": (1, 8),
        "pieces": (1, 2),
        "token_row": (8,),
        "counts": (2,),
        "units": (0, 22),
        "stretches": (0, 4),
        "arrivals": (0,),
    }
    return {name: Described(shape, torch.int32) for name, shape in index.items()} | dict(
        q=heads,
        k_cache=cache,
        v_cache=cache,
        k_scale=None,
        v_scale=None,
        out=heads,
        partials=Described((0,)),
        tile_tokens=64,
        softmax_scale=0.125,
        programmatic=False,
        stream=0,
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", dict(shape=(-1, 4, 64)), "num_tokens: expected at least 0, got -1"),
        ("k_cache", dict(shape=(4, 16, 0, 64)), "num_kv_heads: expected at least 1, got 0"),
        ("q", dict(shape=(8, 4, 257)), "head_dim: expected at most 256, got 257"),
        ("k_cache", dict(shape=(4, 0, 4, 64)), "page_size: expected at least 1, got 0"),
        ("softmax_scale", -0.5, "softmax_scale: expected a positive number, got -0.5"),
        ("softmax_scale", float("nan"), "softmax_scale: expected a positive number, got nan"),
        ("k_cache", dict(dtype=torch.float16), "k_cache: expected bfloat16 as q, got float16"),
        ("seqlens_k", dict(dtype=torch.int64), "seqlens_k: expected int32, got int64"),
        ("arrivals", dict(device=-1), "arrivals: expected a tensor in cuda:0 as q, got one in host memory"),
    ],
)
def test_wrong_values_raise(arguments, name, value, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    arguments = change(arguments, name, **value) if isinstance(value, dict) else {**arguments, name: value}
    with pytest.raises(ValueError, match=f"varlen_attention: {message}"):
        extension.varlen_attention(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_without_a_gpu_names_the_operator(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(RuntimeError, match="blockbatch_kernels.varlen_attention: cuda"):
        extension.varlen_attention(**arguments)
    extension.varlen_attention(**change(arguments, "q", shape=(0, 4, 64)))  # nothing to launch
