"""The operators as `torch.ops.blockbatch_kernels.*`: what `torch.compile` and `torch.export` trace.

`traceable` gives a function of `ops` a second way in: where PyTorch traces, the call becomes one registered
operator, whose fake implementation says what comes out; everywhere else it stays the plain function call that
it was, without the dispatcher's cost. Schema, fake and the way in follow from the operator's row.

Registered operators take tensors, lists of tensors, numbers and strings alone, so the records of `structs`
are taken apart on the way in and put together again inside: a BranchState becomes the lists `read` and
`written` (what the policy only reads, and the rest), another record a list of its tensors, settings an
argument each, and tensors to write into (`out`) make an operator of their own, with `_out` behind its name.
Outputs are contiguous and share no memory with anything. None has a derivative.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from blockbatch_kernels import ops, shapes
from blockbatch_kernels.contracts import Operator, RecordArg, Result, Scalar, TensorArg
from blockbatch_kernels.operators import OPERATORS
from blockbatch_kernels.registered import Registered, as_registered

NAMESPACE = "blockbatch_kernels"


def traceable(function: Callable) -> Callable:
    """Registers the operator `function` (by its name) and routes calls to it while PyTorch traces."""
    traced = _traced(OPERATORS[function.__name__], function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Besides compilation, dispatch modes (fake tensors, make_fx, counters) must see one operator.
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return traced(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _traced(row: Operator, function: Callable) -> Callable:
    """What a call of the public function becomes while PyTorch traces."""
    arguments = [as_registered(argument) for argument in row.arguments]
    inputs = [argument for argument in arguments if argument.name != "out"]
    sizes_of = Sizes(row)
    put_together = Results(row, sizes_of)
    op = _register(row.name, row, inputs, function)
    op_out = None
    if len(inputs) < len(arguments):
        op_out = _register(f"{row.name}_out", replace(row, results=()), arguments, function)
    parameters = inspect.signature(function).parameters.values()
    positional = tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    needed, number = tuple(one.name for one in parameters if one.name not in defaults), len(parameters)

    def traced(*args: Any, **kwargs: Any) -> Any:
        values = {**defaults, **dict(zip(positional, args)), **kwargs}
        for name in needed:
            if name not in values:
                raise TypeError(f"{name}: expected an argument of {row.name}, got none")
        if len(args) > len(positional) or len(values) > number:
            raise TypeError(
                f"{row.name}: expected its arguments, got others too: {len(args)}, {list(kwargs)}"
            )
        out = values.get("out")
        tensors, options = [], {"backend": values["backend"]}
        for argument in inputs if out is None else arguments:
            argument.take_apart(values[argument.name], tensors, options)
        if out is not None:
            op_out(*tensors, **options)
            return out
        return put_together(values, op(*tensors, **options))

    return traced


def _register(name: str, row: Operator, arguments: Sequence[Registered], function: Callable) -> Callable:
    """The operator of these arguments that runs `function`, and its fake."""
    listed = [part for argument in arguments for part in argument.positional]
    options = [part for argument in arguments for part in argument.options]
    options.sort(key=lambda part: "=" in part)  # those with a default behind
    letters = iter("abcdefgh")
    listed = [part.replace("!", f"{next(letters)}!") if "!" in part else part for part in _defaults(listed)]
    outputs = ["Tensor"] * sum(_number_of_tensors(result) for result in row.results)
    returns = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
    schema = f"({', '.join(listed)}, *, {', '.join((*options, 'str? backend=None'))}) -> {returns}"
    names = [part.split()[-1].split("=")[0] for part in listed]
    written = [parameter for parameter, part in zip(names, listed) if "!" in part]
    sizes_of = Sizes(row)

    def values_of(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {**dict(zip(names, args)), **kwargs}
        return {argument.name: argument.put_together(given) for argument in arguments}

    def run(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        results = function(**values_of(args, kwargs), backend=backend)
        if not outputs:
            return None
        tensors = _separate(list(_leaves(results)))
        return tensors[0] if len(tensors) == 1 else tensors

    def fake(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        if not outputs:
            return None
        tensors = _fake(row, sizes_of, values_of(args, kwargs), backend)
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    definition = custom_op(f"{NAMESPACE}::{name}", run, mutates_args=tuple(written), schema=schema)
    definition.register_fake(fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _defaults(listed: list[str]) -> list[str]:
    """Tensors that may be None are None by default where nothing but such follows and nobody writes them."""
    last = max((index for index, part in enumerate(listed) if "?" not in part or "!" in part), default=-1)
    return [part if index <= last else f"{part}=None" for index, part in enumerate(listed)]


def _number_of_tensors(result: Result | type) -> int:
    if isinstance(result, Result):
        return 1
    return sum(field.layout is not None for field in shapes.fields_of(result))


def _leaves(results: Any) -> Iterator[Tensor | None]:
    """The tensors of what a function returned, and None for those that it left out; no numbers."""
    if isinstance(results, tuple):
        for part in results:
            yield from _leaves(part)
    elif results is None or isinstance(results, Tensor):
        yield results


def _separate(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tensors contiguous, with a copy of each that is only a part of its memory; nothing is empty."""
    first = next(tensor for tensor in tensors if tensor is not None)

    def own(tensor: Tensor | None) -> Tensor:
        if tensor is None:  # a registered operator returns no None
            return first.new_empty(0, dtype=torch.float32)
        tensor = tensor.contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()

    return tuple(own(tensor) for tensor in tensors)


