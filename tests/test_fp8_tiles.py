"""Every tile of the extension's product in e4m3, with and without the activation behind it."""

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import tuning
from interpreter import DEVICE
from test_quantized import check_product, quantised

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("sm90")]

HALVES = (torch.bfloat16, torch.float16)
WAVES = [tile for tile in tuning.LINEAR_FP8_TILES if tile.waves]
# One warpgroup with 128 tokens: csrc/gemm/stretches.cuh.
AHEAD = [tile for tile in tuning.LINEAR_FP8_TILES if (tile.tokens // tile.multicast, tile.rows) == (128, 64)]


def names(value):
    return tuning.fp8_tile_name(value) if isinstance(value, tuning.Fp8Tile) else str(value)


@pytest.fixture
def on_tile(monkeypatch):
    """Makes all products run on one tile."""
    from blockbatch_kernels.cuda import gemm_fp8

    return lambda tile: monkeypatch.setattr(gemm_fp8, "tile_of", lambda *_: tile)


def check_activated(dtype, tokens, intermediate, inner):
    """Bit for bit the product of the same tile, then the activation of the same backend."""
    x, x_scale = quantised(tokens, inner, DEVICE, 5)
    weight, weight_scale = quantised(2 * intermediate, inner, DEVICE, 6)
    given = (x, x_scale * 2**-9, weight, weight_scale)
    got = bbk.linear_swiglu_fp8(*given, out_dtype=dtype, backend="cuda")
    product = bbk.linear_fp8(*given, out_dtype=dtype, backend="cuda")
    want = bbk.swiglu_fp8(product, backend="cuda")
    assert torch.equal(got[0].float(), want[0].float()) and torch.equal(got[1], want[1])
    assert product.isfinite().all() and got[0].float().isfinite().all()


@pytest.mark.parametrize("tile", tuning.LINEAR_FP8_TILES, ids=names)
def test_smallest(tile, on_tile):
    """One launch of each tile: what a run under compute-sanitizer has time for."""
    on_tile(tile)
    check_product("cuda", DEVICE, torch.bfloat16, tile.tokens - 3, tile.rows + 8, 272, True)


@pytest.mark.parametrize("tile", tuning.GATED_FP8_TILES, ids=names)
def test_smallest_activated(tile, on_tile):
    on_tile(tile)
    check_activated(torch.bfloat16, tile.tokens - 3, tile.rows // 2 + 8, 272)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", tuning.LINEAR_FP8_TILES, ids=names)
def test_every_tile(tile, dtype, on_tile, poisoned):
    on_tile(tile)
    # The bound of check_product is that of a usual sum: few results of millions may err further. What waves
    # compute of more is held by test_waves_give_the_bits_of_a_plain_tile.
    sizes = ((8, 272), (tile.rows + 8, 4096), (264 if tile.waves else 2048, 1040))
    for tokens in {1, tile.tokens - 3, tile.tokens}:
        for out, inner in sizes:
            check_product("cuda", DEVICE, dtype, tokens, out, inner, True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", tuning.GATED_FP8_TILES, ids=names)
def test_every_activated_tile(tile, dtype, on_tile, poisoned):
    on_tile(tile)
    for tokens in {1, tile.tokens - 3, tile.tokens}:
        for intermediate, inner in ((8, 272), (tile.rows + 8, 4096), (1032, 1040)):
            check_activated(dtype, tokens, intermediate, inner)


@pytest.mark.parametrize("tile", WAVES, ids=names)
def test_several_tiles_each(tile, on_tile, poisoned):
    """More tiles than processors, whose number is no multiple of what runs at once."""
    on_tile(tile)
    for tokens, out, inner in ((1301, 4096, 656), (700, 12296, 128)):
        check_product("cuda", DEVICE, torch.bfloat16, tokens, out, inner, True)
        check_activated(torch.bfloat16, tokens, out // 2 // 8 * 8, inner)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", WAVES, ids=names)
def test_waves_give_the_bits_of_a_plain_tile(tile, dtype, on_tile, poisoned):
    plain = tuning.Fp8Tile(128, 64)
    assert plain in tuning.LINEAR_FP8_TILES
    x, x_scale = quantised(384, 1040, DEVICE, 5)
    weight, weight_scale = quantised(2048, 1040, DEVICE, 6)
    options = dict(out_dtype=dtype, backend="cuda")
    for bias in (None, 100 * torch.randn(2048, device=DEVICE).to(dtype)):
        on_tile(tile)
        got = bbk.linear_fp8(x, x_scale, weight, weight_scale, bias, **options)
        on_tile(plain)
        for few in (slice(start, start + 128) for start in range(0, 384, 128)):
            want = bbk.linear_fp8(x[few], x_scale[few], weight, weight_scale, bias, **options)
            assert torch.equal(got[few], want)


@pytest.mark.parametrize("inner", [16, 144, 656, 1040, 2320, 4096])
@pytest.mark.parametrize("tile", AHEAD, ids=names)
def test_what_begins_ahead_changes_no_bits(tile, inner, on_tile, poisoned):
    """The sums of tiles that begin nothing ahead, for one block of K up to many."""
    plain = tuning.Fp8Tile(128, 128, tile.split_k)
    assert plain in tuning.LINEAR_FP8_TILES
    inner += 128 * (tile.split_k - 1)
    x, x_scale = quantised(tile.tokens, inner, DEVICE, 5)
    weight, weight_scale = quantised(2056, inner, DEVICE, 6)
    options = dict(out_dtype=torch.bfloat16, backend="cuda")
    on_tile(tile)
    got = bbk.linear_fp8(x, x_scale, weight, weight_scale, **options)
    on_tile(plain)
    for few in (slice(start, start + 128) for start in range(0, tile.tokens, 128)):
        want = bbk.linear_fp8(x[few], x_scale[few], weight, weight_scale, **options)
        assert torch.equal(got[few], want) and want.isfinite().all()


@pytest.mark.parametrize("tile", [*WAVES, *AHEAD, tuning.Fp8Tile(128, 128, 2)], ids=names)
def test_the_same_bits_every_time(tile, on_tile):
    """A race of a tile with its neighbours would show."""
    on_tile(tile)
    x, x_scale = quantised(700 if tile.waves else tile.tokens, 4096, DEVICE, 1)
    weight, weight_scale = quantised(8192, 4096, DEVICE, 2)
    options = dict(out_dtype=torch.bfloat16, static_weight=True, backend="cuda")
    first = bbk.linear_fp8(x, x_scale, weight, weight_scale, **options)
    for _ in range(20):
        assert torch.equal(bbk.linear_fp8(x, x_scale, weight, weight_scale, **options), first)
