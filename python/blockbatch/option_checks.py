"""Checks of single options of `DecodeConfig`.

Each returns the value as Python's own, or raises ValueError or TypeError that names the option, what was
expected and what came.
"""

from __future__ import annotations

from typing import Any

from blockbatch.texts import check_text
from blockbatch.values import as_float, as_int

# Rows of a request beside its branch.
MAX_DRAFTS = 31


def checked_int(name: str, value: Any, least: int) -> int:
    """`value` as Python's integer, if it is one and at least `least`."""
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def checked_probability(
    name: str, given: Any, *, above: float | None = None, least: float | None = None
) -> float:
    """`given` as Python's number, if it is more than `above`, or at least `least`, and at most 1."""
    value = as_float(given)
    if value is None:
        raise TypeError(f"{name}: expected a number, got {given!r}")
    low_enough = value > above if above is not None else value >= least
    if not (low_enough and value <= 1.0):
        bounds = f"above {above:g} and at most 1" if above is not None else f"from {least:g} to 1"
        raise ValueError(f"{name}: expected a value {bounds}, got {given}")
    return value


def checked_drafts(given: Any, block_size: int, query_span: str) -> tuple[int, ...]:
    """Lengths of the drafts of a method with one block."""
    drafts = tuple(checked_int("drafts", length, 1) for length in as_tuple("drafts", given))
    if not drafts or sorted(set(drafts)) != list(drafts) or len(drafts) > MAX_DRAFTS:
        raise ValueError(f"drafts: expected 1 to {MAX_DRAFTS} ascending numbers, got {drafts}")
    if drafts[-1] >= block_size:
        raise ValueError(
            f"drafts: expected numbers below block_size = {block_size}, since a draft leaves a MASK, got "
            f"{drafts[-1]}"
        )
    if query_span != "window":
        raise ValueError(
            f'drafts: expected query_span="window", where a draft computes just what the next forward '
            f"would, got {query_span!r}"
        )
    return drafts


def as_tuple(name: str, value: Any) -> tuple:
    """The members of a sequence, array or tensor of integers; the members are not looked at."""
    members = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(members, (str, bytes)) or not hasattr(members, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of integers, got {value!r}")
    return tuple(members)


def as_texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, none of them empty."""
    if isinstance(value, str):
        texts, names = (value,), (name,)
    elif isinstance(value, (bytes, bytearray)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of texts, got {value!r}")
    else:
        texts = tuple(value)
        names = tuple(f"{name}[{index}]" for index in range(len(texts)))
    for text, called in zip(texts, names):
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected texts, got {text!r}")
        if not text:
            raise ValueError(f"{name}: expected texts of at least one character, got an empty one")
        check_text(text, called)
    return tuple(map(str, texts))
