"""The settings that the benchmarks of serving measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import blockbatch
from blockbatch.decoding.admission import fewer_sizes

_DUAL = {"method": "dual_cache", "eos_exit": "prefix"}
_CHEAP = {"query_span": "open", "refresh_scope": "generation"}
# Name -> options of a decode, and the engine's rule for branches.
_TABLE: dict[str, tuple[dict[str, Any], str]] = {
    "dual_cache": (_DUAL, "fixed"),
    "dual_cache, open, generation": (_DUAL | _CHEAP, "fixed"),
    "careful": ({"preset": "careful"}, "fixed"),
    "careful, by load": ({"preset": "careful"}, "load"),
    "blockbatch": ({"method": "blockbatch"}, "fixed"),
    "blockbatch, branches by load": ({"method": "blockbatch"}, "load"),
    "fast": ({"preset": "fast"}, "fixed"),
    "fast, branches by load": ({"preset": "fast"}, "load"),
}
SETTINGS = {name: options for name, (options, _) in _TABLE.items()}
RULES = {name: rule for name, (_, rule) in _TABLE.items()}


def config_of(setting: str, gen_length: int, branches: int | None = None) -> blockbatch.DecodeConfig:
    """The settings of a decode; with another number of branches those that the engine would give it."""
    options = {**SETTINGS[setting], "gen_length": gen_length}
    preset = options.pop("preset", None)
    made = blockbatch.DecodeConfig.preset(preset, **options) if preset else blockbatch.DecodeConfig(**options)
    if branches is None or made.block_sizes is None or branches == len(made.block_sizes):
        return made
    return replace(made, block_sizes=fewer_sizes(made.block_sizes, branches))
