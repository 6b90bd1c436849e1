"""The decoding methods, a row for each, and the options that they may have, a row for each.

Whatever lists methods or options reads these two tables: settings, command line, builders, presets, pictures.
A new method is a row and a module of `blockbatch.decoding`; `registry.register_method` adds rows, too. A new
option is a row here, a default in the rows of the methods that have it, and a field with its checks in
`DecodeConfig`. Settings that have a name are a third table; a new preset is a row of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from blockbatch import block_methods, sampling_options
from blockbatch.values import NamesOf

PAPER_BLOCK_SIZES = (4, 8, 16, 32, 64, 128)
DEFAULT_GEN_LENGTH = 256


def fitting_block_sizes(
    gen_length: int, sizes: Sequence[int] = PAPER_BLOCK_SIZES, limit: int | None = None
) -> tuple[int, ...]:
    """Those of `sizes` that divide `gen_length`; where none does, one block of all of it, or else the largest
    divisor that is at most `limit`."""
    fitting = tuple(size for size in sizes if gen_length % size == 0)
    if fitting or limit is None:
        return fitting or (gen_length,)
    return (max(size for size in range(1, min(limit, gen_length) + 1) if gen_length % size == 0),)


def fitting_block_size(gen_length: int, wanted: int) -> int:
    """`wanted` if it divides `gen_length`, else the largest of the usual sizes below it that does."""
    return fitting_block_sizes(gen_length, (wanted, *(n for n in PAPER_BLOCK_SIZES[::-1] if n < wanted)))[0]


def fitted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that come from a table, with block sizes that go with their `gen_length`.

    Published settings are those of 256 tokens: of another length nobody asked for their block sizes. What a
    user gave does not belong here, since it is refused where it does not fit.
    """
    found, length = dict(options), options.get("gen_length")
    if not isinstance(length, Integral) or length < 1:
        return found  # `DecodeConfig` says what is wrong with it
    if found.get("block_sizes") is not None:
        found["block_sizes"] = fitting_block_sizes(length, found["block_sizes"])
    if found.get("block_size") is not None:
        found["block_size"] = fitting_block_size(length, found["block_size"])
    return found


@dataclass(frozen=True)
class MethodRow:
    """One method.

    Attributes:
        name: what settings call it.
        title: what pictures call it.
        summary: what it does and where it is from, in one line.
        module: its function `method` turns settings into blocks and a policy (see `decoding.method`).
        options: those that it has, with their defaults; others do not exist for it.
        published: the options with which it was published.
        builder: that function itself, of a method of `registry.register_method`; None: it is built in.
    """

    name: str
    title: str
    summary: str
    module: str
    options: Mapping[str, Any]
    published: Mapping[str, Any]
    builder: Callable[..., Any] | None = None


