"""The product of q, k and v with rotary embedding and cache write behind it: errors, and results on a GPU."""

import pytest
import torch

from blockbatch_kernels import cuda, tuning
from blockbatch_kernels.cuda import linear_rope
from blockbatch_kernels.shapes import split_heads
from described_tensors import Described, change
from gemm_checks import DTYPES, name_of, poison_new_tensors, random_arguments, with_tile


@pytest.fixture
def poison(monkeypatch):
    poison_new_tensors(monkeypatch)


def test_every_rotated_tile_serves_a_published_model():
    served = set()
    for rows, in_features, most in ((12288, 4096, 256), (4608, 3584, 128)):  # LLaDA-8B, Dream-7B
        for num_tokens in range(1, most + 1):
            (part,) = tuning.linear_rule(num_tokens, rows, in_features, gated=False)
            served.add(part.tile)
    assert served == set(tuning.ROTATED_TILES) <= set(tuning.LINEAR_TILES)


@pytest.fixture
def arguments():
    # Never launched: each test makes one of them wrong.
    half, index = torch.bfloat16, torch.int32
    return dict(
        x=Described((16, 64), half),
        weight=Described((192, 64), half),
        bias=None,
        q=Described((16, 1, 64), half),
        k_cache=Described((1, 1, 1, 64), half),
        v_cache=Described((1, 1, 1, 64), half),
        k_scale=None,
        v_scale=None,
        positions=Described((16,), index),
        slot_mapping=Described((16,), torch.int64),
        cos=Described((8, 32)),
        sin=Described((8, 32)),
        tile=tuning.LinearTile(16, 64),
        static_weight=False,
        programmatic=False,
        stream=0,
    )


def wrong(arguments, name, fields):
    """`arguments` with a wrong tensor, or with a wrong tile."""
    if name == "tile":
        return {**arguments, "tile": arguments["tile"]._replace(**fields)}
    return change(arguments, name, **fields)


UNALIGNED = "q, k_cache, v_cache, cos, sin: expected addresses and strides of"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("q", dict(shape=(15, 1, 64)), "rope: expected the tokens and dtype of the product"),
        ("x", dict(shape=(17, 64)), "num_tokens: expected at most the tile's 16, got 17"),
        ("x", dict(shape=(16, 60)), "in_features: expected a multiple of 8, got 60"),
        ("q", dict(shape=(16, 1, 96)), "head_dim: expected a multiple of 64, got 96"),
        ("k_cache", dict(shape=(2**31, 1, 1, 64)), "k_cache: expected fewer than 2.31 slots"),
        ("x", dict(address=2), "x: expected rows aligned to 16 bytes, got .* 2 bytes past"),
        ("cos", dict(address=8), UNALIGNED),
        ("q", dict(strides=(64, 63, 1)), UNALIGNED),
        ("k_cache", dict(address=8), UNALIGNED),
        ("sin", dict(strides=(31, 1)), UNALIGNED),
        ("tile", dict(rows=192), "tile: expected a compiled one, got tokens 16, rows 192"),
        ("tile", dict(split_k=2), "tile: expected a compiled one, got tokens 16, rows 64, split_k 2"),
        ("positions", dict(dtype=torch.int64), "positions: expected int32, got int64"),
        ("cos", dict(dtype=torch.bfloat16), "cos: expected float32, got bfloat16"),
        ("weight", dict(dtype=torch.float16), "weight: expected bfloat16 as x, got float16"),
    ],
)
def test_wrong_arguments_raise(arguments, name, fields, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match=f"linear_rope_kv_write: {message}"):
        extension.linear_rope_kv_write(**wrong(arguments, name, fields))


