"""Checks of the operators' arguments: type, shape, dtype and device, never a value on the device.

The checks of an operator follow from its row in the table. They are written out as one straight Python
function when the module is loaded, since they run in front of every launch.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from blockbatch_kernels.contracts import Argument, Operator, RecordArg, Scalar, SettingsArg, TensorArg
from blockbatch_kernels.operators import OPERATORS
from blockbatch_kernels.shapes import Dim, Field, dims, fields_of

# What a scalar may be, and how messages say it.
_KINDS = {
    bool: ("bool", "True or False"),
    int: ("int", "an int"),
    float: ("(float, int)", "a number"),
    torch.dtype: ("torch_dtype", "a torch dtype"),
    str: ("str", "a text"),
}


def checker(name: str) -> Callable[..., None]:
    """The checks of the operator: a function of its arguments in the order of the row, without `backend`."""
    return _Writer(OPERATORS[name]).function()


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """`None` in `shape` stands for any size, as `device` for any device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    ):
        expected = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _wrong_record(name: str, kind: type | tuple[type, ...], value: Any) -> NoReturn:
    if isinstance(kind, type):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    expected = ", ".join(one.__name__ for one in kind)
    raise TypeError(f"{name}: expected a tuple of {expected}, got {type(value).__name__}")


def _wrong_scalar(name: str, value: Any, expected: str) -> NoReturn:
    raise TypeError(f"{name}: expected {expected}, got {value!r}")


def _too_small(name: str, value: int, least: int) -> NoReturn:
    raise ValueError(f"{name}: expected at least {least}, got {value}")


def _not_divisible(name: str, symbol: str, by: int, size: int) -> NoReturn:
    expected = f"an even {symbol}" if by == 2 else f"a {symbol} divisible by {by}"
    raise ValueError(f"{name}: expected {expected}, got {size}")


_HELPERS = (check_tensor, _wrong_record, _wrong_scalar, _too_small, _not_divisible, isinstance, len, Tensor)


