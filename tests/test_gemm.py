"""Products with the weights: which tile serves a shape, what the extension refuses, and results on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from blockbatch_kernels import cuda, reference, tuning
from blockbatch_kernels.cuda import gemm, linear_rope
from blockbatch_kernels.reference.gemm import split_heads

DTYPES = [torch.bfloat16, torch.float16]
TILES = [(tile, False) for tile in tuning.LINEAR_TILES] + [(tile, True) for tile in tuning.GATED_TILES]


def name_of(value):
    if isinstance(value, tuning.LinearTile):
        return f"tokens{value.tokens}rows{value.rows}split_k{value.split_k}multicast{value.multicast}"
    return str(value)


@pytest.mark.parametrize("gated", [False, True])
def test_every_tile_has_room_for_the_tokens_it_serves(gated):
    tiles = tuning.GATED_TILES if gated else tuning.LINEAR_TILES
    served = set()
    for num_tokens in range(0, 300):
        for out_features in (3584, 4096, 4608, 12288, 18944, 24576, 126464):
            for in_features in (3584, 4096, 12288):
                parts = tuning.linear_parts(num_tokens, out_features, in_features, gated=gated)
                assert sum(part.features for part in parts) in (0, out_features)
                for features, tile in parts:
                    assert 0 < num_tokens <= tile.tokens
                    # The next part starts with a tile, at an address that the copy engine takes.
                    assert (features * (1 + gated)) % tile.rows == 0 or features == parts[-1].features
                    served.add(tile)
    assert served == set(tiles)  # nothing is compiled that nobody uses


def test_every_rotated_tile_serves_a_published_model():
    served = set()
    for rows, in_features, most in ((12288, 4096, 256), (4608, 3584, 128)):  # LLaDA-8B, Dream-7B
        for num_tokens in range(1, most + 1):
            (part,) = tuning.linear_rule(num_tokens, rows, in_features, gated=False)
            served.add(part.tile)
    assert served == set(tuning.ROTATED_TILES) <= set(tuning.LINEAR_TILES)


@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features"),
    [
        (0, 4096, 4096),
        (257, 24576, 4096),
        (8, 4097, 4096),
        (8, 4096, 4100),
        (8, 256, 4096),
        (252, 13824, 4096),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_shapes_without_a_tile(num_tokens, out_features, in_features, gated):
    assert tuning.linear_parts(num_tokens, out_features, in_features, gated=gated) == ()


@pytest.mark.parametrize("num_tokens", [130, 192, 252])
def test_gates_that_fill_one_wave_and_a_half_are_cut_in_two(num_tokens):
    whole, half = tuning.linear_rule(num_tokens, 18944, 3584, gated=True)
    assert (whole.features, whole.tile.split_k) == (132 * 96, 1)
    assert (half.features, half.tile.split_k) == (18944 - 132 * 96, 2)
    # A sum too short to share.
    assert tuning.linear_parts(num_tokens, 18944, 512, gated=True) == ()


@pytest.mark.parametrize("bias", [False, True])
def test_reference(bias):
    x, weight, b = torch.randn(5, 24), torch.randn(32, 24), torch.randn(32) if bias else None
    truth = x.double() @ weight.double().T + (b.double() if bias else 0)
    torch.testing.assert_close(reference.linear(x, weight, b).double(), truth, rtol=1e-5, atol=1e-5)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    torch.testing.assert_close(
        reference.linear_swiglu(x, weight).double(), F.silu(gate) * up, rtol=1e-5, atol=1e-5
    )


@pytest.fixture
def arguments():
    # Never launched: each test makes one of them wrong.
    tile = tuning.LINEAR_TILES[0]
    return dict(
        x=0,
        weight=0,
        bias=0,
        out=0,
        num_tokens=tile.tokens,
        in_features=64,
        out_features=64,
        x_row_stride=64,
        weight_row_stride=64,
        out_row_stride=64,
        up_distance=64,
        gated=False,
        dtype=2,
        tile_tokens=tile.tokens,
        tile_rows=tile.rows,
        split_k=tile.split_k,
        multicast=tile.multicast,
        static_weight=False,
        programmatic=False,
        device=0,
        stream=0,
    )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_tokens", -1, "linear: num_tokens: expected at least 0, got -1"),
        ("num_tokens", 1000, "linear: num_tokens: expected at most the tile's"),
        ("in_features", 0, "linear: in_features: expected at least 1, got 0"),
        ("in_features", 60, "linear: in_features: expected a multiple of 8, got 60"),
        ("out_features", -8, "linear: out_features: expected at least 0, got -8"),
        ("out_features", 63, "linear: out_features: expected a multiple of 8, got 63"),
        ("x", 2, "linear: x: expected rows aligned to 16 bytes, got .* 2 bytes past"),
        (
            "weight_row_stride",
            65,
            "linear: weight: expected rows aligned to 16 bytes, got a row stride of 65",
        ),
        ("out", 8, "linear: out: expected rows aligned to 16 bytes"),
        ("dtype", 0, "linear: dtype: expected code 1 or 2, got 0"),
        ("tile_rows", 65, "linear: tile: expected a compiled one, got tokens"),
        ("split_k", 7, "linear: tile: expected a compiled one, got tokens .* split_k 7"),
        ("multicast", 3, "linear: tile: expected a compiled one, got tokens .* multicast 3"),
    ],
)
def test_wrong_arguments_raise(arguments, argument, value, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match=message):
        extension.gemm(**{**arguments, argument: value})


def test_a_bias_with_gates_raises(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match="linear: bias: expected none with gated, got one"):
        extension.gemm(**{**arguments, "gated": True, "bias": 16})


def test_ups_among_the_gates_raise(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match="linear: up_distance: expected at least out_features, 64, got 56"):
        extension.gemm(**{**arguments, "gated": True, "up_distance": 56})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_tokens", 17, "linear_rope_kv_write: num_tokens: expected at most the tile's 16, got 17"),
        ("in_features", 60, "linear_rope_kv_write: in_features: expected a multiple of 8, got 60"),
        ("head_dim", 96, "linear_rope_kv_write: head_dim: expected a multiple of 64, got 96"),
        ("num_pages", 2**31, "linear_rope_kv_write: k_cache: expected fewer than 2.31 slots"),
        ("x", 2, "linear_rope_kv_write: x: expected rows aligned to 16 bytes, got .* 2 bytes past"),
        ("cos", 8, "linear_rope_kv_write: q, k_cache, v_cache, cos, sin: expected addresses and strides of"),
        ("q", (0, 64, 63), "linear_rope_kv_write: q, k_cache, v_cache, cos, sin: expected addresses and"),
        ("k_cache", (8, 64, 64, 64), "linear_rope_kv_write: q, k_cache, v_cache, cos, sin: expected addre"),
        ("sin_row_stride", 31, "linear_rope_kv_write: q, k_cache, v_cache, cos, sin: expected addresses"),
        ("dtype", 0, "linear_rope_kv_write: dtype: expected code 1 or 2, got 0"),
        ("tile_rows", 192, "linear_rope_kv_write: tile: expected a compiled one, got tokens 16, rows 192"),
        (
            "split_k",
            2,
            "linear_rope_kv_write: tile: expected a compiled one, got tokens 16, rows 64, split_k 2",
        ),
    ],
)
def test_wrong_arguments_of_the_rotated_product_raise(argument, value, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    arguments = dict(
        x=0,
        weight=0,
        bias=0,
        in_features=64,
        x_row_stride=64,
        weight_row_stride=64,
        tile_tokens=16,
        tile_rows=64,
        split_k=1,
        multicast=1,
        static_weight=False,
        q=(0, 64, 64),
        k_cache=(0, 64, 64, 64),
        v_cache=(0, 64, 64, 64),
        positions=0,
        slots=0,
        cos=0,
        sin=0,
        cos_row_stride=32,
        sin_row_stride=32,
        num_tokens=16,
        num_positions=8,
        num_pages=1,
        page_size=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        dtype=2,
        programmatic=False,
        device=0,
        stream=0,
    )
    with pytest.raises(ValueError, match=message):
        extension.linear_rope_kv_write(**{**arguments, argument: value})


@pytest.fixture
def poison(monkeypatch):
    """Outputs start as NaN, so that an element that nobody writes is seen."""
    empty = torch.Tensor.new_empty

    def new_empty(tensor, *size, **options):
        return empty(tensor, *size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def random_arguments(num_tokens, out_features, in_features, dtype, *, bias=False, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed + 1000 * num_tokens + out_features + in_features)

    def randn(*size):
        return torch.randn(*size, device="cuda", generator=generator)

    x = randn(num_tokens, in_features).to(dtype)
    weight = (randn(out_features, in_features) * in_features**-0.5).to(dtype)
    return x, weight, randn(out_features).to(dtype) if bias else None


def with_tile(x, weight, bias, tile, **options):
    """The product in one launch of this tile."""
    features = weight.shape[0] // (2 if options["gated"] else 1)
    return gemm._gemm(x, weight, bias, (tuning.LinearPart(features, tile),), **options)


def compare(x, weight, bias, gated, result):
    """Ours errs at most twice as much as torch in the same dtype, plus a rounding, against fp64."""
    truth = x.double() @ weight.double().T
    if gated:
        gate, up = truth.chunk(2, dim=-1)
        truth = F.silu(gate) * up
        by_torch = reference.linear_swiglu(x, weight)
    else:
        truth = truth if bias is None else truth + bias.double()
        by_torch = F.linear(x, weight, bias)
    rounding = torch.finfo(x.dtype).eps * truth.abs().max()
    assert result.dtype == x.dtype and result.shape == by_torch.shape
    error = (result.double() - truth).abs().max()  # NaN, and so a failure, where an element was left out
    assert error <= 2 * (by_torch.double() - truth).abs().max() + rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tile", "gated"), TILES, ids=name_of)
def test_every_tile_errs_no_more_than_torch(sm90, poison, tile, gated, dtype):
    # Full, nearly full and nearly empty tiles; features that fill no tile, no block of K and no split evenly.
    cases = [
        (tile.tokens, 1536, 1024),
        (tile.tokens - 4, 3600, 4096),
        (1, 16, 8 if tile.split_k == 1 else 72),  # a sum of one block of K cannot be shared
        (min(7, tile.tokens), 1040, 1224),
        (tile.tokens - 9, 2064, 72),
    ]
    if not gated:
        # Half a tile and one token: processors that share the tokens take unequal numbers.
        cases.append((tile.tokens // 2 + 1, 520, 264))
    for num_tokens, out_features, in_features in cases:
        for bias in (False, True) if not gated else (False,):
            for static_weight in (False, True):
                x, weight, b = random_arguments(num_tokens, out_features, in_features, dtype, bias=bias)
                torch.cuda.synchronize()
                result = with_tile(x, weight, b, tile, gated=gated, static_weight=static_weight)
                compare(x, weight, b, gated, result)


@pytest.mark.gpu
@pytest.mark.parametrize(("tile", "gated"), TILES, ids=name_of)
def test_a_token_does_not_depend_on_the_others(sm90, tile, gated):
    x, weight, _ = random_arguments(tile.tokens, 1536, 2048, torch.bfloat16)
    whole = with_tile(x, weight, None, tile, gated=gated, static_weight=False)
    for _ in range(3):
        again = with_tile(x, weight, None, tile, gated=gated, static_weight=False)
        assert torch.equal(again, whole)
    part = with_tile(x[3 : tile.tokens - 4], weight, None, tile, gated=gated, static_weight=False)
    assert torch.equal(part, whole[3 : tile.tokens - 4])


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_parts_are_computed_as_if_alone(sm90, poison, gated):
    tiles = [tile for tile, with_gates in TILES if with_gates == gated and tile.tokens >= 192]
    x, weight, bias = random_arguments(190, 3 * 960, 2048, torch.bfloat16, bias=not gated)
    weight_rows = weight.unflatten(0, (2, -1)) if gated else weight[None]
    for first, second in ((tiles[0], tiles[-1]), (tiles[-1], tiles[0]), (tiles[1], tiles[1])):
        features = 960, weight_rows.shape[1] - 960 - 8
        total = sum(features)
        cut = weight_rows[:, :total].flatten(0, 1).contiguous()
        parts = tuple(map(tuning.LinearPart, features, (first, second)))
        b = None if bias is None else bias[:total]
        out = gemm._gemm(x, cut, b, parts, gated=gated, static_weight=True)
        compare(x, cut, b, gated, out)
        begin = 0
        for number, tile in parts:
            rows = weight_rows[:, begin : begin + number].flatten(0, 1).contiguous()
            part_bias = None if bias is None else bias[begin : begin + number]
            alone = with_tile(x, rows, part_bias, tile, gated=gated, static_weight=False)
            assert torch.equal(out[:, begin : begin + number], alone)
            begin += number


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 33, 100, 160, 252, 256, 257])
def test_linear_and_linear_swiglu(sm90, poison, num_tokens, dtype):
    for out_features, in_features in ((4608, 3584), (37888, 1024), (12288, 512), (264, 136), (30, 50)):
        x, weight, bias = random_arguments(num_tokens, out_features, in_features, dtype, bias=True)
        if num_tokens == 0:
            assert cuda.linear(x, weight).shape == (0, out_features)
            assert cuda.linear_swiglu(x, weight).shape == (0, out_features // 2)
            continue
        compare(x, weight, bias, False, cuda.linear(x, weight, bias))
        compare(x, weight, None, True, cuda.linear_swiglu(x, weight))


@pytest.mark.gpu
def test_any_layout(sm90):
    x, weight, _ = random_arguments(40, 4096, 1024, torch.bfloat16)
    expected, expected_gated = cuda.linear(x, weight), cuda.linear_swiglu(x, weight)
    wide = torch.randn(40, 1100, device="cuda").bfloat16()
    for offset in (0, 3, 8):  # rows at odd addresses are copied first
        wide[:, offset : offset + 1024] = x
        assert torch.equal(cuda.linear(wide[:, offset : offset + 1024], weight), expected)
    assert torch.equal(cuda.linear(x.t().contiguous().t(), weight), expected)
    assert torch.equal(cuda.linear(x[:1].expand(40, -1), weight), expected[:1].expand(40, -1))
    padded = torch.zeros(4096, 1032, device="cuda", dtype=torch.bfloat16)
    padded[:, :1024] = weight
    assert torch.equal(cuda.linear_swiglu(x, padded[:, :1024]), expected_gated)
    assert torch.equal(cuda.linear(x, padded[:, :1024]), expected)
    compare(x, weight, None, False, cuda.linear(x, weight.t().contiguous().t()))  # through torch
    padded[:, 1:1025] = weight
    compare(x, weight, None, True, cuda.linear_swiglu(x, padded[:, 1:1025]))


def chain(backend, y, weights, **static):
    y = backend.linear(y, weights[0], **static)
    y = backend.linear(y, weights[1], **static)
    y = backend.linear_swiglu(y, weights[2], **static)
    return backend.linear(y * 2, weights[3], **static)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 60, 128, 180, 252])
def test_a_chain_in_a_graph_waits_for_what_it_reads(sm90, num_tokens):
    # Each product reads what the kernel just before it writes, while the weights are read ahead.
    sizes = [(4096, 1024), (2048, 4096), (8192, 2048), (1024, 4096)]
    weights = [random_arguments(1, n, k, torch.bfloat16, seed=i)[1] for i, (n, k) in enumerate(sizes)]
    x = torch.zeros(num_tokens, 1024, device="cuda", dtype=torch.bfloat16)
    chain(cuda, x, weights, static_weight=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(cuda, x, weights, static_weight=True)
    for seed in range(3):
        x.copy_(random_arguments(num_tokens, 8, 1024, torch.bfloat16, seed=seed)[0])
        graph.replay()
        assert torch.equal(out, chain(cuda, x, weights))
        truth = chain(reference, x.double(), [weight.double() for weight in weights])
        by_torch = chain(reference, x, weights)
        error = (out.double() - truth).abs().max()
        rounding = torch.finfo(x.dtype).eps * truth.abs().max()
        assert error <= 2 * (by_torch.double() - truth).abs().max() + rounding
