"""The knobs that an ablation turns, a row for each, and the settings that it makes of them.

Those of the paper (arXiv 2605.29233), and of the options that this package adds to it. Drafts, which a method
of one branch has, are those of the dual cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockbatch.config import DecodeConfig
from blockbatch.evaluation.settings import Setting


@dataclass(frozen=True)
class Ablation:
    """One knob.

    Attributes:
        title: what is turned, with its unit.
        variants: options of `DecodeConfig` by label, in the order of a table; one of them is the default.
        ordered: whether a line from one to the next means something.
        base: what all variants have in common, the default among them; nothing: BlockBatch's defaults.
    """

    title: str
    variants: dict[str, dict[str, Any]]
    ordered: bool = True
    base: Mapping[str, Any] = field(default_factory=dict)


def _values(option: str, values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    return {"off" if value is None else str(value): {option: value} for value in values}


def _block_sizes(*sets: Sequence[int]) -> dict[str, dict[str, Any]]:
    return {
        f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else str(sizes[0]): {"block_sizes": tuple(sizes)}
        for sizes in sets
    }


_SIZES = (4, 8, 16, 32, 64, 128)
ABLATIONS: dict[str, Ablation] = {
    # The set grown from below, shrunk from below, and the block size of the dual cache alone.
    "block-sizes": Ablation(
        "block sizes, tokens (powers of two)",
        _block_sizes(
            *(_SIZES[:end] for end in range(2, 7)), *(_SIZES[start:] for start in range(1, 5)), (32,)
        ),
    ),
    # Those left out are the largest sizes: at 256 tokens 4-64, 4-32, 4-16 and 4-8 are left.
    "max-step-tokens": Ablation(
        "most tokens of a block step", _values("max_step_tokens", (None, 128, 64, 32, 16))
    ),
    "threshold": Ablation("commit threshold", _values("threshold", (0.7, 0.8, 0.9, 0.95, 0.97, 0.99))),
    "tail-threshold": Ablation(
        "tail threshold", _values("tail_threshold", (None, 0.95, 0.97, 0.98, 0.99, 0.995))
    ),
    "merge-threshold": Ablation(
        "merge threshold", _values("merge_threshold", (0.5, 0.6, 0.7, 0.8, 0.9, None))
    ),
    "sync-threshold": Ablation("sync threshold, tokens", _values("sync_threshold", (4, 8, 16, 32, 64, None))),
    "refresh-interval": Ablation(
        "refresh interval, tokens", _values("refresh_interval", (4, 8, 16, 32, 64, 128, None))
    ),
    "components": Ablation(
        "what is switched off",
        {
            "nothing": {},
            "merge": {"merge_threshold": None},
            "sync": {"sync_threshold": None},
            "refresh": {"refresh_interval": None},
            "merge and sync": {"merge_threshold": None, "sync_threshold": None},
            "all three": {"merge_threshold": None, "sync_threshold": None, "refresh_interval": None},
        },
        ordered=False,
    ),
    "commit": Ablation("commit rule", _values("commit", ("threshold", "local_leap")), ordered=False),
    "eos-exit": Ablation("end of decoding", _values("eos_exit", ("prefix", "window", "none")), ordered=False),
    # Open queries leave little for a refresh to do.
    "query-span": Ablation(
        "what a block step computes",
        {
            "window": {},
            "window, no refresh": {"refresh_interval": None},
            "open": {"query_span": "open"},
            "open, no refresh": {"query_span": "open", "refresh_interval": None},
        },
        ordered=False,
    ),
    "refresh-scope": Ablation(
        "what a refresh computes", _values("refresh_scope", ("canvas", "generation")), ordered=False
    ),
    "drafts": Ablation(
        "drafts of the dual cache, surest tokens each",
        {
            "off": {},
            **{",".join(map(str, drafts)): {"drafts": drafts} for drafts in ((1,), (1, 2), (1, 2, 3))},
            "1-8": {"drafts": tuple(range(1, 9))},
        },
        base={"method": "dual_cache", "eos_exit": "prefix"},
    ),
}
KINDS = tuple(ABLATIONS)


def ablation_settings(kind: str, gen_length: int) -> tuple[list[Setting], str]:
    """The settings of an ablation, and the label of the default among them.

    Args:
        kind: one of `KINDS`.
        gen_length: tokens to generate. Sets with block sizes that do not divide it are left out, and so are
            budgets that are too small for its smallest block size and drafts that its block has no room for.

    Raises:
        ValueError: an unknown kind, or a gen_length at which nothing is left to compare.
    """
    if kind not in ABLATIONS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    base = ABLATIONS[kind].base
    default = DecodeConfig(gen_length=gen_length, **base)
    settings, default_label = [], None
    for label, options in ABLATIONS[kind].variants.items():
        if any(gen_length % size for size in options.get("block_sizes", ())):
            continue
        budget = options.get("max_step_tokens")
        if budget is not None and budget < default.block_sizes[0]:
            continue
        if max(options.get("drafts", (0,))) >= (default.block_size or gen_length):
            continue
        setting = Setting(label, DecodeConfig(gen_length=gen_length, **base, **options))
        settings.append(setting)
        if setting.config == default:
            default_label = label
    if default_label is None:
        raise ValueError(f"gen_length: expected a multiple of {max(_SIZES)} for {kind}, got {gen_length}")
    return settings, default_label
