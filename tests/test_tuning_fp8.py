"""Which tile computes a product in e4m3: only what is compiled, and only what the kernel takes."""

import random
import re
from pathlib import Path

import pytest

from blockbatch_kernels import tuning
from blockbatch_kernels.tuning import gemm_fp8, rows_fp8

ROOT = Path(__file__).parents[1]
WIDE = tuning.Fp8Tile(192, 128, x_multicast=2, waves=True)


def shapes_in(source):
    """What the list of a source file compiles, as integers."""
    text = (ROOT / "csrc" / "gemm" / source).read_text()
    return [tuple(map(int, line.split(", "))) for line in re.findall(r"  V\(([\d, ]+)\)", text)]


def few(source):
    """Tiles for few tokens."""
    return [
        tuning.Fp8Tile(
            tokens * (more[1] if more else multicast), 64 * groups, split_k, multicast, x_multicast, *more[:1]
        )
        for tokens, groups, _, split_k, multicast, x_multicast, *more in shapes_in(source)
    ]


def test_the_table_is_what_is_compiled():
    waves = [
        tuning.Fp8Tile(tokens * multicast, 64 * groups, 1, multicast, x_multicast, *more, waves=True)
        for tokens, groups, _, multicast, x_multicast, *more in shapes_in("linear_fp8_waves.cu")
    ]
    plain, gated = [few(source) + waves for source in ("linear_fp8.cu", "linear_swiglu_fp8.cu")]
    for compiled, table in ((plain, tuning.LINEAR_FP8_TILES), (gated, tuning.GATED_FP8_TILES)):
        assert len(compiled) == len(set(compiled)) and set(compiled) == set(table)
    assert set(gated) <= set(plain)  # so that each can be compared with the product alone
    names = [tuning.fp8_tile_name(tile) for tile in plain]
    assert len(names) == len(set(names))


def test_rotated_tiles_are_what_is_compiled():
    num_waves = sum(tile.waves for tile in tuning.ROTATED_FP8_TILES)
    shapes = shapes_in("linear_rope_fp8.cu")  # those of waves stand behind the others
    few = [
        tuning.Fp8Tile(tokens * multicast, 64 * groups, split_k, multicast)
        for tokens, groups, _, split_k, multicast in shapes[:-num_waves]
    ]
    waves = [
        tuning.Fp8Tile(tokens * multicast, 64 * groups, 1, multicast, x_multicast, waves=True)
        for tokens, groups, _, multicast, x_multicast in shapes[-num_waves:]
    ]
    assert len(shapes) == len(set(tuning.ROTATED_FP8_TILES))
    assert {*few, *waves} == set(tuning.ROTATED_FP8_TILES) <= set(tuning.LINEAR_FP8_TILES)


def test_what_rotates_has_the_sums_of_the_product():
    """Whatever the table says: the same split of K, and room for all tokens."""
    assert tuning.rotated_fp8_tile(None, 8, 12288) is None
    for tile in tuning.LINEAR_FP8_TILES:
        for tokens in (1, 16, 64, 128, 129, 192, 256, 700, 1280):
            if tokens > tile.tokens and not tile.waves:
                continue
            for out_features in (4608, 6144, 12288):
                rotated = tuning.rotated_fp8_tile(tile, tokens, out_features)
                if rotated is not None:
                    assert rotated in tuning.ROTATED_FP8_TILES and rotated.split_k == tile.split_k
                    assert rotated.waves or tokens <= rotated.tokens
                elif tokens > 128:
                    assert tile.split_k > 1
    # LLaDA-8B, whole and on two GPUs: everything of one launch that is not shared along K.
    for out_features in (12288, 6144):
        for tokens in range(1, 2000):
            tile = tuning.linear_fp8_tile(tokens, out_features, 4096)
            assert tile is None or tuning.rotated_fp8_tile(tile, tokens, out_features) is not None
    assert tuning.rotated_fp8_tile(WIDE, 192, 12288) == tuning.Fp8Tile(256, 192, multicast=2, waves=True)
    assert tuning.rotated_fp8_tile(WIDE, 256, 6144) == tuning.Fp8Tile(256, 128, multicast=2, waves=True)


def test_the_measured_rows_name_tiles_with_room():
    for row in (row for rows in rows_fp8.PRODUCTS.values() for row in rows):
        tiles = gemm_fp8._tiles_by_name(row.gated)
        for tokens, name in row.choices:
            room = name in ("library", "apart") or tiles[name].waves or tokens <= tiles[name].tokens
            assert room, (row, name)


