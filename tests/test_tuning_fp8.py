"""Which tile computes a product in e4m3: only what is compiled, and only what the kernel takes."""

import random
import re
from pathlib import Path

import pytest

from blockbatch_kernels import tuning

ROOT = Path(__file__).parents[1]


def test_the_table_is_what_is_compiled():
    source = (ROOT / "csrc" / "gemm" / "linear_fp8.cu").read_text()
    lines = re.findall(r"V\((\d+), (\d+), (\d+), (\d+), (\d+)\)", source)
    compiled = {
        tuning.LinearTile(int(tokens) * int(multicast), 64 * int(groups), int(split_k), int(multicast))
        for tokens, groups, _, split_k, multicast in lines
    }
    assert len(compiled) == len(lines) and compiled == set(tuning.LINEAR_FP8_TILES)


def test_a_tile_has_room_and_takes_the_sizes():
    rng = random.Random(0)
    for _ in range(500):
        tokens, out, inner = rng.randint(0, 400), 8 * rng.randint(0, 4000), 16 * rng.randint(0, 1000)
        tile = tuning.linear_fp8_tile(tokens, out, inner)
        if tile is None:
            assert tokens < 1 or tokens > 256 or out < 1024 or inner < 16 or (tokens > 128 and out > 8192)
            continue
        assert tokens <= tile.tokens and tile in tuning.LINEAR_FP8_TILES
        assert inner > 128 * (tile.split_k - 1)
        smaller = [other.tokens for other in tuning.LINEAR_FP8_TILES if tokens <= other.tokens]
        assert tile.tokens == min(smaller)


@pytest.mark.parametrize("sizes", [(8, 4097, 4096), (8, 4096, 4088), (8, 512, 4096), (257, 4096, 4096)])
def test_other_sizes_have_none(sizes):
    assert tuning.linear_fp8_tile(*sizes) is None


def test_few_rows_are_shared_by_two_processors():
    """LLaDA-8B's output product has 64 tiles of 64 rows, half of an H100."""
    assert tuning.linear_fp8_tile(64, 4096, 4096).split_k == 2
    assert tuning.linear_fp8_tile(64, 24576, 4096).split_k == 1


def test_two_waves_of_pairs_go_to_the_library():
    assert tuning.linear_fp8_tile(252, 12288, 4096).multicast == 2
    assert tuning.linear_fp8_tile(252, 24576, 4096) is None
    assert tuning.linear_fp8_tile(128, 24576, 4096).multicast == 1


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 100, 256, 5000])
def test_the_triton_tile_fits_into_shared_memory(tokens):
    for most in (99 << 10, 227 << 10):
        tile = tuning.triton_linear_fp8(tokens, most)
        assert tile.shared_bytes() <= most and tile.num_stages >= 2
