"""How the extension's product in e4m3 is cut."""

from __future__ import annotations

import functools

from blockbatch_kernels.tuning import rows_fp8
from blockbatch_kernels.tuning.gemm import measured_at
from blockbatch_kernels.tuning.records import H100, DeviceKind, Fp8Row, Fp8Tile, of_kind

# One launch for at most so many tokens, each tile to a processor of its own: csrc/gemm/linear_fp8.cu.
_FEW = (
    *(Fp8Tile(tokens, rows) for tokens in (16, 32, 64, 128) for rows in (64, 128, 192)),
    *(Fp8Tile(tokens, 64, split_k=2) for tokens in (16, 32, 64, 128)),
    Fp8Tile(128, 128, split_k=2),
    *(Fp8Tile(256, rows, multicast=2) for rows in (64, 128, 192)),
)
# csrc/gemm/linear_fp8_waves.cu, with and without the activation.
_WAVES = (
    *(
        Fp8Tile(tokens * multicast, rows, multicast=multicast, x_multicast=3 - multicast, waves=True)
        for tokens, rows in ((128, 128), (128, 192), (160, 128), (192, 128))
        for multicast in (1, 2)
    ),
    Fp8Tile(256, 192, multicast=2, x_multicast=2, waves=True),
    Fp8Tile(320, 128, multicast=2, x_multicast=2, waves=True),
)
LINEAR_FP8_TILES = (*_FEW, *_WAVES)
# With the activation in the same kernel: csrc/gemm/linear_swiglu_fp8.cu.
GATED_FP8_TILES = (
    *(Fp8Tile(tokens, 192) for tokens in (16, 32, 64, 128)),
    Fp8Tile(256, 192, multicast=2),
    *_WAVES,
)
# Those that can rotate q and k and write the cache behind the product of q, k and v; which products take them
# says `rotated_fp8_tile`: csrc/gemm/linear_rope_fp8.cu.
ROTATED_FP8_TILES = (
    *(Fp8Tile(tokens, rows) for tokens in (16, 32, 64) for rows in (64, 128)),
    Fp8Tile(128, 64),
    Fp8Tile(128, 128),
    Fp8Tile(128, 128, split_k=2),
    Fp8Tile(256, 128, multicast=2),
    Fp8Tile(256, 128, multicast=2, waves=True),
    Fp8Tile(256, 192, multicast=2, waves=True),
    Fp8Tile(128, 192, x_multicast=2, waves=True),
)
# Elements of a weight that are there in fp32 at a time, where no kernel computes.
FP8_PIECE = 1 << 24
_MOST_TOKENS = max(tile.tokens for tile in _FEW)
# A launch that fills no processor, and a sum too short to be shared, are not worth a tile.
_MIN_OUT_FEATURES, _MIN_SPLIT_IN_FEATURES = 1024, 2048
# Waves of tiles: what fits into one is better off with a tile of its own.
_MIN_WAVES_TOKENS = 129
# An LM head: more rows than two of the largest tiles for each processor, so that one tile follows another
# even for few tokens.
_WIDE_OUT_FEATURES = 2 * 132 * 192


def fp8_tile_name(tile: Fp8Tile) -> str:
    """Tokens x rows, and what is shared, such as "256x192 multicast 2 waves"."""
    counts = {name: getattr(tile, name) for name in ("split_k", "multicast", "x_multicast")}
    shared = "".join(f" {name} {count}" for name, count in counts.items() if count > 1)
    return f"{tile.tokens}x{tile.rows}{shared}{' waves' if tile.waves else ''}"


def fp8_candidates(
    num_tokens: int, out_features: int, in_features: int, *, gated: bool = False
) -> tuple[Fp8Tile, ...]:
    """The compiled tiles that take the product; `gated`: so many gates and as many ups, then SwiGLU."""
    if num_tokens < 1 or out_features < 1 or out_features % 8 or in_features < 1 or in_features % 16:
        return ()
    tiles = GATED_FP8_TILES if gated else LINEAR_FP8_TILES
    rooms = (tile.tokens for tile in tiles if not tile.waves and tile.tokens >= num_tokens)
    tokens = min(rooms, default=None)
    takes_waves = num_tokens >= _MIN_WAVES_TOKENS or out_features > _WIDE_OUT_FEATURES
    return tuple(
        tile
        for tile in tiles
        if (takes_waves if tile.waves else tile.tokens == tokens)
        and (tile.split_k == 1 or in_features >= _MIN_SPLIT_IN_FEATURES)
    )


