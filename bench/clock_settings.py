"""The settings that `clock.py` compares: a row for each, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import blockbatch

GEN_LENGTH = 256
DUAL, LEAP, PUBLISHED = "dual_cache", "local_leap", "blockbatch"
DUAL_CHEAP, LEAP_CHEAP = "dual_cache, generation", "local_leap, generation"


@dataclass(frozen=True, eq=False)
class Row:
    """One setting.

    Attributes:
        label: what tables call it; unique.
        options: of `DecodeConfig`, beside gen_length; they end with the text where they do not say otherwise.
        group: "published", "cheaper" (the published rules on our cheaper forwards) or "ours".
        without: label of the same setting without drafts, where it has any.
    """

    label: str
    options: dict[str, Any]
    group: str
    without: str | None = None

    @property
    def method(self) -> str:
        return self.options["method"]

    @property
    def file(self) -> str:
        """The label as the name of a file."""
        return "".join(letter if letter.isalnum() else "_" for letter in self.label).replace("__", "_")

    def config(self) -> blockbatch.DecodeConfig:
        return blockbatch.DecodeConfig(**{"gen_length": GEN_LENGTH, "eos_exit": "prefix"} | self.options)


_GENERATION = {"refresh_scope": "generation"}
_OPEN = {"method": "blockbatch", "query_span": "open"}
_TAIL = {**_OPEN, "threshold": 0.8, "tail_threshold": 0.98}
_BLOCK_SIZES = (
    (4, 8, 16, 32, 64, 128),
    (4, 8, 16, 32, 64),
    (8, 32),
    (16, 64),
    (32,),
    (64,),
)


def _drafted(method: str, drafts: tuple[int, ...]) -> Row:
    label = f"{method}, generation, drafts {'-'.join(map(str, drafts))}"
    options = {"method": method, **_GENERATION, "drafts": drafts}
    return Row(label, options, "cheaper", without=f"{method}, generation")


def _open(sizes: tuple[int, ...], interval: int | None) -> Row:
    name = _sizes(sizes)
    options = {**_TAIL, "block_sizes": sizes, "refresh_interval": interval}
    if interval is None:
        return Row(f"blockbatch {name}, tail, open", options, "ours")
    return Row(f"blockbatch {name}, tail, open, refresh {interval}", {**options, **_GENERATION}, "ours")


def _leaping(sizes: tuple[int, ...]) -> Row:
    """BlockBatch with LocalLeap's commit rule."""
    options = {**_OPEN, "commit": "local_leap", "block_sizes": sizes, "refresh_interval": None}
    return Row(f"blockbatch {_sizes(sizes)}, leap, open", options, "ours")


def _sizes(sizes: tuple[int, ...]) -> str:
    return f"{sizes[0]}..{sizes[-1]}" if len(sizes) > 2 else "-".join(map(str, sizes))


ROWS = (
    Row(DUAL, {"method": "dual_cache"}, "published"),
    Row(LEAP, {"method": "local_leap"}, "published"),
    Row(PUBLISHED, {"method": "blockbatch"}, "published"),
    Row(DUAL_CHEAP, {"method": "dual_cache", **_GENERATION}, "cheaper"),
    Row(LEAP_CHEAP, {"method": "local_leap", **_GENERATION}, "cheaper"),
    *(_drafted(method, drafts) for method in ("dual_cache", "local_leap") for drafts in ((1, 2), (1, 2, 3))),
    Row(
        "dual_cache, open, generation",
        {"method": "dual_cache", "query_span": "open", **_GENERATION},
        "cheaper",
    ),
    *(_open(sizes, None) for sizes in _BLOCK_SIZES),
    *(_open(sizes, 64) for sizes in _BLOCK_SIZES[:2]),
    *(_leaping(sizes) for sizes in ((4, 8, 16, 32, 64), (8, 16, 32, 64), (16, 64))),
)
# The row that stands for the preset "fast".
FAST = "blockbatch 4..64, leap, open"
BY_LABEL = {row.label: row for row in ROWS}


def chosen(labels: list[str] | None) -> list[Row]:
    """The rows of these labels, in the order of the table; None: all.

    Raises:
        ValueError: there is no such row.
    """
    for label in labels or ():
        if label not in BY_LABEL:
            raise ValueError(f"--settings: expected some of {'; '.join(BY_LABEL)}, got {label!r}")
    return [row for row in ROWS if labels is None or row.label in labels]