class Sizes:
    """What the symbols of a row's shapes stand for in a call."""

    def __init__(self, row: Operator):
        self.row = row
        self.scalars = tuple(argument.name for argument in row.arguments if isinstance(argument, Scalar))
        self.tensors = tuple(
            (argument.name, None, _bindings(argument.shape))
            for argument in row.arguments
            if isinstance(argument, TensorArg)
        )
        self.tensors += tuple(
            (argument.name, field.name, _bindings(field.layout.shape))
            for argument in row.arguments
            if isinstance(argument, RecordArg) and argument.name != "out"
            for field in shapes.fields_of(argument.kind)
            if field.layout is not None
        )

    def __call__(self, values: dict[str, Any], backend: str | None = None) -> dict[str, int]:
        """Of arguments that are not checked.

        backend: the one that computes, where shapes depend on it; None: any.
        """
        sizes = {name: values[name] for name in self.scalars}
        for name, field, bindings in self.tensors:
            tensor = values[name]
            if tensor is not None and field is not None:
                tensor = getattr(tensor, field)
            if tensor is not None:
                for index, symbol, times in bindings:
                    size = tensor.shape[index]
                    sizes.setdefault(symbol, size if times == 1 else size // times)
        if self.row.symbols is not None:
            sizes.update(self.row.symbols(sizes, self.example(values).device, backend))
        return sizes

    def example(self, values: dict[str, Any]) -> Tensor:
        """The first tensor of the call."""
        name, field, _ = next(entry for entry in self.tensors if entry[0] == self.row.arguments[0].name)
        return values[name] if field is None else getattr(values[name], field)


def _bindings(shape: str) -> tuple[tuple[int, str, int], ...]:
    return tuple((index, dim.symbol, dim.times) for index, dim in enumerate(shapes.dims(shape)) if dim.binds)


def _fake(row: Operator, sizes_of: Sizes, values: dict[str, Any], backend: str | None) -> list[Tensor]:
    example = sizes_of.example(values)
    if row.symbols is not None:
        backend = ops.backend_of(row.name, example.device, backend)
    sizes = sizes_of(values, backend)

    def empty(shape: str, dtype: torch.dtype) -> Tensor:
        return example.new_empty([dim.size(sizes) for dim in shapes.dims(shape)], dtype=dtype)

    tensors = []
    for result in row.results:
        if isinstance(result, Result):
            dtype = values[result.dtype] if isinstance(result.dtype, str) else result.dtype
            dtype = dtype if isinstance(dtype, torch.dtype) else dtype.dtype
            missing = result.given is not None and values[result.given] is None
            tensors.append(empty("0" if missing else result.shape, dtype))
        else:
            layouts = (field.layout for field in shapes.fields_of(result))
            tensors += [empty(layout.shape, layout.dtype) for layout in layouts if layout is not None]
    return tensors


class Results:
    """What the public function returns, of the tensors that the registered operator returned."""

    def __init__(self, row: Operator, sizes_of: Sizes):
        self.row, self.sizes_of = row, sizes_of
        # Of each result: its class, and whether each field is a tensor; or what it is given for.
        self.parts = tuple(
            (None, result.given)
            if isinstance(result, Result)
            else (result, tuple((field.name, field.layout is not None) for field in shapes.fields_of(result)))
            for result in row.results
        )

    def __call__(self, values: dict[str, Any], tensors: Any) -> Any:
        if not self.parts:
            return None
        left = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        numbers = {} if self.row.symbols is None else self.sizes_of(values)
        results = []
        for record, about in self.parts:
            if record is None:
                tensor = left.pop(0)
                results.append(None if about is not None and values[about] is None else tensor)
            else:
                results.append(
                    record(*[left.pop(0) if is_tensor else numbers[name] for name, is_tensor in about])
                )
        return results[0] if len(results) == 1 else tuple(results)
