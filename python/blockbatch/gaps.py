"""Texts with gaps: `{8}` stands for 8 tokens to decode, `{{` and `}}` for braces; among ids a gap is MASK."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARK = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
# What other tools write for a gap that finds its length itself.
_GROWS = re.compile(r"\s*|\*|\.\.\.|\d+\s*(\+|-|\*|\.\.).*")


def split(text: str, name: str, most: int) -> list[str | int]:
    """The parts of a text in their order: given text, without doubled braces, and the lengths of gaps.

    Args:
        name: what messages call the text.
        most: tokens that a gap may have.

    Raises:
        ValueError: a brace that is neither doubled nor around a length.
    """
    parts: list[str | int] = [""]
    read = 0
    for mark in _MARK.finditer(text):
        _extend(parts, text[read : mark.start()])
        read = mark.end()
        if mark.group() in ("{{", "}}"):
            _extend(parts, mark.group()[0])
        else:
            parts.append(_length(mark, name, most))
    _extend(parts, text[read:])
    return [part for part in parts if part != ""]


def _extend(parts: list[str | int], text: str) -> None:
    if isinstance(parts[-1], str):
        parts[-1] += text
    else:
        parts.append(text)


def _length(mark: re.Match[str], name: str, most: int) -> int:
    inside, at = mark.group(1), f"{mark.group()!r:.40} at character {mark.start()}"
    if inside is not None and re.fullmatch("[0-9]+", inside):
        length = int(inside) if len(inside) < 10 else most + 1
        if not 1 <= length <= most:
            raise ValueError(f"{name}: expected gaps of 1 to {most} tokens, got {at}")
        return length
    if inside is not None and _GROWS.fullmatch(inside):
        raise ValueError(
            f"{name}: expected the number of a gap's tokens, such as {{8}}, got {at}; gaps that grow while "
            "they are decoded, as DreamOn's, are not supported"
        )
    raise ValueError(
        f"{name}: expected a gap such as {{8}} for 8 tokens, or {{{{ and }}}} for braces, got {at}"
    )


def runs(ids: Sequence[int], mask_token_id: int) -> list[tuple[int, int, bool]]:
    """Start and end of each stretch of given tokens and of each gap, in their order; whether it is a gap."""
    found: list[tuple[int, int, bool]] = []
    for position, token in enumerate(ids):
        is_gap = token == mask_token_id
        if found and found[-1][2] == is_gap:
            found[-1] = (found[-1][0], position + 1, is_gap)
        else:
            found.append((position, position + 1, is_gap))
    return found


def last(ids: Sequence[int], mask_token_id: int) -> tuple[int, int]:
    """Start and end of the last gap; there is one."""
    return next((start, end) for start, end, is_gap in reversed(runs(ids, mask_token_id)) if is_gap)