# Published settings are written out although most are defaults: a default may change, what was published not.
# The baselines run as their authors published them and fill the canvas; with `eos_exit="prefix"` they stop as
# BlockBatch does.
_BASELINE = {"block_size": 32, "eos_exit": "none"}
# Of the methods whose block steps compute the window alone; ours, off by default.
_CHEAPER = {"refresh_scope": "canvas", "query_span": "window", "drafts": None}
_ROWS = (
    MethodRow(
        name="blockbatch",
        title="BlockBatch",
        summary="several block sizes of one request as branches of one batch (arXiv 2605.29233)",
        module="blockbatch.decoding.blockbatch",
        options={
            "block_sizes": PAPER_BLOCK_SIZES,
            "max_step_tokens": None,
            "threshold": 0.9,
            "tail_threshold": None,
            "merge_threshold": 0.5,
            "sync_threshold": 8,
            "refresh_interval": 32,
            "refresh_scope": "canvas",
            "query_span": "window",
            "policy": "llada_published",
            # With Dream's published rule left out it is "none".
            "eos_exit": "prefix",
            "commit": "threshold",
            "leap_radius": 4,
            "leap_threshold": None,
        },
        published={
            "block_sizes": (4, 8, 16, 32, 64, 128),
            "threshold": 0.9,
            "merge_threshold": 0.5,
            "sync_threshold": 8,
            "refresh_interval": 32,
            # Of the model's family, which has its own end: prefix for LLaDA, none for Dream.
            "policy": "published",
        },
    ),
    MethodRow(
        name="vanilla",
        title="vanilla",
        summary="no cache, a fixed number of tokens a step (LLaDA, arXiv 2502.09992)",
        module="blockbatch.decoding.vanilla",
        options={**_BASELINE, "steps": None},
        published={"block_size": 32, "eos_exit": "none"},
    ),
    MethodRow(
        name="prefix_cache",
        title="prefix cache",
        summary="K/V of all before the block is kept (Fast-dLLM, arXiv 2505.22618)",
        module="blockbatch.decoding.prefix_cache",
        options={**_BASELINE, "threshold": 0.9, "steps": None},
        published={"block_size": 32, "threshold": 0.9, "eos_exit": "none"},
    ),
    MethodRow(
        name="dual_cache",
        title="dual cache",
        summary="K/V of all around the block is kept (Fast-dLLM, arXiv 2505.22618)",
        module="blockbatch.decoding.dual_cache",
        options={**_BASELINE, "threshold": 0.9, "steps": None, **_CHEAPER},
        published={"block_size": 32, "threshold": 0.9, "eos_exit": "none"},
    ),
    MethodRow(
        name="local_leap",
        title="LocalLeap",
        summary="the dual cache, with less confidence needed near a sure token (arXiv 2510.07081)",
        module="blockbatch.decoding.local_leap",
        options={**_BASELINE, "threshold": 0.9, "leap_radius": 4, "leap_threshold": None, **_CHEAPER},
        published={"block_size": 32, "threshold": 0.9, "leap_radius": 4, "eos_exit": "none"},
    ),
)
# Of models whose attention is causal across blocks, which also run `blockbatch` inside the block.
_BLOCK_ROWS = (MethodRow(**block_methods.ROW),)
# By name: the methods of full-attention models, and those of block-causal models alone.
METHOD_TABLE: dict[str, MethodRow] = {row.name: row for row in _ROWS}
BLOCK_METHOD_TABLE: dict[str, MethodRow] = {row.name: row for row in _BLOCK_ROWS}
METHODS: Sequence[str] = NamesOf(METHOD_TABLE)
# Without those that were registered.
BUILT_IN_METHODS = tuple(METHOD_TABLE)
BLOCK_METHODS = (*BLOCK_METHOD_TABLE, "blockbatch")
METHOD_OPTIONS: dict[str, Mapping[str, Any]] = {row.name: row.options for row in (*_ROWS, *_BLOCK_ROWS)}
DEFAULT_METHOD = METHODS[0]


@dataclass(frozen=True)
class PresetRow:
    """Settings of a decode that have a name; `DecodeConfig.preset` makes them.

    Attributes:
        name: what `preset` calls it; no benchmark of `blockbatch.evaluation.presets` has the same.
        summary: what it is, in one sentence.
        options: arguments of `DecodeConfig`; what is left out has the method's default.
        published: whether this is the rule as its authors published it, rather than ours; options that the
            method lacks are then passed over.
    """

    name: str
    summary: str
    options: Mapping[str, Any]
    published: bool


_PRESETS = (
    PresetRow(
        name="paper",
        summary="the method's published rule, on Dream that of the code for Dream",
        options={"policy": "published"},
        published=True,
    ),
    PresetRow(
        name="fast",
        summary="LocalLeap's commit on BlockBatch's branches; ours: open queries",
        options={
            "method": "blockbatch",
            "policy": "llada_published",
            "eos_exit": "prefix",
            "commit": "local_leap",
            "query_span": "open",
            "refresh_interval": None,
            "max_step_tokens": 128,
        },
        published=False,
    ),
    PresetRow(
        name="careful",
        summary="the dual cache's rule; ours: cheaper refreshes and drafts",
        options={
            "method": "dual_cache",
            "refresh_scope": "generation",
            "drafts": (1, 2, 3),
            "eos_exit": "prefix",
        },
        published=False,
    ),
)
PRESET_TABLE: dict[str, PresetRow] = {row.name: row for row in _PRESETS}


def preset_options(name: str, changes: Mapping[str, Any], argument: str = "preset") -> dict[str, Any]:
    """The arguments of `DecodeConfig` that a preset stands for, with some of them changed.

    Args:
        name: of a row of the table.
        changes: arguments of `DecodeConfig` that count more than the preset's.
        argument: what a message calls the name.

    Raises:
        ValueError: no such preset, or a method that lacks an option of it.
    """
    if name not in PRESET_TABLE:
        raise ValueError(f"{argument}: expected one of {', '.join(PRESET_TABLE)}, got {name!r}")
    row = PRESET_TABLE[name]
    options = {**row.options, **changes}
    known = METHOD_OPTIONS.get(options.get("method", DEFAULT_METHOD))
    lacking = [option for option in row.options if known is not None and option not in ("method", *known)]
    if row.published:
        options = {option: value for option, value in options.items() if option not in lacking} | changes
    elif lacking:
        having = [method for method, known in METHOD_OPTIONS.items() if all(one in known for one in lacking)]
        raise ValueError(
            f"method: expected {' or '.join(having)} for {argument} {name!r}, which sets "
            f"{', '.join(lacking)}, got {options.get('method', DEFAULT_METHOD)!r}"
        )
    if row.options.get("drafts") and "drafts" not in changes:
        options["drafts"] = _fitting_drafts(options, known or {})
    return options


