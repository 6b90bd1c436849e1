"""What a row of the table of operators says; `operators` is the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

REQUIRED: Any = object()  # the default of an argument that has none


@dataclass(frozen=True)
class TensorArg:
    """A tensor. All tensors of a call lie on the device of the first.

    Attributes:
        shape: in words, see `shapes`.
        dtype: the dtypes that it may have, or the name of the argument whose dtype it shares.
        optional: None is allowed, and the default where the signature has one.
        written: the operator changes it in place.
        pinned: all its sizes but the first, and its strides, become constants of a traced program; as "whole"
            the first size too. See `library`.
    """

    name: str
    shape: str
    dtype: tuple[torch.dtype, ...] | str
    optional: bool = False
    written: bool = False
    pinned: bool | str = False


@dataclass(frozen=True)
class RecordArg:
    """A record of `structs`, or a tuple of several; what its fields are is said there.

    Attributes:
        kind: the class, or a tuple of classes.
        optional, written: as for a tensor; of a BranchState all but its given fields are written.
    """

    name: str
    kind: type | tuple[type, ...]
    optional: bool = False
    written: bool = False


@dataclass(frozen=True)
class SettingsArg:
    """A dataclass of plain settings, whose method `check` raises for values that it does not know."""

    name: str
    kind: type


@dataclass(frozen=True)
class Scalar:
    """A number, whose name also stands for a size in shapes, or a dtype.

    Attributes:
        kind: int, float, bool, str or torch.dtype.
        default: None makes it optional.
        least: the smallest value.
        symbolic: may be a size that is a symbol while PyTorch traces.
    """

    name: str
    kind: type
    default: Any = REQUIRED
    least: int | None = None
    symbolic: bool = False

    @property
    def optional(self) -> bool:
        return self.default is None


Argument = TensorArg | RecordArg | SettingsArg | Scalar


@dataclass(frozen=True)
class Result:
    """A tensor that comes out.

    Attributes:
        shape: in words, of symbols that arguments give sizes.
        dtype: its dtype, or the name of the argument whose dtype it has or that says it.
        given: it is None unless this argument is given.
    """

    shape: str
    dtype: torch.dtype | str
    given: str | None = None


@dataclass(frozen=True)
class Operator:
    """One row.

    Attributes:
        arguments: in the order of the signature; `backend` follows them all.
        results: one Result, several, a record class, or several of those. An argument named `out` is written
            and returned instead.
        symbols: for results whose shapes need code: from the sizes of the arguments, their device and the
            backend that computes (None: any) to the sizes of the symbols that no argument binds.
    """

    name: str
    arguments: tuple[Argument, ...]
    results: tuple[Result | type, ...] = ()
    symbols: Callable[[dict[str, int], torch.device, str | None], dict[str, int]] | None = field(
        default=None, repr=False
    )

    def __getitem__(self, name: str) -> Argument:
        return next(argument for argument in self.arguments if argument.name == name)
