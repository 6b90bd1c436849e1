"""The product of q, k and v with rotation and cache write behind it, where weights or caches are in e4m3."""

import functools

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, tuning
from blockbatch_kernels.cuda import gemm_fp8, linear_rope
from blockbatch_kernels.shapes import split_heads
from gemm_checks import DTYPES, name_of, random_arguments, with_tile
from rotated_places import E4M3, PAGE_SIZE, fill_with_nan, nan_like, places, same_bytes
from test_quantized import quantised


def names(value):
    return tuning.fp8_tile_name(value) if isinstance(value, tuning.Fp8Tile) else str(value)


def compare(product, q, where, caches, scales):
    """Bit for bit the rotation and the write of `product`, where nothing else was written."""
    heads = q.shape[1]
    expected, k, v = split_heads(product.clone(), heads, caches[0])
    plain = nan_like(caches)
    if scales:
        cuda.rope_kv_write_fp8(expected, k, v, *where, *plain, *scales)
    else:
        cuda.rope_kv_write(expected, k, v, *where, *plain)
    torch.testing.assert_close(q, expected, rtol=0, atol=0, equal_nan=True)
    bits = (caches.view(torch.uint8), plain.view(torch.uint8)) if scales else (caches, plain)
    torch.testing.assert_close(*bits, rtol=0, atol=0, equal_nan=True)
    assert q.isfinite().any()
    return plain


@functools.cache
def quantised_weight(rows, in_features):
    return quantised(rows, in_features, "cuda", 6)


def fp8_product(num_tokens, heads, kv_heads, head_dim, in_features, dtype, bias):
    rows = (heads + 2 * kv_heads) * head_dim
    x, x_scale = quantised(num_tokens, in_features, "cuda", 5)
    weight, weight_scale = quantised_weight(rows, in_features)
    b = torch.randn(rows, generator=torch.Generator().manual_seed(7)).to("cuda", dtype) if bias else None
    return x, x_scale, weight, weight_scale * in_features**-0.5, b


def check_tile(tile, dtype, in_e4m3, num_tokens, heads, kv_heads, head_dim, in_features, bias):
    given = fp8_product(num_tokens, heads, kv_heads, head_dim, in_features, dtype, bias)
    *where, caches, scales = places(num_tokens, kv_heads, head_dim, dtype, in_e4m3=in_e4m3)
    product = gemm_fp8._on_tile(tile, *given, dtype, False)
    for static_weight in (False, True):
        fill_with_nan(caches)
        torch.cuda.synchronize()
        options = dict(num_heads=heads, out_dtype=dtype, tile=tile, static_weight=static_weight)
        q = linear_rope._launch_fp8(*given, *where, *caches, *scales, **options)
        plain = compare(product, q, where, caches, scales)
        assert plain.float().isfinite().any() or num_tokens == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("sm90")