def _fitting_drafts(options: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Those of a preset's drafts that leave a MASK in a block; of short texts nobody asked for the others."""
    length, size = options.get("gen_length", DEFAULT_GEN_LENGTH), options.get("block_size")
    if size is None and isinstance(length, Integral) and length >= 1:
        size = fitting_block_size(length, known.get("block_size", 1))
    if not isinstance(size, Integral):
        return options["drafts"]  # `DecodeConfig` says what is wrong with it
    return tuple(draft for draft in options["drafts"] if draft < size) or None


@dataclass(frozen=True)
class OptionRow:
    """One option of a decode, for the command line.

    Attributes:
        name: the field of `DecodeConfig`.
        kind: "name", "integer", "number", "integers" (with commas between them), "switch" (on or off) or
            "texts" (one each time that it is given).
        metavar: what help shows for a value.
        help: what it does, in a line, with the default.
        none: whether the word none switches its rule off.
    """

    name: str
    kind: str
    metavar: str
    help: str
    none: bool = False


_NAMES = f"{DEFAULT_METHOD} (default), {', '.join(METHODS[1:])} or {', '.join(BLOCK_METHOD_TABLE)}"
# In the order of the help.
OPTIONS = (
    OptionRow("method", "name", "NAME", _NAMES),
    OptionRow("gen_length", "integer", "N", "tokens to generate (256)"),
    OptionRow("block_sizes", "integers", "4,8,16", "blockbatch: a branch for each (4 to 128)"),
    OptionRow(
        "max_step_tokens",
        "integer",
        "N",
        "blockbatch: leave out the largest sizes until their sum is at most this (none); ours",
        none=True,
    ),
    OptionRow(
        "block_size",
        "integer",
        "N",
        "other methods: the one block size (32, or the next smaller that divides; of the model)",
    ),
    OptionRow("threshold", "number", "P", "confidence that commits a token (0.9)", none=True),
    OptionRow(
        "tail_threshold",
        "number",
        "P",
        "blockbatch: the same behind a window's first unsure token (as threshold); ours",
        none=True,
    ),
    OptionRow(
        "merge_threshold",
        "number",
        "P",
        "blockbatch: confidence to take another branch's token (0.5)",
        none=True,
    ),
    OptionRow(
        "sync_threshold",
        "integer",
        "N",
        "blockbatch: a branch this far behind the leader follows it (8)",
        none=True,
    ),
    OptionRow(
        "refresh_interval",
        "integer",
        "N",
        "blockbatch: tokens of finished blocks between full forwards (32)",
        none=True,
    ),
    OptionRow(
        "refresh_scope",
        "name",
        "SCOPE",
        "blockbatch, dual_cache, local_leap: canvas (default) or, ours, generation",
    ),
    OptionRow(
        "query_span",
        "name",
        "SPAN",
        "blockbatch, dual_cache, local_leap: window (default) or, ours, open queries",
    ),
    OptionRow(
        "drafts",
        "integers",
        "1,2",
        "dual_cache, local_leap: compute ahead what the next commit may write (none); ours",
        none=True,
    ),
    OptionRow(
        "policy",
        "name",
        "RULE",
        "blockbatch: llada_published (default), dream_published, or published: that of the model's family",
    ),
    OptionRow("eos_exit", "name", "MODE", "prefix or window: stop with the text; none: fill the canvas"),
    OptionRow("eos_token_ids", "integers", "1,2", "ids that end the text (the model's)"),
    OptionRow("stop", "texts", "TEXT", "end the text before this text; repeatable"),
    OptionRow(
        "steps",
        "integer",
        "N",
        "vanilla, and the caches with --threshold none: forwards in all (gen-length); block_diffusion, SDAR: "
        "denoise forwards a block (block size)",
        none=True,
    ),
    OptionRow(
        "commit",
        "name",
        "RULE",
        "blockbatch: threshold (default), or local_leap for LocalLeap's rule; block_diffusion, SDAR: dynamic "
        "(default), static, sequential or all",
    ),
    OptionRow("leap_radius", "integer", "N", "LocalLeap: distance to a sure token (4)"),
    OptionRow(
        "leap_threshold",
        "number",
        "P",
        "LocalLeap: confidence that is enough within that distance",
        none=True,
    ),
    *(OptionRow(*row) for row in block_methods.OPTION_ROWS),
    *(OptionRow(*row) for row in sampling_options.OPTION_ROWS),
)
