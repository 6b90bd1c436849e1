"""Launch configurations as data, each with the reason for its value."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Which backend serves an operator by default, the first that can run it; operators not named here: CUDA C++,
# then Triton.
PREFERENCE: dict[str, tuple[str, ...]] = {}


class AttentionShape(NamedTuple):
    """How `attention_plan` may cut the work."""

    tile_tokens: int  # queries a tile; times the query heads of a kv head: rows of the matrix product
    segment_pages: int  # pages that are compared between rows and cut as one
    max_segments: int  # segments a row
    max_pieces: int  # bounds the memory of partial results
    max_tiles: int
    target_tiles: int  # keys are cut finer until there are as many tiles
    min_segments: int  # but no piece gets shorter than this for it


_SEGMENT_KEYS = 128
_MIN_PIECE_KEYS = 256
# Partial results: at most this many packed queries over all pieces (32 heads x 128 x 4 bytes: 16 KiB each).
_MAX_PARTIALS = 4096
_MAX_PIECES = 32


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def attention_shape(
    num_tokens: int, num_heads: int, num_kv_heads: int, page_size: int, pages_per_row: int, processors: int
) -> AttentionShape:
    """The cut for a step of `num_tokens` packed queries."""
    # 64 rows are one warpgroup's product; long packs come from whole rows, where a tile of 128 reads K half
    # as often.
    tile_rows = 128 if num_tokens > 1024 else 64
    tile_tokens = max(1, tile_rows // (num_heads // num_kv_heads))
    segment_pages = max(1, _SEGMENT_KEYS // page_size)
    max_pieces = max(1, min(_MAX_PIECES, _MAX_PARTIALS // max(1, num_tokens)))
    return AttentionShape(
        tile_tokens=tile_tokens,
        segment_pages=segment_pages,
        max_segments=-(-pages_per_row // segment_pages),
        max_pieces=max_pieces,
        # Every group may end with a tile that is not full: `attention_plan` adds the rows.
        max_tiles=max_pieces * -(-num_tokens // tile_tokens),
        # Fewer than this leave processors idle; more only add partial results.
        target_tiles=-(-3 * processors // (4 * num_kv_heads)),
        min_segments=max(1, _MIN_PIECE_KEYS // (segment_pages * page_size)),
    )
