"""How the extension's product in e4m3 is cut."""

from __future__ import annotations

import functools

from blockbatch_kernels.tuning.records import H100, DeviceKind, LinearTile

# csrc/gemm/linear_fp8.cu compiles these.
LINEAR_FP8_TILES = (
    *(LinearTile(tokens, rows) for tokens in (16, 32, 64, 128) for rows in (64, 128, 192)),
    *(LinearTile(tokens, 64, split_k=2) for tokens in (16, 32, 64, 128)),
    LinearTile(128, 128, split_k=2),
    *(LinearTile(256, rows, multicast=2) for rows in (64, 128, 192)),
)
# Elements of a weight that are there in fp32 at a time, where no kernel computes.
FP8_PIECE = 1 << 24
_MOST_TOKENS = max(tile.tokens for tile in LINEAR_FP8_TILES)
# A launch that fills no processor, and a sum too short to be shared, are not worth a tile.
_MIN_OUT_FEATURES, _MIN_SPLIT_IN_FEATURES = 1024, 2048


def fp8_candidates(num_tokens: int, out_features: int, in_features: int) -> tuple[LinearTile, ...]:
    """The compiled tiles that take the product."""
    if num_tokens < 1 or out_features < 1 or out_features % 8 or in_features < 1 or in_features % 16:
        return ()
    tokens = min((tile.tokens for tile in LINEAR_FP8_TILES if tile.tokens >= num_tokens), default=None)
    return tuple(
        tile
        for tile in LINEAR_FP8_TILES
        if tile.tokens == tokens and (tile.split_k == 1 or in_features >= _MIN_SPLIT_IN_FEATURES)
    )


@functools.cache
def linear_fp8_tile(
    num_tokens: int, out_features: int, in_features: int, *, device_kind: DeviceKind = H100
) -> LinearTile | None:
    """The tile of a product; None: nothing takes the sizes, or the library is to compute.

    A rule: the tile whose processors have the least to do, over all waves; of equals the largest.
    """
    if num_tokens > _MOST_TOKENS or out_features < _MIN_OUT_FEATURES:
        return None
    ways = fp8_candidates(num_tokens, out_features, in_features)
    best = min(ways, key=lambda tile: _cost(tile, out_features, device_kind), default=None)
    # Pairs that share tokens are slower than the library in their second wave (fp8_step.json, gate and up of
    # 252 tokens).
    if best is not None and best.multicast > 1 and _ctas(best, out_features) > device_kind.num_sms:
        return None
    return best


def _ctas(tile: LinearTile, out_features: int) -> int:
    return -(-out_features // tile.rows) * tile.split_k * tile.multicast


def _cost(tile: LinearTile, out_features: int, device_kind: DeviceKind) -> tuple[float, int]:
    """Rows that a processor works on, one wave after the other; half of a sum counts as half of its rows.

    A tile of 64 rows computes no faster than one of 96: one warpgroup alone waits for its own additions.
    """
    waves = -(-_ctas(tile, out_features) // device_kind.num_sms)
    return waves * max(tile.rows, 96) / tile.split_k, -tile.rows
