"""What callers hand over, as Python's own: numbers of numpy and torch, arrays and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any


def as_int(value: Any) -> int | None:
    """The integer that `value` is, of Python, numpy or torch (a tensor of no dimension); None if it is none.

    True and False are none.
    """
    value = _scalar(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_float(value: Any) -> float | None:
    """The number that `value` is, as `as_int`; None if it is none."""
    value = _scalar(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def as_bool(value: Any) -> bool | None:
    """The truth value that `value` is, of Python, numpy or torch; None if it is none."""
    value = _scalar(value)
    return value if isinstance(value, bool) else None


def as_list(value: Any) -> list[Any] | None:
    """The members of a sequence, array or tensor; None if `value` is none of these.

    Texts, bytes and mappings are none. Arrays and tensors of more dimensions become lists of lists.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)):
        return None
    if hasattr(value, "tolist"):
        value = value.tolist()
        return value if isinstance(value, list) else None
    return list(value) if isinstance(value, Sequence) else None


class NamesOf(Sequence[str]):
    """The names of a table that may grow, in their order; equal to a tuple of them."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table

    def __getitem__(self, index: Any) -> Any:
        return tuple(self._table)[index]

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: Any) -> bool:
        return name in self._table

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, NamesOf) else other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(tuple(self))


def _scalar(value: Any) -> Any:
    """The Python number of a numpy number, or of an array or tensor without a dimension; else `value`."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value
