"""What the tables hold: kinds of device, tiles and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class DeviceKind(NamedTuple):
    """What choices may depend on of a GPU: all of one kind compute the same sizes in the same way."""

    capability: tuple[int, int]
    num_sms: int  # streaming multiprocessors
    large_memory: bool = False  # more than 100 GiB: of the same processors those with the faster memory


H100 = DeviceKind((9, 0), 132)
H200 = DeviceKind((9, 0), 132, large_memory=True)


def of_kind(table: Mapping[DeviceKind, tuple], kind: DeviceKind) -> tuple[Any, ...]:
    """What was measured on a kind of device, else on that with the same processors and less memory."""
    return table.get(kind) or table.get(kind._replace(large_memory=False), ())


class LinearTile(NamedTuple):
    """How the extension's product with a weight is cut; csrc/gemm/linear.cu compiles these."""

    tokens: int  # room for tokens in a tile
    rows: int  # of the weight in a tile
    split_k: int = 1  # processors that share the sum of a tile
    multicast: int = 1  # processors that share one read of the weight, each for a part of the tokens


class Fp8Tile(NamedTuple):
    """How the extension's product in e4m3 is cut; csrc/gemm/linear*fp8*.cu compile these."""

    tokens: int  # room for tokens in a tile; with waves: in the tile of a group of `multicast`
    rows: int  # of the weight in a tile
    split_k: int = 1  # processors that share the sum of a tile
    multicast: int = 1  # processors that share one read of the weight, each for a part of the tokens
    x_multicast: int = 1  # processors that share one read of the tokens, each for rows of its own
    waves: bool = False  # processors go from tile to tile, over any number of tokens


class LinearPart(NamedTuple):
    """Neighbouring features of a product that one launch computes."""

    features: int
    tile: LinearTile


class LinearRow(NamedTuple):
    """A product with one weight, by tokens."""

    result: str  # file in bench/results and the key in it, which the tokens end
    out_features: int
    in_features: int
    gated: bool
    choices: tuple[tuple[int, str], ...]  # tokens, ascending, and a name of `candidates`


class Fp8Row(NamedTuple):
    """A product in e4m3 with one weight, by tokens."""

    result: str  # file in bench/results and the key in it, which the tokens end
    out_features: int
    in_features: int
    gated: bool
    choices: tuple[tuple[int, str], ...]  # tokens, ascending, and a name of `fp8_candidates`


class LmHeadRow(NamedTuple):
    """An LM head, by rows."""

    result: str  # as of a LinearRow
    vocab_size: int
    dim: int
    choices: tuple[tuple[int, int], ...]  # rows, ascending, and the tile; 0: logits in memory


class AttentionRow(NamedTuple):
    """Attention of one pack."""

    result: str  # file in bench/results and the key in it
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    num_keys: int  # of a row
    distinct_rows: int
    choice: str  # "units", "tiles" (both CUDA C++) or "triton"


class BackendRow(NamedTuple):
    """The compiled backends of an operator, the preferred one first."""

    op: str
    order: tuple[str, ...]
    results: str  # file in bench/results and the operator in it
