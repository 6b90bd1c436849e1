"""Products with the weights and the LM head: what is compiled, what was measured, and a rule for the rest."""

from __future__ import annotations

import bisect
import functools

from blockbatch_kernels.tuning import rows
from blockbatch_kernels.tuning.records import (
    H100,
    DeviceKind,
    LinearPart,
    LinearRow,
    LinearTile,
    LmHeadRow,
    of_kind,
)

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
    LinearTile(256, 64, split_k=2),
    LinearTile(256, 192, multicast=2),
)
# Those that can rotate q and k and write the cache behind the product of q, k and v (csrc/gemm/linear_rope.cu
# compiles them).
ROTATED_TILES = (
    LinearTile(16, 64),
    LinearTile(64, 64),
    LinearTile(128, 64),
    LinearTile(128, 128),
    LinearTile(192, 128),
    LinearTile(256, 192, multicast=2),
)
# With the activation in the same kernel.
GATED_TILES = (
    LinearTile(16, 192),
    LinearTile(64, 192),
    LinearTile(128, 192),
    LinearTile(192, 192),
    LinearTile(192, 192, split_k=2),
    LinearTile(256, 192),
    LinearTile(256, 192, split_k=2),
)
# Rows of the hidden states that the LM head without logits in memory has room for.
LM_HEAD_TILES = (16, 64, 128)

# Memory for the logits of one chunk of the vocabulary: 512 rows of 131,072 16-bit logits. One chunk is the
# fastest: the weights that stream through L2 evict a chunk that would fit before it is reduced, and narrow
# products are slower.
LM_HEAD_LOGITS_BYTES = 128 << 20

# A launch that no tensor core is filled by, and a sum too short to be shared, are not worth a tile.
_MIN_LINEAR_ROWS = 2048
_MIN_SPLIT_IN_FEATURES = 1024
# The rule beyond 128 tokens, by processors that work on one tile: so many of the device's compute.
_MIN_FILL = {1: 0.7, 2: 0.9}


def tiles_of(gated: bool) -> tuple[LinearTile, ...]:
    """The compiled tiles of a product."""
    return GATED_TILES if gated else LINEAR_TILES


def candidates(
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    gated: bool,
    device_kind: DeviceKind = H100,
) -> dict[str, tuple[LinearPart, ...]]:
    """Every way to compute a product, by name: "cublas" and the launches of each tile that takes it.

    A name says tokens x rows of the tile, and with " + " the tile for what is left of a last wave.
    """
    ways: list[tuple[LinearPart, ...]] = []
    tiles = tiles_of(gated)
    takes = 1 <= num_tokens and out_features > 0 and out_features % 8 == 0 and in_features % 8 == 0
    for tile in tiles if takes else ():
        if num_tokens > tile.tokens or (tile.split_k > 1 and in_features < _MIN_SPLIT_IN_FEATURES):
            continue
        ways.append((LinearPart(out_features, tile),))
        half = tile._replace(split_k=2)
        whole = _whole_waves(tile, out_features, gated, device_kind)
        if tile.split_k * tile.multicast == 1 and half in tiles and 0 < whole < out_features:
            if in_features >= _MIN_SPLIT_IN_FEATURES:
                ways.append((LinearPart(whole, tile), LinearPart(out_features - whole, half)))
    return {"cublas": (), **{name_of(parts): parts for parts in ways}}


def name_of(parts: tuple[LinearPart, ...]) -> str:
    """The name of these launches among the candidates."""
    return " + ".join(_tile_name(tile) for _, tile in parts) or "cublas"


def _tile_name(tile: LinearTile) -> str:
    name = f"{tile.tokens}x{tile.rows}"
    for field in ("split_k", "multicast"):
        count = getattr(tile, field)
        name += f" {field} {count}" if count > 1 else ""
    return name


@functools.cache
def linear_parts(
    num_tokens: int, out_features: int, in_features: int, *, gated: bool, device_kind: DeviceKind = H100
) -> tuple[LinearPart, ...]:
    """The launches of a product, by feature; none: cuBLAS is at least as fast, or nothing takes the sizes.

    Sizes that were measured on the kind of device are looked up in `rows`; a rule serves all others.
    """
    most = max(tile.tokens for tile in tiles_of(gated))
    if not 1 <= num_tokens <= most or out_features % 8 or in_features % 8:
        return ()
    row = _row_of(out_features, in_features, gated, device_kind)
    if row is not None:
        found = _ways_of(row, num_tokens, device_kind)
        if found is not None:
            return found
    return linear_rule(num_tokens, out_features, in_features, gated=gated, device_kind=device_kind)


@functools.cache
def _row_of(out_features: int, in_features: int, gated: bool, device_kind: DeviceKind) -> LinearRow | None:
    return next(
        (
            row
            for row in of_kind(rows.PRODUCTS, device_kind)
            if (row.out_features, row.in_features, row.gated) == (out_features, in_features, gated)
        ),
        None,
    )


