"""Launch configurations as data, each with the reason for its value."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from blockbatch_kernels.shapes import STRETCH_INTEGERS, UNIT_INTEGERS, UNIT_KEYS  # noqa: F401 (aliases)

# Of attention, by either compiled backend.
MAX_HEAD_DIM = 256
# Sizes beyond which a compiled backend refuses an operator.
_POLICY_LIMITS = {"cuda": {"num_branches": 32, "num_eos_tokens": 32}}
_LIMITS: dict[str, dict[str, dict[str, int]]] = {
    "varlen_attention": {"cuda": {"head_dim": MAX_HEAD_DIM}, "triton": {"head_dim": MAX_HEAD_DIM}},
    "initial_plan": _POLICY_LIMITS,
    "decode_policy": _POLICY_LIMITS,
    "copy_pages": {"cuda": {"num_branches": 32}},
}


def preference(op: str, **sizes: int) -> tuple[str, ...]:
    """The compiled backends that take `op` in these sizes, fastest first. A size not given is no obstacle."""
    order = ("cuda", "triton")
    if op == "varlen_attention" and not _cuda_attention_is_faster(**sizes):
        order = ("triton", "cuda")
    limits = _LIMITS.get(op, {})
    return tuple(
        name
        for name in order
        if all(sizes.get(size, 0) <= most for size, most in limits.get(name, {}).items())
    )


def _cuda_attention_is_faster(
    *, num_tokens: int = 0, num_keys: int = 0, head_dim: int = 0, element_size: int = 2, units: int = 0
) -> bool:
    """Whether CUDA C++ wins on a pack of `num_tokens` over at most `num_keys` keys a row.

    Where the plan has units it does, see `plans_units`. Without: microseconds a layer on an H100 in bf16,
    CUDA C++ (Triton), 32 heads of 128 elements: six rows of 1280 421 (469); 252 tokens in six rows with pages
    of their own over 1280 keys 51 (52), over 4352 159 (160); 32 tokens over 4096 keys 39 (35).
    """
    if element_size != 2 or head_dim not in (64, 128):
        return False  # not on the tensor cores
    return units > 0 or num_tokens > 1024


class AttentionShape(NamedTuple):
    """How `attention_plan` may cut the work."""

    tile_tokens: int  # queries a tile; times the query heads of a kv head: rows of the matrix product
    segment_pages: int  # pages that are compared between rows and cut as one
    max_segments: int  # segments a row
    max_pieces: int  # bounds the memory of partial results
    max_tiles: int
    target_tiles: int  # keys are cut finer until there are as many tiles
    min_segments: int  # but no piece gets shorter than this for it
    num_heads: int = 0  # of the queries and of the keys that the plan is for
    num_kv_heads: int = 0
    block_tokens: int = 0  # tokens of a block of a unit's tile; 0: no units are planned
    processors: int = 0  # that share the units
    max_slack: int = 0  # units beyond an equal share that a processor takes if this keeps tiles apart

    def max_units(self, num_tokens: int, num_rows: int, page_size: int) -> int:
        """Records of a plan's units; 0: none are planned."""
        if not self.block_tokens:
            return 0
        # A row adds at most one block that is not full to its full ones.
        units = self.max_segments * -(-self.segment_pages * page_size // UNIT_KEYS)
        return 1 + (num_tokens // self.block_tokens + num_rows) * units


# A stretch of units gets no shorter than this for the sake of another processor.
MIN_STRETCH_UNITS = 2
# Microseconds a layer on an H100: six rows of Dream-7B with pages of their own take 19.9 with 1, 22.8 with 0.
# With 2, LLaDA-8B's private windows behind a shared prompt would be kept whole: 29.1 instead of 27.3.
_MAX_SLACK = 1
_BLOCK_ROWS = 64

_SEGMENT_KEYS = 128
_MIN_PIECE_KEYS = 256
# Partial results: at most this many packed queries over all pieces (32 heads x 128 x 4 bytes: 16 KiB each).
MAX_PARTIALS = 2048
_MAX_PIECES = 32


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# Keys and values of different rows that stay in L2 together, in keys times kv heads: 48 MiB in 16 bits and
# 128 elements a head.
_KEYS_IN_L2 = (48 << 20) // 512
# Rows with pages of their own for which units are the fastest whatever their length.
_FEW_ROWS = 3


@functools.cache
def _runs_units(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def plans_units(
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    pages_per_row: int,
    distinct_rows: int,
    device: torch.device,
) -> bool:
    """Whether the kernel that takes its work in units is the fastest for attention on `device`.

    It reads keys once for 128 rows of the product, so pages that rows share or that stay in L2 cost little.
    Microseconds a layer on an H100 in bf16 (the faster of the others); 32 heads of 128 elements, or
    Dream-7B's 28 with 4 kv heads. 252 tokens in six rows: on the same pages 21.3 (23.6); a shared prompt of
    1024 and private windows 26.4 (33.3), the same over 512 keys 20.4 (26.0), over 4352 51.3 (81.3); pages of
    their own 53.0 (50.8), over 4352 keys 155 (159); Dream-7B 19.8 (29.2), pages of their own 20.5 (22.9).
    Pages of their own in fewer rows: 224 tokens in three 32.0 (35.2), 192 in two 26.0 (28.5). One row of 8
    tokens 15.1 (16.2), of 128 19.2 (21.3), of 256 21.0 (23.1), of 1280 62 (83), of 4096 551 (689). Whole rows
    of 1280 tokens: two 120 (140), three 219 (218), six 501 (421), six of Dream-7B 306 (370).

    Args:
        page_size: keys a page.
        pages_per_row: pages that a row may have.
        distinct_rows: rows that read pages of their own; see `attention_plan`.
    """
    if num_heads // num_kv_heads > _BLOCK_ROWS or page_size % 16 or not _runs_units(device):
        return False
    keys = distinct_rows * pages_per_row * page_size * num_kv_heads
    return distinct_rows <= _FEW_ROWS or keys <= _KEYS_IN_L2


@functools.cache
def attention_shape(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    pages_per_row: int,
    processors: int,
    *,
    units: bool = False,
) -> AttentionShape:
    """The cut for a step of `num_tokens` packed queries; `units`: whether to plan them too."""
    # 64 rows are one warpgroup's product; long packs come from whole rows, where a tile of 128 reads K half
    # as often.
    tile_rows = 128 if num_tokens > 1024 else 64
    tile_tokens = max(1, tile_rows // (num_heads // num_kv_heads))
    segment_pages = max(1, _SEGMENT_KEYS // page_size)
    max_pieces = max(1, min(_MAX_PIECES, MAX_PARTIALS // max(1, num_tokens)))
    group = num_heads // num_kv_heads
    return AttentionShape(
        tile_tokens=tile_tokens,
        segment_pages=segment_pages,
        max_segments=-(-pages_per_row // segment_pages),
        max_pieces=max_pieces,
        # Every group may end with a tile that is not full: `attention_plan` adds the rows.
        max_tiles=max_pieces * -(-num_tokens // tile_tokens),
        # With fewer, some processors get one tile and others two: 252 queries on shared pages take 30 us in
        # 128 products of the whole length, 23 in twice as many of half. More only add partial results.
        target_tiles=processors // num_kv_heads + 1,
        min_segments=max(1, _MIN_PIECE_KEYS // (segment_pages * page_size)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_tokens=_BLOCK_ROWS // group if units else 0,
        processors=processors if units else 0,
        max_slack=_MAX_SLACK if units else 0,
    )


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


class TritonLmHead(NamedTuple):
    """How the Triton LM head reduces logits."""

    part_bytes: int  # logits that exist at the same time
    block: int  # logits of a row that one program reduces
    num_warps: int


# Parts that stay in L2 save less than the smaller products lose: at 256 rows 475 us in one part, 491 in parts
# of 16 MiB. The bound keeps long prompts' logits small.
TRITON_LM_HEAD = TritonLmHead(part_bytes=64 << 20, block=4096, num_warps=8)
# 4.0 us at 256 x 24,576; 512 elements take 5.3, more change nothing.
TRITON_ELEMENTWISE = TritonBlock(block=1024, num_warps=4)
# 512 to 2048 elements take the same 4 us at 256 tokens of 3 x 32 heads.
TRITON_ROPE = TritonBlock(block=512, num_warps=4)
# 3.1 us for 252 queries x 32 heads in two pieces, 1.7 where there is one; blocks of 512 take 3.5 and 3.7.
TRITON_COMBINE = TritonCombine(block_pieces=2, block=2048, num_warps=4)


def triton_row_warps(block: int) -> int:
    """Warps of a program that reduces a row of `block` elements: 16 elements a thread, at most 16 warps."""
    return min(16, max(1, block // 512))


# Attention programs a processor, of which two run at a time: the later ones go where a place becomes free.
# With two, which loop over the tiles, 252 queries that share 1024 of 1280 keys take 41 us instead of 33.
TRITON_ATTENTION_PROGRAMS = 8


def triton_attention(tile_rows: int, block_d: int, element_size: int, shared_bytes: int) -> TritonAttention:
    """For tiles of `tile_rows` rows of `block_d` elements (head_dim as a power of two).

    A program takes at most `shared_bytes` of shared memory. Times are those of 32 heads of 128 elements and
    1280 keys on an H100.
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
        # One row of 1280 queries: 91 us, 95 with steps of 64 keys, 101 with two stages.
        config = TritonAttention(block_m, 128, num_warps=8, num_stages=3)
    else:
        # 252 queries of 6 rows, a part of the keys shared: 33 us, 37 with steps of 32 keys or two stages (two
        # programs a processor either way), 40 with four (one program), 45 with steps of 128.
        config = TritonAttention(block_m, 64, num_warps=4, num_stages=3)
    while config.shared_bytes(block_d, element_size) > shared_bytes and config.num_stages > 1:
        config = config._replace(num_stages=config.num_stages - 1)
    while config.shared_bytes(block_d, element_size) > shared_bytes and config.block_n > 16:
        config = config._replace(block_n=config.block_n // 2)
    return config


# Kernels between two products wait on the device for their predecessor instead of being launched after it.
PROGRAMMATIC_LAUNCH = True

# Memory for the logits of one chunk of the vocabulary: 512 rows of 131,072 16-bit logits. One chunk is
# fastest (H100, 126,464 x 4096, bf16): 256 rows take 457 us, and 463, 475 and 498 in 2, 4 and 8 chunks; 512
# rows take 772, and 849 in 4. The weights that stream through L2 evict a chunk that would fit before it is
# reduced, and narrow products are slower (433 us in one, 451 in 8).
LM_HEAD_LOGITS_BYTES = 128 << 20


# The extension's own product keeps of the logits what is wanted of them. Microseconds on an H100 beside those
# of cuBLAS and a reduction, 126,464 x 4096 in bf16: 8 rows 349 (372), 32 rows 355 (390), 128 rows 374 (403),
# where reading the weight alone takes 343. A pair of processors for each tile of 252 rows takes 483 (454).
_LM_HEAD_TILES = (16, 64, 128)


def lm_head_tile(num_rows: int, vocab_size: int, dim: int) -> int:
    """Rows that the LM head without logits has room for; 0: it is not faster, or does not take the sizes."""
    if dim % 8 or vocab_size < _MIN_LM_HEAD_VOCABULARY:
        return 0
    return next((tile for tile in _LM_HEAD_TILES if 1 <= num_rows <= tile), 0)


class LinearTile(NamedTuple):
    """How the extension's product with a weight is cut; csrc/gemm/linear.cu compiles these."""

    tokens: int  # room for tokens in a tile
    rows: int  # of the weight in a tile
    split_k: int = 1  # processors that share the sum of a tile
    multicast: int = 1  # processors that share one read of the weight, each for a part of the tokens


# Microseconds of the product with a weight read from memory, on an H100 (launched early in a graph), beside
# cuBLAS: LLaDA-8B's qkv / out / down with 16 tokens 34.9 / 12.8 / 36.1 (36.8 / 16.8 / 40.5), with 64 tokens
# 36.3 / 13.2 / 35.5 (38.5 / 15.0 / 42.4), with 128 tokens 36.8 / 14.4 / 37.3 (39.8 / 15.2 / 40.0), with 192
# tokens 38.4 / 15.3 / 40.7 (41.0 / 16.0 / 44.3), with 252 tokens 41.0 / 15.6 / 46.3 (42.9 / 19.6 / 53.8). In
# between, where a tile is not full: with 32 tokens 36.8 / 13.1 / 34.9 (39.8 / 14.1 / 39.5), with 160 tokens
# 38.6 / 15.2 / 38.8 (40.0 / 14.7 / 45.7). A step of 192 tokens takes 7.77 ms instead of 8.03, one of 252
# 8.14 instead of 8.22, and 50 in a row, where the power limit slows the GPU down, 7.86 each instead of 8.12,
# and 8.48 instead of 8.71.
LINEAR_TILES = (
    LinearTile(16, 64),
    LinearTile(64, 64),
    LinearTile(64, 64, split_k=2),
    LinearTile(128, 64),
    LinearTile(128, 64, split_k=2),
    LinearTile(128, 128),
    LinearTile(192, 64, split_k=2),
    LinearTile(192, 128),
    LinearTile(256, 64, multicast=2),
    LinearTile(256, 192, multicast=2),
)
# Those that can rotate q and k and write the cache behind the product of q, k and v (csrc/gemm/linear_rope.cu
# compiles them): what serves LLaDA-8B up to 256 tokens and Dream-7B up to 128. Milliseconds a step on an
# H100, in turns with the rotation in a launch of its own (in parentheses): LLaDA-8B with 32 tokens 5.96
# (5.94), 128 tokens 6.55 (6.63), 252 tokens 8.28 (8.25), with pages of their own 8.95 (8.95): in long steps
# the power limit takes back what the launch saved. Before angles were fetched ahead 192 tokens 7.40 (7.46),
# Dream-7B with 32 tokens 5.64 (5.71).
ROTATED_TILES = (
    LinearTile(16, 64),
    LinearTile(64, 64),
    LinearTile(128, 64),
    LinearTile(128, 128),
    LinearTile(192, 128),
    LinearTile(256, 192, multicast=2),
)
# With the activation in the same kernel, against cuBLAS without it: 16 tokens 66.6 (73.8), 64 tokens 68.1
# (75.6), 128 tokens 69.8 (78.2), 192 tokens 71.7 (80.1), 252 tokens 75.9 (82.6). 32 layers, one after another
# on a warm GPU, with cuBLAS for the rest (for everything): 64 tokens 5.37 ms (5.55), 128 tokens 5.49 (5.63),
# 192 tokens 6.02 (6.17), 252 tokens 6.21 (6.52). All products here: 64 tokens 4.91 ms, 128 tokens 5.25, 192
# tokens 5.86. Dream-7B's 37,888 rows are a wave and a half, the half shared by two processors a tile: a whole
# step of 192 tokens takes 7.06 ms instead of 7.57, one of 252 7.46 instead of 7.79. Its other products beyond
# 128 tokens fill too few processors: a step of 252 on 112 of them takes 7.64, where cuBLAS cuts the sum.
GATED_TILES = (
    LinearTile(16, 192),
    LinearTile(64, 192),
    LinearTile(128, 192),
    LinearTile(192, 192),
    LinearTile(192, 192, split_k=2),
    LinearTile(256, 192),
    LinearTile(256, 192, split_k=2),
)
# Of an H100 or H200; a constant, so that the same shape is computed in the same way everywhere.
_LINEAR_PROCESSORS = 132
_MIN_LINEAR_ROWS = 2048
# A tile of 192 tokens for every processor.
_MIN_LM_HEAD_VOCABULARY = 192 * _LINEAR_PROCESSORS
_MIN_SPLIT_IN_FEATURES = 1024
# Beyond 128 tokens, by processors that work on one tile: alone, 96 of 132 are still faster than cuBLAS.
_MIN_FILL = {1: 0.7, 2: 0.9}


def _fill(tile: LinearTile, rows: int) -> float:
    """The share of the processors that compute, over all waves: what a last wave leaves idle is lost."""
    ctas = -(-rows // tile.rows) * tile.split_k * tile.multicast
    return ctas / (-(-ctas // _LINEAR_PROCESSORS) * _LINEAR_PROCESSORS)


class LinearPart(NamedTuple):
    """Neighbouring features of a product that one launch computes."""

    features: int
    tile: LinearTile


@functools.cache
def linear_parts(
    num_tokens: int, out_features: int, in_features: int, *, gated: bool
) -> tuple[LinearPart, ...]:
    """The launches of a product, by feature; none: cuBLAS is at least as fast, or nothing takes the shape."""
    rows = 2 * out_features if gated else out_features
    tiles = GATED_TILES if gated else LINEAR_TILES
    largest = max(tile.tokens for tile in tiles)
    if not 1 <= num_tokens <= largest or rows < _MIN_LINEAR_ROWS or out_features % 8 or in_features % 8:
        return ()
    tokens = min(tile.tokens for tile in tiles if tile.tokens >= num_tokens)
    if gated:
        return _gated_parts(tokens, out_features, in_features)
    tile = _linear_tile(tokens, rows, in_features)
    return () if tile is None else (LinearPart(out_features, tile),)


def _gated_parts(tokens: int, out_features: int, in_features: int) -> tuple[LinearPart, ...]:
    tile = LinearTile(tokens, 192)
    # Up to 128 tokens memory decides.
    if tokens <= 128 or _fill(tile, 2 * out_features) >= 0.9:
        return (LinearPart(out_features, tile),)
    # Whole waves of processors, and the tiles that are left shared by two processors each.
    wave = _LINEAR_PROCESSORS * tile.rows // 2
    whole, half = out_features // wave * wave, tile._replace(split_k=2)
    if whole == 0 or in_features < _MIN_SPLIT_IN_FEATURES:
        return ()
    if -(-2 * (out_features - whole) // tile.rows) * 2 > _LINEAR_PROCESSORS:
        return ()
    if _fill(half, 2 * (out_features - whole)) < 0.9:
        return ()
    return LinearPart(whole, tile), LinearPart(out_features - whole, half)


def _linear_tile(tokens: int, rows: int, in_features: int) -> LinearTile | None:
    if tokens > 128:
        # Beyond, arithmetic counts as well: the largest tile that leaves few processors idle.
        wide = sorted((tile for tile in LINEAR_TILES if tile.tokens == tokens), key=lambda tile: -tile.rows)
        filled = (tile for tile in wide if _fill(tile, rows) >= _MIN_FILL[tile.split_k * tile.multicast])
        return next(filled, None) if in_features >= _MIN_SPLIT_IN_FEATURES else None
    if tokens == 16:
        return LinearTile(tokens, 64)
    if -(-rows // 64) * 2 <= _LINEAR_PROCESSORS and in_features >= _MIN_SPLIT_IN_FEATURES:
        return LinearTile(tokens, 64, split_k=2)
    return LinearTile(tokens, 64 if tokens == 64 or rows <= 8192 else 128)