def test_fp32_raises(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    for name in ("x", "weight", "q", "k_cache", "v_cache"):
        arguments = change(arguments, name, dtype=torch.float32)
    with pytest.raises(ValueError, match="linear_rope_kv_write: dtype: expected code 1 or 2, got 0"):
        extension.linear_rope_kv_write(**arguments)


def rope_arguments(num_tokens, kv_heads, head_dim, dtype, *, page_size=16, seed=0):
    """positions, slot_mapping, cos, sin and caches [2, ...] of NaN; some tokens are not stored, some stand at
    positions without an angle."""
    generator = torch.Generator("cuda").manual_seed(seed + num_tokens)
    pages = -(-num_tokens // page_size) + 3
    angle = 6.3 * torch.rand(300, head_dim // 2, device="cuda", generator=generator)
    positions = torch.randint(300, (num_tokens,), device="cuda", generator=generator, dtype=torch.int32)
    positions[3::11] = 300
    slots = torch.randperm(pages * page_size, device="cuda", generator=generator)[:num_tokens]
    slots[1::5] = -1
    caches = torch.full((2, pages, page_size, kv_heads, head_dim), float("nan"), device="cuda", dtype=dtype)
    return positions, slots, angle.cos(), angle.sin(), caches


def compare_rotated(heads, where, caches, product, q):
    """Bit for bit the rotation and the write of `product`, where nothing else was written."""
    expected, k, v = split_heads(product.clone(), heads, caches[0])
    plain = torch.full_like(caches, float("nan"))
    cuda.rope_kv_write(expected, k, v, *where, *plain)
    assert torch.isfinite(expected).any() and torch.isfinite(plain).any()
    torch.testing.assert_close(q, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(caches, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", tuning.ROTATED_TILES, ids=name_of)
def test_every_rotated_tile_is_its_product_rotated(sm90, poison, tile, dtype):
    cases = [
        (tile.tokens, 4, 4, 128, 1024),
        (tile.tokens - 4, 7, 1, 128, 3584),
        (1, 1, 1, 64, 8),
        (min(7, tile.tokens), 5, 2, 64, 1224),
        (tile.tokens // 2 + 1, 3, 1, 192, 264),
    ]
    for num_tokens, heads, kv_heads, head_dim, in_features in cases:
        for bias in (False, True):
            rows = (heads + 2 * kv_heads) * head_dim
            x, weight, b = random_arguments(num_tokens, rows, in_features, dtype, bias=bias)
            *where, caches = rope_arguments(num_tokens, kv_heads, head_dim, dtype)
            product = with_tile(x, weight, b, tile, gated=False, static_weight=False)
            for static_weight in (False, True):
                torch.cuda.synchronize()
                caches.fill_(float("nan"))
                q = linear_rope._launch(
                    x, weight, b, *where, *caches, num_heads=heads, tile=tile, static_weight=static_weight
                )
                compare_rotated(heads, where, caches, product, q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 33, 100, 160, 252, 256, 257])
def test_linear_rope_kv_write(sm90, poison, num_tokens, dtype):
    # The shapes of LLaDA-8B, Dream-7B and others, some of which no kernel of ours takes.
    shapes = [(32, 32, 128, 512), (28, 4, 128, 512), (16, 8, 64, 256), (40, 4, 96, 256), (30, 2, 80, 104)]
    for heads, kv_heads, head_dim, in_features in shapes:
        rows = (heads + 2 * kv_heads) * head_dim
        x, weight, bias = random_arguments(num_tokens, rows, in_features, dtype, bias=True)
        *where, caches = rope_arguments(num_tokens, kv_heads, head_dim, dtype)
        q = cuda.linear_rope_kv_write(x, weight, bias, *where, *caches, num_heads=heads)
        assert q.shape == (num_tokens, heads, head_dim) and q.dtype == dtype
        if num_tokens:
            compare_rotated(heads, where, caches, cuda.linear(x, weight, bias), q)


@pytest.mark.gpu
def test_any_layout_of_the_rotated_product(sm90):
    heads, kv_heads, head_dim = 28, 4, 128
    x, weight, bias = random_arguments(40, 36 * 128, 256, torch.bfloat16, bias=True)
    product = cuda.linear(x, weight, bias)
    positions, slots, cos, sin, caches = rope_arguments(40, kv_heads, head_dim, torch.bfloat16)
    pages, page_size = caches.shape[1:3]
    nan = float("nan")
    wide = torch.zeros(40, 300, device="cuda").bfloat16()
    wide[:, 3:259] = x
    by_head = torch.full((2, pages, kv_heads, page_size, head_dim), nan, device="cuda").bfloat16()
    odd = torch.full((2, pages, page_size, kv_heads, head_dim + 1), nan, device="cuda").bfloat16()[..., 1:]
    for inputs in (x, wide[:, 3:259], x.t().contiguous().t()):
        for cache in (caches, by_head.transpose(2, 3), odd):
            for angles in ((cos, sin), (cos.t().contiguous().t(), sin.repeat(1, 2)[:, :64])):
                cache.fill_(nan)
                where = (positions, slots, *angles)
                q = cuda.linear_rope_kv_write(inputs, weight, bias, *where, *cache, num_heads=heads)
                compare_rotated(heads, where, cache, product, q)
    where = (positions.repeat_interleave(2)[::2], slots.repeat_interleave(2)[::2], cos, sin)
    caches.fill_(nan)
    q = cuda.linear_rope_kv_write(x, weight, bias.repeat_interleave(2)[::2], *where, *caches, num_heads=heads)
    compare_rotated(heads, where, caches, product, q)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 60, 128, 180, 252])
def test_a_rotated_product_in_a_graph_waits_for_what_it_reads(sm90, num_tokens):
    """Its inputs come from the kernel just before, what it writes is read by the kernel just behind."""
    first, qkv, last = (
        random_arguments(1, rows, columns, torch.bfloat16, seed=seed)[1]
        for seed, (rows, columns) in enumerate([(4096, 1024), (12288, 4096), (1024, 4096)])
    )
    x = torch.zeros(num_tokens, 1024, device="cuda", dtype=torch.bfloat16)
    positions, slots, cos, sin, caches = rope_arguments(num_tokens, 32, 128, torch.bfloat16)
    slots.copy_(torch.randperm(caches[0].shape[0] * 16, device="cuda")[:num_tokens])
    positions.clamp_(max=299)
    flat = caches.flatten(1, 2)

    def chain(static):
        y = cuda.linear(x, first, static_weight=static)
        where = (positions, slots, cos, sin, *caches)
        q = cuda.linear_rope_kv_write(y, qkv, None, *where, num_heads=32, static_weight=static)
        read = cuda.linear(q.flatten(1), last, static_weight=static)
        stored = flat[:, slots].flatten(2)
        return read, cuda.linear(stored[0], last, static_weight=static), stored

    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for seed in range(3):
        x.copy_(random_arguments(num_tokens, 8, 1024, torch.bfloat16, seed=seed)[0])
        caches.fill_(float("nan"))
        graph.replay()
        got = [tensor.clone() for tensor in out]
        caches.fill_(float("nan"))
        torch.cuda.synchronize()
        for tensor, expected in zip(got, chain(False)):
            assert torch.isfinite(expected).all()
            assert torch.equal(tensor, expected)