def test_a_row_of_the_table_is_looked_up(monkeypatch):
    choices = ((128, "128x192"), (256, "apart"), (1280, "160x128 x_multicast 2 waves"))
    row = tuning.Fp8Row("fp8_tiles.json: m/p", 4096, 1024, True, choices)
    monkeypatch.setattr(rows_fp8, "PRODUCTS", {tuning.H100: (row,)})
    for cached in (gemm_fp8.linear_fp8_tile, gemm_fp8._row_of):
        cached.cache_clear()
    found = [tuning.linear_fp8_tile(tokens, 4096, 1024, gated=True) for tokens in (1, 128, 129, 257, 5000)]
    waves = tuning.Fp8Tile(160, 128, x_multicast=2, waves=True)
    assert found == [tuning.Fp8Tile(128, 192)] * 2 + [None] + [waves] * 2
    assert tuning.linear_fp8_tile(0, 4096, 1024, gated=True) is None
    assert tuning.linear_fp8_tile(64, 4096, 1024) == tuning.fp8_rule(64, 4096, 1024)
    for cached in (gemm_fp8.linear_fp8_tile, gemm_fp8._row_of):
        cached.cache_clear()


def test_a_tile_has_room_and_takes_the_sizes():
    rng = random.Random(0)
    for _ in range(500):
        tokens, out, inner = rng.randint(0, 400), 8 * rng.randint(0, 4000), 16 * rng.randint(0, 1000)
        tile = tuning.fp8_rule(tokens, out, inner)
        if tile is None:
            assert tokens < 1 or tokens > 256 or out < 1024 or inner < 16 or (tokens > 128 and out > 8192)
            continue
        assert tokens <= tile.tokens and tile in tuning.LINEAR_FP8_TILES
        assert inner > 128 * (tile.split_k - 1)
        smaller = [t.tokens for t in tuning.LINEAR_FP8_TILES if tokens <= t.tokens and not t.waves]
        assert tile.tokens == min(smaller)


@pytest.mark.parametrize("sizes", [(8, 4097, 4096), (8, 4096, 4088), (8, 512, 4096), (257, 4096, 4096)])
def test_other_sizes_have_none(sizes):
    assert tuning.fp8_rule(*sizes) is None


def test_few_rows_are_shared_by_two_processors():
    """LLaDA-8B's output product has 64 tiles of 64 rows, half of an H100."""
    assert tuning.fp8_rule(64, 4096, 4096).split_k == 2
    assert tuning.fp8_rule(64, 24576, 4096).split_k == 1


def test_two_waves_of_pairs_go_to_the_library():
    assert tuning.fp8_rule(252, 12288, 4096).multicast == 2
    assert tuning.fp8_rule(252, 24576, 4096) is None
    assert tuning.fp8_rule(128, 24576, 4096).multicast == 1


def test_a_head_in_tiles_that_follow_each_other():
    """LLaDA-8B's, whole and of two ranks: more tiles than twice the processors."""
    for vocabulary in (126464, 63232):
        found = [
            tuning.fp8_rule(tokens, vocabulary, 4096) for tokens in (0, 1, 16, 33, 64, 65, 128, 129, 512)
        ]
        assert found[0] is None
        assert [(tile.tokens, tile.rows, tile.waves) for tile in found[1:]] == [
            (16, 192, False), (16, 192, False), (64, 192, False), (64, 192, False), (128, 192, True),
            (128, 192, True), (256, 192, True), (256, 192, True),
        ]  # fmt: skip
        for tokens in (1, 64, 128, 252, 512):
            tiles = tuning.fp8_candidates(tokens, vocabulary, 4096)
            assert any(tile.waves for tile in tiles) and tuning.fp8_rule(tokens, vocabulary, 4096) in tiles
    # No whole 8 rows, or no whole 16 columns: the library, or fp32.
    assert tuning.fp8_rule(128, 126465, 4096) is None and tuning.fp8_rule(128, 126464, 4104) is None
    assert not any(tile.waves for tile in tuning.fp8_candidates(128, 24576, 4096))


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 100, 256, 5000])
def test_the_triton_tile_fits_into_shared_memory(tokens):
    for most in (99 << 10, 227 << 10):
        tile = tuning.triton_linear_fp8(tokens, most)
        assert tile.shared_bytes() <= most and tile.num_stages >= 2
