"""How the argument of a public function appears in the registered operator, by its kind in the table."""

from __future__ import annotations

import operator
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from blockbatch_kernels import shapes
from blockbatch_kernels.contracts import REQUIRED, Argument, RecordArg, Scalar, SettingsArg, TensorArg
from blockbatch_kernels.structs import BranchState

# Words of the schema for kinds of numbers that Python calls by another name.
_SCHEMA_KINDS = {torch.dtype: "ScalarType"}


class Registered(ABC):
    """Attributes: its name, and the positional and keyword parts of the schema."""

    def __init__(self, name: str, positional: Sequence[str] = (), options: Sequence[str] = ()):
        self.name = name
        self.positional, self.options = tuple(positional), tuple(options)

    @abstractmethod
    def take_apart(self, value: Any, tensors: list[Any], options: dict[str, Any]) -> None:
        """Adds what the registered operator takes."""

    @abstractmethod
    def put_together(self, given: dict[str, Any]) -> Any:
        """The argument out of what the registered operator was given."""


def as_registered(argument: Argument) -> Registered:
    if isinstance(argument, TensorArg):
        return _Tensor(argument)
    if isinstance(argument, Scalar):
        return _Number(argument)
    if isinstance(argument, SettingsArg):
        return _Settings(argument)
    return _State(argument) if argument.kind is BranchState else _Record(argument)


class _Tensor(Registered):
    def __init__(self, argument: TensorArg):
        written, optional = "(!)" if argument.written else "", "?" if argument.optional else ""
        super().__init__(argument.name, [f"Tensor{written}{optional} {argument.name}"])
        self.pinned = argument.pinned

    def take_apart(self, value, tensors, options):
        if self.pinned and value is not None:
            _pin(value, self.pinned == "whole")
        tensors.append(value)

    def put_together(self, given):
        return given.get(self.name)


class _Number(Registered):
    def __init__(self, argument: Scalar):
        kind = "SymInt" if argument.symbolic else _SCHEMA_KINDS.get(argument.kind, argument.kind.__name__)
        optional = "?" if argument.default is None else ""
        default = f'"{argument.default}"' if argument.kind is str else argument.default
        default = "" if argument.default is REQUIRED else f"={default}"
        super().__init__(argument.name, (), [f"{kind}{optional} {argument.name}{default}"])
        self.default = argument.default

    def take_apart(self, value, tensors, options):
        options[self.name] = value

    def put_together(self, given):
        return given.get(self.name, self.default)


class _Settings(Registered):
    """A dataclass of settings: each is an argument, without a default."""

    def __init__(self, argument: SettingsArg):
        hints = typing.get_type_hints(argument.kind)
        self.kind, self.names = argument.kind, tuple(field.name for field in fields(argument.kind))
        self.lists = tuple(name for name in self.names if typing.get_origin(hints[name]) is tuple)
        super().__init__(argument.name, (), [f"{_schema_type(hints[name])} {name}" for name in self.names])

    def take_apart(self, value, tensors, options):
        for name in self.names:
            setting = getattr(value, name)
            options[name] = list(setting) if name in self.lists else setting

    def put_together(self, given):
        settings = {name: given[name] for name in self.names}
        return self.kind(**{**settings, **{name: tuple(settings[name]) for name in self.lists}})


def _schema_type(hint: Any) -> str:
    """The schema's word for an annotation: int, float, bool or str, tuple[int, ...] of them, or None."""
    if shapes.is_optional(hint):
        (hint,) = (one for one in shapes.alternatives(hint) if one is not type(None))
        return f"{_schema_type(hint)}?"
    if typing.get_origin(hint) is tuple:
        return f"{_schema_type(typing.get_args(hint)[0])}[]"
    return hint.__name__


class _State(Registered):
    """A BranchState: one list of what is only read, and one of the rest, which may be written."""

    def __init__(self, argument: RecordArg):
        written = "(!)" if argument.written else ""
        super().__init__(argument.name, ["Tensor[] read", f"Tensor{written}[] written"])
        layouts = shapes.fields_of(BranchState)
        self.read = tuple(field.name for field in layouts if field.layout.given)
        self.written = tuple(field.name for field in layouts if not field.layout.given)

    def take_apart(self, value, tensors, options):
        tensors.append([getattr(value, name) for name in self.read])
        tensors.append([getattr(value, name) for name in self.written])

    def put_together(self, given):
        names = (*self.read, *self.written)
        return BranchState(**dict(zip(names, (*given["read"], *given["written"]))))


class _Record(Registered):
    """Named tuples: a list of their tensors, without those that are None, and of their numbers."""

    def __init__(self, argument: RecordArg):
        self.single = isinstance(argument.kind, type)
        self.kinds = (argument.kind,) if self.single else argument.kind
        self.tensors = tuple(
            tuple(field.name for field in shapes.fields_of(kind) if field.layout is not None)
            for kind in self.kinds
        )
        self.numbers = tuple(
            field.name for kind in self.kinds for field in shapes.fields_of(kind) if field.layout is None
        )
        self.sizes, self.given = f"{argument.name}_sizes", f"{argument.name}_given"
        # Whether any may be None: the list then comes with the places of those that are there.
        self.optional = any(field.optional for kind in self.kinds for field in shapes.fields_of(kind))
        written = "(!)" if argument.written else ""
        super().__init__(
            argument.name,
            [f"Tensor{written}[] {argument.name}"],
            [f"int[] {name}" for name, used in self._lists().items() if used],
        )

    def _lists(self) -> dict[str, bool]:
        return {self.sizes: bool(self.numbers), self.given: self.optional}

    def take_apart(self, value, tensors, options):
        parts, numbers = [], []
        if value is not None:
            for record, names in zip((value,) if self.single else value, self.tensors):
                parts += [getattr(record, name) for name in names]
                numbers += [getattr(record, name) for name in self.numbers]
        tensors.append([part for part in parts if part is not None])
        if self.numbers:
            options[self.sizes] = numbers
        if self.optional:
            options[self.given] = [place for place, part in enumerate(parts) if part is not None]

    def put_together(self, given):
        left = list(given[self.name])
        if self.optional:
            there = dict(zip(given[self.given], left))
            left = [there.get(place) for place in range(sum(map(len, self.tensors)))] if left else []
        numbers = dict(zip(self.numbers, given.get(self.sizes, ())))
        if not left:
            return None
        records = []
        for kind, names in zip(self.kinds, self.tensors):
            records.append(kind(**dict(zip(names, left)), **numbers))
            left = left[len(names) :]
        return records[0] if self.single else tuple(records)


def _pin(tensor: Tensor, whole: bool) -> None:
    """Makes all sizes and strides but the first size constants of the traced program; the first if `whole`.

    Inductor takes the storage offset of a view that an operator writes for zero when the offset is an
    expression of symbolic sizes (pytorch/pytorch#198068): V would land on K, and its place may depend on the
    number of pages. Widths of the model and sizes of the cache never change from step to step, so nothing is
    lost; the number of tokens stays symbolic.
    """
    for size in (*tensor.shape[0 if whole else 1 :], *tensor.stride()):
        operator.index(size)