class _Writer:
    """Writes the function: `size_x` is what the symbol x stands for, `dtype_x` the dtype of argument x."""

    def __init__(self, operator: Operator):
        self.operator = operator
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {helper.__name__: helper for helper in _HELPERS}
        self.scope["torch_dtype"] = torch.dtype
        self.owners: dict[str, str] = {}  # symbol -> the argument that gives it its size
        self.has_device = False

    def function(self) -> Callable[..., None]:
        names = [argument.name for argument in self.operator.arguments]
        for argument in self._in_order():
            self._argument(argument)
        body = "\n".join(f"    {line}" for line in self.lines)
        source = f"def check_{self.operator.name}({', '.join(names)}):\n{body}\n"
        file = f"<checks of {self.operator.name}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # for tracebacks
        exec(compile(source, file, "exec"), self.scope)
        return self.scope[f"check_{self.operator.name}"]

    def _in_order(self) -> Iterator[Argument]:
        """As in the row, but what needs the size of a symbol behind the argument that gives it."""
        bound: set[str] = set()
        waiting = list(self.operator.arguments)
        while waiting:
            ready = next((one for one in waiting if _needs(one) <= bound), None)
            if ready is None:
                raise ValueError(f"{self.operator.name}: no argument gives {_needs(waiting[0]) - bound}")
            waiting.remove(ready)
            bound |= _gives(ready)
            yield ready

    def _argument(self, argument: Argument) -> None:
        start = len(self.lines)
        known = dict(self.owners)
        if isinstance(argument, TensorArg):
            self._tensor(argument.name, argument.name, dims(argument.shape), argument.dtype)
        elif isinstance(argument, RecordArg):
            self._records(argument)
        elif isinstance(argument, SettingsArg):
            self._record(argument.name, argument.kind)
            self.lines.append(f"{argument.name}.check()")
        else:
            self._scalar(argument)
        if getattr(argument, "optional", False):
            # What it gives holds inside alone.
            self.owners = known
            inside = self.lines[start:]
            self.lines[start:] = [f"if {argument.name} is not None:", *(f"    {line}" for line in inside)]

    def _records(self, argument: RecordArg) -> None:
        name, kinds = argument.name, argument.kind
        if isinstance(kinds, type):
            self._record(name, kinds)
            self._fields(name, kinds)
            return
        kind = self._constant(kinds)
        self.lines.append(f"if not isinstance({name}, tuple) or len({name}) != {len(kinds)}:")
        self.lines.append(f"    _wrong_record({name!r}, {kind}, {name})")
        for index, one in enumerate(kinds):
            self._record(f"{name}[{index}]", one)
            self._fields(f"{name}[{index}]", one)

    def _record(self, name: str, kind: type) -> None:
        constant = self._constant(kind)
        self.lines.append(
            f"if not isinstance({name}, {constant}): _wrong_record({name!r}, {constant}, {name})"
        )

    def _fields(self, name: str, kind: type) -> None:
        tensors = [field for field in fields_of(kind) if field.layout is not None]
        for field in sorted(tensors, key=self._rank):
            path, shape = f"{name}.{field.name}", dims(field.layout.shape)
            self.lines.append(f"tensor = {path}")
            start = len(self.lines)
            self._tensor(path, "tensor", shape, (field.layout.dtype,))
            if field.optional:
                inside = self.lines[start:]
                self.lines[start:] = ["if tensor is not None:", *(f"    {line}" for line in inside)]

    def _rank(self, field: Field) -> int:
        """Fields of known sizes are checked first, those that need what another field gives last."""
        unknown = [dim for dim in dims(field.layout.shape) if dim.symbol and dim.symbol not in self.owners]
        return 0 if not unknown else 1 if all(dim.binds for dim in unknown) else 2

    def _tensor(
        self, name: str, tensor: str, shape: tuple[Dim, ...], dtypes: tuple[torch.dtype, ...] | str
    ) -> None:
        """Compares in one expression; what is wrong, `check_tensor` says."""
        for dim in shape:
            if dim.symbol in self.owners and dim.over > 1:
                size, owner = f"size_{dim.symbol}", self.owners[dim.symbol]
                self.lines.append(
                    f"if {size} % {dim.over}: _not_divisible({owner!r}, {dim.symbol!r}, {dim.over}, {size})"
                )
        known = [self._known(dim) for dim in shape]
        wanted = ", ".join(known)
        wanted = f"({wanted},)" if shape else "()"
        if isinstance(dtypes, str):
            allowed, wrong_dtype = f"(dtype_{dtypes},)", f"{tensor}.dtype != dtype_{dtypes}"
        else:
            allowed = self._constant(dtypes)
            wrong_dtype = f"{tensor}.dtype not in {allowed}"
        wrong = [f"not isinstance({tensor}, Tensor)", wrong_dtype]
        if "None" not in known:
            wrong.append(f"{tensor}.shape != {wanted}")
        else:
            wrong.append(f"len(shape := {tensor}.shape) != {len(shape)}")
            wrong += [f"shape[{index}] != {size}" for index, size in enumerate(known) if size != "None"]
        if self.has_device:
            wrong.append(f"{tensor}.device != device")
        self.lines.append(f"if {' or '.join(wrong)}:")
        device = "device" if self.has_device else "None"
        self.lines.append(f"    check_tensor({name!r}, {tensor}, {wanted}, {allowed}, {device})")
        if not self.has_device:
            self.lines.append(f"device = {tensor}.device")
            self.has_device = True
        if any(getattr(other, "dtype", None) == name for other in self.operator.arguments):
            self.lines.append(f"dtype_{name} = {tensor}.dtype")
        self._bind(name, shape)

    def _bind(self, name: str, shape: tuple[Dim, ...]) -> None:
        for index, dim in enumerate(shape):
            if dim.binds and dim.symbol not in self.owners:
                self.owners[dim.symbol] = name
                over = f" // {dim.times}" if dim.times > 1 else ""
                self.lines.append(f"size_{dim.symbol} = shape[{index}]{over}")

    def _known(self, dim: Dim) -> str:
        """The size as an expression, "None" where any will do."""
        if dim.symbol is None:
            return str(dim.plus)
        if dim.symbol not in self.owners:
            return "None"
        return str(dim._replace(symbol=f"size_{dim.symbol}"))

    def _scalar(self, scalar: Scalar) -> None:
        name, (kinds, expected) = scalar.name, _KINDS[scalar.kind]
        self.lines.append(
            f"if not isinstance({name}, {kinds}): _wrong_scalar({name!r}, {name}, {expected!r})"
        )
        if scalar.least is not None:
            self.lines.append(f"if {name} < {scalar.least}: _too_small({name!r}, {name}, {scalar.least})")

    def _constant(self, value: Any) -> str:
        name = f"constant_{len(self.scope)}"
        self.scope[name] = value
        return name


def _shapes(argument: Argument) -> list[tuple[Dim, ...]]:
    if isinstance(argument, TensorArg):
        return [dims(argument.shape)]
    if isinstance(argument, RecordArg):
        kinds = (argument.kind,) if isinstance(argument.kind, type) else argument.kind
        return [dims(field.layout.shape) for kind in kinds for field in fields_of(kind) if field.layout]
    return []


def _gives(argument: Argument) -> set[str]:
    if getattr(argument, "optional", False):
        return set()
    return {dim.symbol for shape in _shapes(argument) for dim in shape if dim.binds}


def _needs(argument: Argument) -> set[str]:
    """Symbols that the argument uses without saying by its own sizes what they stand for."""
    own = {dim.symbol for shape in _shapes(argument) for dim in shape if dim.binds}
    return {dim.symbol for shape in _shapes(argument) for dim in shape if dim.symbol} - own
