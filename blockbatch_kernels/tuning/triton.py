"""Launch configurations of the Triton versions."""

from __future__ import annotations

from typing import NamedTuple


class TritonBlock(NamedTuple):
    """Elements of a Triton program of an elementwise operator."""

    block: int
    num_warps: int


class TritonAttention(NamedTuple):
    """How the Triton attention computes a tile over a piece of the keys."""

    block_m: int  # rows of a product: queries times query heads of a kv head
    block_n: int  # keys a step
    num_warps: int
    num_stages: int  # steps whose keys and values are in flight or in shared memory

    def shared_bytes(self, block_d: int, element_size: int) -> int:
        """Shared memory of a program: the queries, and keys and values of each stage."""
        return (self.block_m + 2 * self.num_stages * self.block_n) * block_d * element_size


class TritonCombine(NamedTuple):
    """How the Triton attention adds up partial results."""

    block_pieces: int  # loaded together
    block: int  # elements of a query's heads
    num_warps: int


class TritonLinearFp8(NamedTuple):
    """How the Triton product in e4m3 is cut."""

    block_rows: int  # of the weight
    block_tokens: int
    block_k: int  # columns that the tensor cores add up before their sums are added in fp32
    num_warps: int
    num_stages: int

    def shared_bytes(self) -> int:
        """Shared memory of a program: weights and activations of each stage."""
        return self.num_stages * (self.block_rows + self.block_tokens) * self.block_k


class TritonLmHead(NamedTuple):
    """How the Triton LM head reduces logits."""

    part_bytes: int  # logits that exist at the same time
    block: int  # logits of a row that one program reduces
    num_warps: int


# Parts that stay in L2 save less than the smaller products lose. The bound keeps long prompts' logits small.
TRITON_LM_HEAD = TritonLmHead(part_bytes=64 << 20, block=4096, num_warps=8)
# Fewer elements are slower, more change nothing.
TRITON_ELEMENTWISE = TritonBlock(block=1024, num_warps=4)
# More elements change nothing.
TRITON_ROPE = TritonBlock(block=512, num_warps=4)
# Smaller blocks are slower, whether there is one piece or two.
TRITON_COMBINE = TritonCombine(block_pieces=2, block=2048, num_warps=4)


def triton_row_warps(block: int) -> int:
    """Warps of a program that reduces a row of `block` elements: 16 elements a thread, at most 16 warps."""
    return min(16, max(1, block // 512))


# Tokens beyond which the library's product in e4m3 is asked.
TRITON_FP8_TOKENS = 256
# Tiles for at most so many tokens: up to 128 all of them in one, so that a weight is read once.
_LINEAR_FP8 = {
    16: TritonLinearFp8(64, 16, 128, num_warps=4, num_stages=8),
    32: TritonLinearFp8(64, 32, 128, num_warps=4, num_stages=8),
    64: TritonLinearFp8(64, 64, 128, num_warps=4, num_stages=6),
    128: TritonLinearFp8(128, 128, 128, num_warps=8, num_stages=5),
}


def triton_linear_fp8(num_tokens: int, shared_bytes: int) -> TritonLinearFp8:
    """For that many tokens; a program takes at most `shared_bytes` of shared memory."""
    tile = next((tile for tokens, tile in _LINEAR_FP8.items() if num_tokens <= tokens), _LINEAR_FP8[128])
    while tile.shared_bytes() > shared_bytes and tile.num_stages > 2:
        tile = tile._replace(num_stages=tile.num_stages - 1)
    return tile


# Attention programs a processor, of which two run at a time: the later ones go where a place becomes free.
# With two, which loop over the tiles, some end long after the others.
TRITON_ATTENTION_PROGRAMS = 8


def triton_attention(tile_rows: int, block_d: int, element_size: int, shared_bytes: int) -> TritonAttention:
    """For tiles of `tile_rows` rows of `block_d` elements (head_dim as a power of two).

    A program takes at most `shared_bytes` of shared memory.
    """
    block_m = min(128, max(16, 1 << (tile_rows - 1).bit_length()))
    if element_size == 4:
        # Products without tensor cores: larger blocks spill registers.
        config = TritonAttention(min(block_m, 64), 32, num_warps=8, num_stages=2)
        if block_d > 128:
            config = TritonAttention(16, 16, num_warps=8, num_stages=1)
    elif block_d > 128:
        config = TritonAttention(block_m, 32, num_warps=8 if block_m == 128 else 4, num_stages=2)
    elif block_m == 128:
        # Whole rows: shorter steps and fewer stages are slower.
        config = TritonAttention(block_m, 128, num_warps=8, num_stages=3)
    else:
        # Windows: two programs a processor, which longer steps or more stages leave no memory for; shorter
        # steps and fewer stages are slower.
        config = TritonAttention(block_m, 64, num_warps=4, num_stages=3)
    while config.shared_bytes(block_d, element_size) > shared_bytes and config.num_stages > 1:
        config = config._replace(num_stages=config.num_stages - 1)
    while config.shared_bytes(block_d, element_size) > shared_bytes and config.block_n > 16:
        config = config._replace(block_n=config.block_n // 2)
    return config