def measured_at(choices: tuple[tuple[int, object], ...], count: int) -> tuple[int, object]:
    """The choice measured at the least number that is not below `count`, else at the largest."""
    at = bisect.bisect_left([number for number, _ in choices], count)
    return choices[min(at, len(choices) - 1)]


def _ways_of(row: LinearRow, num_tokens: int, device_kind: DeviceKind) -> tuple[LinearPart, ...] | None:
    """The measured launches; None: none measured has room for the tokens."""
    tokens, choice = measured_at(row.choices, num_tokens)
    sizes = dict(gated=row.gated, device_kind=device_kind)
    ways = candidates(max(tokens, num_tokens), row.out_features, row.in_features, **sizes)
    return ways.get(choice)


def linear_rule(
    num_tokens: int, out_features: int, in_features: int, *, gated: bool, device_kind: DeviceKind = H100
) -> tuple[LinearPart, ...]:
    """`linear_parts` of sizes not measured: up to 128 tokens memory decides, beyond that full waves."""
    features = 2 * out_features if gated else out_features
    if features < _MIN_LINEAR_ROWS:
        return ()
    tokens = min(tile.tokens for tile in tiles_of(gated) if tile.tokens >= num_tokens)
    if gated:
        return _gated_parts(tokens, out_features, in_features, device_kind)
    tile = _linear_tile(tokens, features, in_features, device_kind)
    return () if tile is None else (LinearPart(out_features, tile),)


def _fill(tile: LinearTile, features: int, device_kind: DeviceKind) -> float:
    """The share of the processors that compute, over all waves: what a last wave leaves idle is lost."""
    ctas = -(-features // tile.rows) * tile.split_k * tile.multicast
    return ctas / (-(-ctas // device_kind.num_sms) * device_kind.num_sms)


def _whole_waves(tile: LinearTile, out_features: int, gated: bool, device_kind: DeviceKind) -> int:
    """Features that fill all processors with a tile each, as often as they can."""
    wave = device_kind.num_sms * tile.rows // (2 if gated else 1)
    return out_features // wave * wave


def _gated_parts(
    tokens: int, out_features: int, in_features: int, device_kind: DeviceKind
) -> tuple[LinearPart, ...]:
    tile = LinearTile(tokens, 192)
    if tokens <= 128 or _fill(tile, 2 * out_features, device_kind) >= 0.9:
        return (LinearPart(out_features, tile),)
    # Whole waves of processors, and the tiles that are left shared by two processors each.
    whole, half = _whole_waves(tile, out_features, True, device_kind), tile._replace(split_k=2)
    if whole == 0 or in_features < _MIN_SPLIT_IN_FEATURES:
        return ()
    left = 2 * (out_features - whole)
    if -(-left // tile.rows) * 2 > device_kind.num_sms or _fill(half, left, device_kind) < 0.9:
        return ()
    return LinearPart(whole, tile), LinearPart(out_features - whole, half)


def _linear_tile(tokens: int, features: int, in_features: int, device_kind: DeviceKind) -> LinearTile | None:
    if tokens > 128:
        # Arithmetic counts as well: the largest tile that leaves few processors idle.
        wide = sorted((tile for tile in LINEAR_TILES if tile.tokens == tokens), key=lambda tile: -tile.rows)
        filled = (
            tile
            for tile in wide
            if _fill(tile, features, device_kind) >= _MIN_FILL[tile.split_k * tile.multicast]
        )
        return next(filled, None) if in_features >= _MIN_SPLIT_IN_FEATURES else None
    if tokens == 16:
        return LinearTile(tokens, 64)
    if -(-features // 64) * 2 <= device_kind.num_sms and in_features >= _MIN_SPLIT_IN_FEATURES:
        return LinearTile(tokens, 64, split_k=2)
    return LinearTile(tokens, 64 if tokens == 64 or features <= 8192 else 128)


@functools.cache
def lm_head_tile(num_rows: int, vocab_size: int, dim: int, *, device_kind: DeviceKind = H100) -> int:
    """Rows that the LM head without logits has room for; 0: it is not faster, or does not take the sizes.

    Sizes that were measured are looked up in `rows`; for others it is the smallest tile with room, where each
    processor has one of 192 tokens of the vocabulary.
    """
    if dim % 8 or num_rows < 1:
        return 0
    row = _lm_head_row(vocab_size, dim, device_kind)
    if row is not None:
        _, tile = measured_at(row.choices, num_rows)
        if tile == 0 or num_rows <= tile:
            return tile
    if vocab_size < 192 * device_kind.num_sms:
        return 0
    return next((tile for tile in LM_HEAD_TILES if num_rows <= tile), 0)


@functools.cache
def _lm_head_row(vocab_size: int, dim: int, device_kind: DeviceKind) -> LmHeadRow | None:
    found = of_kind(rows.LM_HEADS, device_kind)
    return next((row for row in found if (row.vocab_size, row.dim) == (vocab_size, dim)), None)
