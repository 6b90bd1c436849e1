"""What a decode is done with, by name: the rows of a table, and settings read from a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from blockbatch.config import DecodeConfig, decode_settings
from blockbatch.methods import (
    BLOCK_METHODS,
    BUILT_IN_METHODS,
    DEFAULT_METHOD,
    METHOD_OPTIONS,
    PRESET_TABLE,
    fitted,
    fitting_block_sizes,
    preset_options,
)
from blockbatch.sampling_options import SAMPLING_NAMES

# The yardstick first, BlockBatch last.
TABLE_METHODS = (*(method for method in BUILT_IN_METHODS if method != "blockbatch"), "blockbatch")
# Of block-causal models.
BLOCK_TABLE_METHODS = BLOCK_METHODS
# What other settings are compared with: as published, and with BlockBatch's end.
REFERENCES = ("vanilla", "dual_cache")
EOS_SUFFIX = " +eos"
# Rows of a table of all methods beside those that were published.
TABLE_PRESETS = tuple(name for name, row in PRESET_TABLE.items() if not row.published)
# Among methods: the dual cache with every block size.
FIXED_BLOCKS = "fixed-blocks"

# As options of the command line have it, and as Python and JSON do.
_SWITCHES = {"on": True, "off": False, "true": True, "false": False}
_TYPES = {"preset": "str", **{field.name: field.type for field in fields(DecodeConfig)}}


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Attributes:
        label: its name in records and tables.
        config: the options.
        limit: decode only the first so many problems of each task; None: all.
    """

    label: str
    config: DecodeConfig
    limit: int | None = None


def table_settings(
    methods: Sequence[str],
    gen_length: int,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    vanilla_limit: int | None = None,
) -> list[Setting]:
    """The rows of a comparison: baselines as published first, then all methods that stop with the text.

    Args:
        methods: some of `METHODS` or of `BLOCK_METHODS`; the same one counts once.
        gen_length: tokens to generate.
        options: of each method, arguments of `DecodeConfig`, such as the published ones; `eos_exit` and
            `gen_length` among them do not count, nor do block sizes that do not divide `gen_length`.
        vanilla_limit: problems of each task for vanilla as published, the slowest row by far.

    Raises:
        ValueError: an unknown method, none, or options that a method cannot take.
    """
    if not methods:
        raise ValueError("--methods: expected at least one method, got none")
    methods = tuple(dict.fromkeys(methods))
    for method in methods:
        if method not in METHOD_OPTIONS:
            names = ", ".join(dict.fromkeys((*TABLE_METHODS, *METHOD_OPTIONS)))
            raise ValueError(f"--methods: expected some of {names}, got {method!r}")

    def config(method: str, eos_exit: str) -> DecodeConfig:
        given = {**(options or {}).get(method, {}), "method": method, "gen_length": gen_length}
        end = {"eos_exit": eos_exit} if "eos_exit" in METHOD_OPTIONS[method] else {}
        return DecodeConfig(**{**fitted(given), **end})

    rows = [
        Setting(method, config(method, "none"), vanilla_limit if method == "vanilla" else None)
        for method in methods
        if method not in BLOCK_METHODS
    ]
    for method in methods:
        label = method if method in BLOCK_METHODS else method + EOS_SUFFIX
        rows.append(Setting(label, config(method, "prefix")))
    return rows


def preset_settings(names: Sequence[str], gen_length: int) -> list[Setting]:
    """A row for each preset of `blockbatch.methods`, with the end of the rows that stop with the text.

    Raises:
        ValueError: an unknown preset, or one that `gen_length` does not go with.
    """
    return [
        Setting(
            name,
            DecodeConfig(
                **preset_options(name, {"gen_length": gen_length, "eos_exit": "prefix"}, "--preset")
            ),
        )
        for name in dict.fromkeys(names)
    ]


def fixed_block_settings(gen_length: int) -> list[Setting]:
    """The dual cache with each of the paper's block sizes that divides `gen_length`: "block 4", "block 8"."""
    return [
        Setting(
            f"block {size}",
            DecodeConfig(method="dual_cache", gen_length=gen_length, block_size=size, eos_exit="prefix"),
        )
        for size in fitting_block_sizes(gen_length)
    ]


def parse_setting(text: str, gen_length: int) -> Setting:
    """A setting of "LABEL:name=value,name=value,...", such as "careful:threshold=0.95,block_sizes=4/8/16".

    Names are those of `DecodeConfig`, and preset, which the others change; "/" stands between the members of
    a list, "none" switches a rule off. Without a method it is BlockBatch's.

    Raises:
        ValueError: it is not written like this, or not a setting of the method.
    """
    label, colon, rest = text.partition(":")
    label = label.strip()
    if not colon or not label or not label.isprintable():
        raise ValueError(f"--set: expected LABEL:name=value,..., got {text!r}")
    options: dict[str, Any] = {"gen_length": gen_length}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"--set: {label}: expected name=value, got {part!r}")
        options[name] = _parse_value(label, name, value)
    try:
        if (preset := options.pop("preset", None)) is not None:
            options = preset_options(preset, options)
        method = options.get("method", DEFAULT_METHOD)
        # A setting of one's own is compared with the rows that stop with the text, unless it says otherwise.
        if "eos_exit" in METHOD_OPTIONS.get(method, {}):
            options.setdefault("eos_exit", "prefix")
        return Setting(label, DecodeConfig(**options))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--set: {label}: {error}") from None


def _parse_value(label: str, name: str, value: str) -> Any:
    known = ("method", "gen_length", "preset", *dict.fromkeys(sum(map(list, METHOD_OPTIONS.values()), [])))
    known += SAMPLING_NAMES
    if name not in known:
        raise ValueError(f"--set: {label}: expected options among {', '.join(known)}, got {name!r}")
    if value.lower() == "none":
        return value.lower() if name == "eos_exit" else None
    kind = _TYPES[name]  # as it is written in the class
    convert = float if "float" in kind else int if "int" in kind else str
    try:
        if kind.startswith("bool"):
            return _SWITCHES[value.lower()]
        if "tuple" in kind:
            return tuple(convert(member) for member in value.split("/"))
        return convert(value)
    except (ValueError, KeyError):
        expected = "on or off" if kind.startswith("bool") else "integers" if convert is int else "numbers"
        raise ValueError(f"--set: {label}: {name}: expected {expected}, got {value!r}") from None


def settings_header(settings: Sequence[Setting]) -> dict[str, dict[str, Any]]:
    """The options of each setting by label, for the header of a file."""
    return {
        setting.label: {"method": setting.config.method, **decode_settings(setting.config)}
        for setting in settings
    }