@functools.cache
def linear_fp8_tile(
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    gated: bool = False,
    device_kind: DeviceKind = H100,
) -> Fp8Tile | None:
    """The tile of a product; None: nothing takes the sizes, or the library is to compute.

    With `gated` of the product with the activation behind it, for `out_features` gates and as many ups; None:
    the activation is to be a kernel of its own. Sizes that were measured on the kind of device are looked up
    in `rows_fp8`; a rule serves all others.
    """
    row = _row_of(out_features, in_features, gated, device_kind)
    if row is not None and num_tokens >= 1:
        _, name = measured_at(row.choices, num_tokens)
        return _tiles_by_name(gated).get(name)
    return None if gated else fp8_rule(num_tokens, out_features, in_features, device_kind=device_kind)


@functools.cache
def rotated_fp8_tile(
    tile: Fp8Tile | None, num_tokens: int, out_features: int, *, device_kind: DeviceKind = H100
) -> Fp8Tile | None:
    """What rotates and stores q, k and v behind the very sums that `tile` makes of them; None: nothing.

    Sums that are not shared along K are added in the same order by every tile. So many tokens need no tile of
    their own: of two the one whose processors have less to do.
    """
    if tile in ROTATED_FP8_TILES:
        return tile
    if tile is None or tile.split_k > 1 or num_tokens < _MIN_WAVES_TOKENS:
        return None

    def cost(one: Fp8Tile) -> tuple[int, int]:
        tiles = -(-out_features // one.rows) * -(-num_tokens // one.tokens)
        rounds = -(-tiles * one.multicast // device_kind.num_sms)
        return rounds * one.rows, -one.rows

    return min((one for one in ROTATED_FP8_TILES if one.waves and one.multicast > 1), key=cost)


@functools.cache
def _tiles_by_name(gated: bool) -> dict[str, Fp8Tile]:
    return {fp8_tile_name(tile): tile for tile in (GATED_FP8_TILES if gated else LINEAR_FP8_TILES)}


@functools.cache
def _row_of(out_features: int, in_features: int, gated: bool, device_kind: DeviceKind) -> Fp8Row | None:
    sizes = out_features, in_features, gated
    found = of_kind(rows_fp8.PRODUCTS, device_kind)
    return next((row for row in found if (row.out_features, row.in_features, row.gated) == sizes), None)


def fp8_rule(
    num_tokens: int, out_features: int, in_features: int, *, device_kind: DeviceKind = H100
) -> Fp8Tile | None:
    """`linear_fp8_tile` of sizes not measured.

    The tile whose processors have the least to do, over all waves; of equals the largest. An LM head is so
    wide that from 65 tokens on processors go from tile to tile.
    """
    if out_features > _WIDE_OUT_FEATURES:
        return _wide_rule(num_tokens, out_features, in_features)
    if num_tokens > _MOST_TOKENS or out_features < _MIN_OUT_FEATURES:
        return None
    ways = [tile for tile in fp8_candidates(num_tokens, out_features, in_features) if tile in _FEW]
    best = min(ways, key=lambda tile: _cost(tile, out_features, device_kind), default=None)
    # Pairs that share tokens are slower than the library in their second wave (fp8_step.json, gate and up of
    # 252 tokens).
    if best is not None and best.multicast > 1 and _ctas(best, out_features) > device_kind.num_sms:
        return None
    return best


def _wide_rule(num_tokens: int, out_features: int, in_features: int) -> Fp8Tile | None:
    # The best, or within a few percent, of LLaDA-8B's head whole and halved.
    if num_tokens <= 64:
        tokens = next(tokens for tokens in (16, 32, 64) if num_tokens <= tokens)
        best = Fp8Tile(tokens, 128 if tokens == 16 else 64)
    elif num_tokens < _MIN_WAVES_TOKENS:
        best = Fp8Tile(128, 128, x_multicast=2, waves=True)
    elif num_tokens <= 192:
        best = Fp8Tile(192, 128, x_multicast=2, waves=True)
    else:
        best = Fp8Tile(256, 192, multicast=2, waves=True)
    return best if best in fp8_candidates(num_tokens, out_features, in_features) else None


def _ctas(tile: Fp8Tile, out_features: int) -> int:
    return -(-out_features // tile.rows) * tile.split_k * tile.multicast


def _cost(tile: Fp8Tile, out_features: int, device_kind: DeviceKind) -> tuple[float, int]:
    """Rows that a processor works on, one wave after the other; half of a sum counts as half of its rows.

    A tile of 64 rows computes no faster than one of 96: one warpgroup alone waits for its own additions.
    """
    waves = -(-_ctas(tile, out_features) // device_kind.num_sms)
    return waves * max(tile.rows, 96) / tile.split_k, -tile.rows
