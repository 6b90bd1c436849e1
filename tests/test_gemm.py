"""Products with the weights: which tile serves a shape, what the extension refuses, and results on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from blockbatch_kernels import cuda, reference, tuning
from blockbatch_kernels.cuda import gemm
from described_tensors import Described, change
from gemm_checks import DTYPES, compare, name_of, poison_new_tensors, random_arguments, with_tile

TILES = [(tile, False) for tile in tuning.LINEAR_TILES] + [(tile, True) for tile in tuning.GATED_TILES]


@pytest.fixture
def poison(monkeypatch):
    poison_new_tensors(monkeypatch)


@pytest.mark.parametrize("gated", [False, True])
def test_every_tile_has_room_for_the_tokens_it_serves(gated):
    tiles = tuning.GATED_TILES if gated else tuning.LINEAR_TILES
    served = set()
    for num_tokens in range(0, 300):
        for out_features in (3584, 4096, 4608, 12288, 18944, 24576, 126464):
            for in_features in (3584, 4096, 12288):
                for kind in (tuning.H100, tuning.H200):
                    sizes = num_tokens, out_features, in_features
                    parts = tuning.linear_parts(*sizes, gated=gated, device_kind=kind)
                    assert sum(part.features for part in parts) in (0, out_features)
                    for features, tile in parts:
                        assert 0 < num_tokens <= tile.tokens
                        # The next part starts with a tile, at an address that the copy engine takes.
                        assert (features * (1 + gated)) % tile.rows == 0 or features == parts[-1].features
                        served.add(tile)
    assert served == set(tiles)  # nothing is compiled that nobody uses


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
        x=Described((tile.tokens, 64), torch.bfloat16),
        weight=Described((64, 64), torch.bfloat16),
        bias=None,
        out=Described((tile.tokens, 64), torch.bfloat16),
        first=0,
        features=64,
        tile=tile,
        gated=False,
        static_weight=False,
        programmatic=False,
        stream=0,
    )


def wrong(arguments, name, value):
    """`arguments` with another value, with other fields of a tensor, or with another tile."""
    if name == "tile":
        return {**arguments, "tile": arguments["tile"]._replace(**value)}
    return change(arguments, name, **value) if isinstance(value, dict) else {**arguments, name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", dict(shape=(-1, 64)), "num_tokens: expected at least 0, got -1"),
        ("x", dict(shape=(1000, 64)), "num_tokens: expected at most the tile's"),
        ("x", dict(shape=(4, 0)), "in_features: expected at least 1, got 0"),
        ("x", dict(shape=(4, 60)), "in_features: expected a multiple of 8, got 60"),
        ("features", -8, "out_features: expected at least 0, got -8"),
        ("features", 63, "out_features: expected a multiple of 8, got 63"),
        ("x", dict(address=2), "x: expected rows aligned to 16 bytes, got .* 2 bytes past"),
        (
            "weight",
            dict(strides=(65, 1)),
            "weight: expected rows aligned to 16 bytes, got a row stride of 65",
        ),
        ("out", dict(address=8), "out: expected rows aligned to 16 bytes"),
        ("tile", dict(rows=65), "tile: expected a compiled one, got tokens"),
        ("tile", dict(split_k=7), "tile: expected a compiled one, got tokens .* split_k 7"),
        ("tile", dict(multicast=3), "tile: expected a compiled one, got tokens .* multicast 3"),
        ("weight", dict(dtype=torch.float16), "weight: expected bfloat16 as x, got float16"),
        ("out", dict(device=1), "out: expected a tensor in cuda:0 as x, got one in cuda:1"),
        ("bias", Described((64,)), "bias: expected bfloat16 as x, got float32"),
    ],
)
def test_wrong_arguments_raise(arguments, name, value, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match=f"linear: {message}|gemm: {message}"):
        extension.gemm(**wrong(arguments, name, value))


def test_fp32_raises(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    for name in ("x", "weight", "out"):
        arguments = change(arguments, name, dtype=torch.float32)
    with pytest.raises(ValueError, match="linear: dtype: expected code 1 or 2, got 0"):
        extension.gemm(**arguments)


def test_wrong_tiles_raise(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(TypeError, match="gemm: tile.rows: expected an integer, got NoneType"):
        extension.gemm(**wrong(arguments, "tile", dict(rows=None)))
    with pytest.raises(TypeError, match="gemm: tile.tokens: missing"):
        extension.gemm(**{**arguments, "tile": (16, 64, 1, 1)})


def test_a_bias_with_gates_raises(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    bias = Described((64,), torch.bfloat16, address=16)
    with pytest.raises(ValueError, match="linear: bias: expected none with gated, got one"):
        extension.gemm(**{**change(arguments, "weight", shape=(128, 64)), "gated": True, "bias": bias})


def test_ups_among_the_gates_raise(arguments):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match="linear: up_distance: expected at least out_features, 64, got 56"):
        extension.gemm(**{**change(arguments, "weight", shape=(112, 64)), "gated": True})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tile", "gated"), TILES, ids=name_of)
def test_every_tile_errs_no_more_than_torch(sm90, poison, tile, gated, dtype):
    # A sum of few blocks of K cannot be shared.
    short = 8 + 64 * (tile.split_k - 1)
    # Full, nearly full and nearly empty tiles; features that fill no tile, no block of K and no split evenly.
    cases = [
        (tile.tokens, 1536, 1024),
        (tile.tokens - 4, 3600, 4096),
        (1, 16, short),
        (min(7, tile.tokens), 1040, 1224),
        (tile.tokens - 9, 2064, max(short, 72)),
        (tile.tokens // 4 + 1, 3 * tile.rows, 1032),
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
