"""Rotary settings of config.json: three places for one base, and scalings that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockbatch.models.spec import CheckpointError

# Entries of rope_scaling and rope_parameters beside kind and base, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "factor": (None, 1),
    "partial_rotary_factor": (None, 1),
    "attention_factor": (None, 1),
    "mrope_section": (None, []),
}
_KINDS = ("rope_type", "type")


def fold_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `rope_theta` alone.

    Newer configurations keep the base, with its scaling, in `rope_parameters`; some do in `rope_scaling`.
    Layers of one kind may have an entry of their own there (`full_attention`).

    Raises:
        CheckpointError: positions are scaled or only in part rotated, or two bases differ.
    """
    folded = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        rope = folded.pop(key, None)
        if rope is None or rope == {}:
            continue
        if isinstance(rope, dict) and set(rope) == {"full_attention"}:
            rope = rope["full_attention"]
        if not isinstance(rope, dict) or not _plain(rope):
            raise CheckpointError(
                f"config.json: {key} must be null or of type 'default' (no scaling, whole heads), got "
                f"{rope!r:.300}"
            )
        theta = rope.get("rope_theta")
        if theta is None:
            continue
        other = folded.get("rope_theta")
        if other is not None and other != theta:
            raise CheckpointError(
                f"config.json: {key} must have the rope_theta of the other keys = {other!r}, got {theta!r}"
            )
        folded["rope_theta"] = theta
    return folded


def _plain(rope: Mapping[str, Any]) -> bool:
    kinds = {
        rope[name] if isinstance(rope[name], str) else repr(rope[name]) for name in _KINDS if name in rope
    }
    # Positions divided by 1 are the positions.
    if kinds == {"linear"} and rope.get("factor") in (1, 1.0):
        kinds = {"default"}
    rest = [name for name in rope if name not in (*_KINDS, "rope_theta")]
    return kinds <= {"default"} and all(
        name == "original_max_position_embeddings"
        or (name in _NEUTRAL and any(_equal(rope[name], good) for good in _NEUTRAL[name]))
        for name in rest
    )


def _equal(value: Any, good: Any) -> bool:
    return not isinstance(value, bool) and value == good