class TestTiles:
    @pytest.mark.parametrize("in_e4m3", [False, True], ids=["cache16", "cache8"])
    @pytest.mark.parametrize("tile", tuning.ROTATED_FP8_TILES, ids=names)
    def test_smallest(self, tile, in_e4m3):
        """Two launches of each tile: what a run under compute-sanitizer has time for."""
        check_tile(tile, torch.bfloat16, in_e4m3, tile.tokens - 3, 3, 2, 64, 272, True)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("in_e4m3", [False, True], ids=["cache16", "cache8"])
    @pytest.mark.parametrize("tile", tuning.ROTATED_FP8_TILES, ids=names)
    def test_every_tile_is_its_product_rotated(self, poisoned, tile, in_e4m3, dtype):
        cases = [
            (tile.tokens, 4, 4, 128, 1024),
            (tile.tokens - 4, 7, 1, 128, 3584),
            (1, 1, 1, 64, 144),
            (min(7, tile.tokens), 5, 2, 64, 1232),
            (tile.tokens // 2 + 1, 3, 1, 192, 272),
        ]
        if tile.waves:  # more tiles than processors, and tokens of several
            cases += [(700, 28, 4, 128, 400), (1301, 16, 8, 64, 160)]
        for num_tokens, heads, kv_heads, head_dim, in_features in cases:
            for bias in (False, True):
                check_tile(tile, dtype, in_e4m3, num_tokens, heads, kv_heads, head_dim, in_features, bias)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tile", tuning.ROTATED_TILES, ids=name_of)
    def test_tiles_of_16_bits_write_caches_in_e4m3(self, poisoned, tile, dtype):
        cases = [
            (tile.tokens, 4, 4, 128, 1024),
            (tile.tokens - 4, 7, 1, 128, 3584),
            (1, 1, 1, 64, 8),
            (tile.tokens // 2 + 1, 3, 2, 192, 264),
        ]
        for num_tokens, heads, kv_heads, head_dim, in_features in cases:
            rows = (heads + 2 * kv_heads) * head_dim
            x, weight, bias = random_arguments(num_tokens, rows, in_features, dtype, bias=num_tokens % 2 == 0)
            *where, caches, scales = places(num_tokens, kv_heads, head_dim, dtype, in_e4m3=True)
            product = with_tile(x, weight, bias, tile, gated=False, static_weight=False)
            options = dict(num_heads=heads, tile=tile, static_weight=False)
            q = linear_rope._launch(x, weight, bias, *where, *caches, *scales, **options)
            compare(product, q, where, caches, scales)

    @pytest.mark.parametrize("tile", [tile for tile in tuning.ROTATED_FP8_TILES if tile.waves], ids=names)
    def test_the_same_bits_every_time(self, tile):
        """A race of a tile with its neighbours would show."""
        given = fp8_product(700, 32, 8, 128, 1024, torch.bfloat16, True)
        *where, caches, scales = places(700, 8, 128, torch.bfloat16, in_e4m3=True)
        options = dict(num_heads=32, out_dtype=torch.bfloat16, tile=tile, static_weight=True)
        first = None
        for _ in range(20):
            fill_with_nan(caches)
            q = linear_rope._launch_fp8(*given, *where, *caches, *scales, **options)
            now = q.nan_to_num(nan=7.0), caches.view(torch.uint8).clone()
            first = first or now
            assert all(map(torch.equal, now, first))


def two_operators(given, where, caches, scales, heads, dtype, backend):
    product = bbk.linear_fp8(*given, out_dtype=dtype, backend=backend)
    q, k, v = split_heads(product, heads, caches[0])
    write = bbk.rope_kv_write_fp8 if scales else bbk.rope_kv_write
    write(q, k, v, *where, *caches, *scales, backend=backend)
    return q


@pytest.mark.gpu
@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 33, 100, 160, 252, 300, 700])
def test_the_operator_is_the_two(poisoned, unchecked, num_tokens, dtype, backend):
    # The shapes of LLaDA-8B, half of it, Dream-7B and others, some of which no kernel of ours takes.
    shapes = [
        (32, 32, 128, 4096),
        (16, 16, 128, 4096),
        (28, 4, 128, 3584),
        (40, 4, 96, 256),
        (30, 2, 80, 208),
    ]
    for heads, kv_heads, head_dim, in_features in shapes[:: 1 if backend == "cuda" else 2]:
        for in_e4m3 in (False, True):
            given = fp8_product(num_tokens, heads, kv_heads, head_dim, in_features, dtype, in_e4m3)
            *where, caches, scales = places(num_tokens, kv_heads, head_dim, dtype, in_e4m3=in_e4m3)
            plain = caches.clone()
            options = dict(num_heads=heads, out_dtype=dtype, backend=backend)
            q = bbk.linear_rope_kv_write_fp8(*given, *where, *caches, *scales, **options)
            assert q.shape == (num_tokens, heads, head_dim) and q.dtype == dtype
            expected = two_operators(given, where, plain, scales, heads, dtype, backend)
            torch.testing.assert_close(q, expected, rtol=0, atol=0, equal_nan=True)
            assert same_bytes(caches, plain)


@pytest.mark.gpu
@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [17, 60, 128, 180, 252, 520])
def test_errors_beside_those_of_torch(poisoned, unchecked, num_tokens, dtype):
    """Against fp64: no more than twice the error of the reference, and a rounding of what is stored."""
    heads, kv_heads, head_dim = 8, 4, 128
    for in_e4m3 in (False, True):
        given = fp8_product(num_tokens, heads, kv_heads, head_dim, 4096, dtype, True)
        positions, slots, cos, sin, caches, scales = places(
            num_tokens, kv_heads, head_dim, dtype, in_e4m3=in_e4m3
        )
        positions.clamp_(max=299)
        scales = tuple(scale + 0.5 for scale in scales)  # with room for all numbers
        x, x_scale, weight, weight_scale, bias = (tensor.double() for tensor in given)
        exact = (x @ weight.T) * x_scale[:, None] * weight_scale + bias
        q, k, v = split_heads(exact, heads, caches[0])
        c, s = (table.double()[positions.long(), None] for table in (cos, sin))
        q, k = (
            torch.cat((a * c - b * s, b * c + a * s), -1)
            for a, b in (part.chunk(2, dim=-1) for part in (q, k))
        )
        stored = slots >= 0
        truth = [q, k[stored], v[stored]]
        errors = {}
        for backend in ("cuda", "triton", "reference"):
            own = caches.clone()
            got = bbk.linear_rope_kv_write_fp8(
                *given, positions, slots, cos, sin, *own, *scales,
                num_heads=heads, out_dtype=dtype, backend=backend,
            )  # fmt: skip
            parts = [cache.flatten(0, 1)[slots[stored]].double() for cache in own]
            if in_e4m3:
                parts = [part * scale.double()[:, None] for part, scale in zip(parts, scales)]
            errors[backend] = [
                float((one - other).abs().max()) for one, other in zip([got.double(), *parts], truth)
            ]
        for backend in ("cuda", "triton"):
            for index, (ours, theirs) in enumerate(zip(errors[backend], errors["reference"])):
                step = 2**-4 if in_e4m3 and index else torch.finfo(dtype).eps
                assert ours <= 2 * theirs + step * float(truth[index].abs().max()), (backend, index, errors)


@pytest.mark.gpu
@pytest.mark.usefixtures("sm90")
def test_any_layout():
    """What the one kernel cannot write where it is goes by the two operators, with the same bits."""
    heads, kv_heads, head_dim, dtype = 28, 4, 128, torch.bfloat16
    x, *rest = given = fp8_product(40, heads, kv_heads, head_dim, 256, dtype, True)
    options = dict(num_heads=heads, out_dtype=dtype)
    for in_e4m3 in (False, True):
        positions, slots, cos, sin, caches, scales = places(40, kv_heads, head_dim, dtype, in_e4m3=in_e4m3)
        product = cuda.linear_fp8(*given, out_dtype=dtype)
        _, pages, page_size, _, _ = caches.shape
        by_head = caches.new_empty(2, pages, kv_heads, page_size, head_dim).transpose(2, 3)
        odd = caches.new_empty(2, pages, page_size, kv_heads, head_dim + 1)[..., 1:]
        wide = torch.zeros(40, 300, device="cuda").to(E4M3)
        wide[:, 3:259] = x
        for values in (x, wide[:, 3:259]):
            for cache in (caches, by_head, odd):
                for angles in ((cos, sin), (cos.t().contiguous().t(), sin.repeat(1, 2)[:, :64])):
                    fill_with_nan(cache)
                    where = (positions, slots, *angles)
                    q = cuda.linear_rope_kv_write_fp8(values, *rest, *where, *cache, *scales, **options)
                    compare(product, q, where, cache.contiguous(), scales)


@pytest.mark.gpu
@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("in_e4m3", [False, True], ids=["cache16", "cache8"])
@pytest.mark.parametrize("num_tokens", [16, 60, 128, 180, 252, 520])
def test_in_a_graph_it_waits_for_what_it_reads(num_tokens, in_e4m3):
    """Its inputs come from the kernel just before, what it writes is read by the kernel just behind."""
    dtype = torch.bfloat16
    _, _, weight, weight_scale, bias = fp8_product(1, 32, 32, 128, 4096, dtype, True)
    last = random_arguments(1, 1024, 4096, dtype, seed=1)[1]
    positions, slots, cos, sin, caches, scales = places(num_tokens, 32, 128, dtype, in_e4m3=in_e4m3)
    positions.clamp_(max=299)
    slots.copy_(torch.randperm(caches[0].shape[0] * PAGE_SIZE, device="cuda")[:num_tokens])
    x = torch.zeros(num_tokens, 4096, device="cuda", dtype=dtype)
    flat = caches.view(torch.uint8).flatten(1, 2)

    def chain(static):
        values, x_scale = cuda.quantize_rows(x)
        given, where = (values, x_scale, weight, weight_scale, bias), (positions, slots, cos, sin, *caches)
        options = dict(num_heads=32, out_dtype=dtype, static_weight=static)
        q = cuda.linear_rope_kv_write_fp8(*given, *where, *scales, **options)
        return cuda.linear(q.flatten(1), last, static_weight=static), flat[:, slots]

    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for seed in range(3):
        x.copy_(random_arguments(num_tokens, 8, 4096, dtype, seed=seed)[0])
        flat.fill_(0xFF)
        graph.replay()
        got = [tensor.clone() for tensor in out]
        flat.fill_(0xFF)
        torch.cuda.synchronize()
        for tensor, expected in zip(got, chain(False)):
            assert torch.equal(tensor, expected)
        assert got[0].isfinite().all()
