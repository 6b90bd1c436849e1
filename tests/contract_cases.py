"""Calls, and mistakes in them, made from the table of operators."""

import dataclasses

import torch

import blockbatch_kernels as bbk
from blockbatch_kernels.contracts import RecordArg, Scalar, SettingsArg, TensorArg
from blockbatch_kernels.operators import OPERATORS
from blockbatch_kernels.shapes import dims, fields_of
from operator_arguments import EOS, MASK, arguments_of

DREAM = bbk.PolicyParams(MASK, (EOS, 7), prediction_offset=1, policy="dream_published")
WINDOW = bbk.PolicyParams(MASK, (EOS, 7), None, 4, eos_exit="window", query_span="suffix")
# Calls that the arguments of `arguments_of` do not make: operator, what it is about, what is changed.
OTHER_CALLS = (
    ("rms_norm", "rows apart", lambda a: dict(a, x=a["x"].repeat(1, 2)[:, :64], residual=None)),
    ("rms_norm", "transposed", lambda a: dict(a, x=a["x"].t().contiguous().t(), residual=None)),
    ("linear", "static weight", lambda a: dict(a, static_weight=True)),
    ("decode_policy", "window exit", lambda a: dict(a, params=WINDOW)),
    ("decode_policy", "dream", lambda a: dict(a, params=DREAM)),
    ("initial_plan", "dream", lambda a: dict(a, params=DREAM)),
    (
        "decode_policy",
        "no probe",
        lambda a: dict(a, predictions=a["predictions"]._replace(probe_probability=None)),
    ),
)


def calls():
    """(operator, about, change): every operator with all its arguments, with few, and the others."""
    for name, row in OPERATORS.items():
        yield name, "all arguments", lambda a: a
        optional = [argument.name for argument in row.arguments if getattr(argument, "optional", False)]
        if optional:
            yield name, "without optional", lambda a, optional=optional: without(a, optional)
    yield from OTHER_CALLS


def without(arguments, optional):
    """Caches without scales have the dtype of what the operator gives."""
    left = {**arguments, **dict.fromkeys(optional)}
    if "k_scale" in optional:
        dtype = left.get("out_dtype", left["x"].dtype)
        left |= {name: left[name].to(dtype) for name in ("k_cache", "v_cache")}
    return left


def tensors_of(value, name):
    """(path, tensor) of every tensor in an argument or a result; the path is how messages name it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        for index, part in enumerate(value):
            yield from tensors_of(part, f"{name}.{fields[index]}" if fields else f"{name}[{index}]")
    elif isinstance(value, bbk.BranchState):
        for field in dataclasses.fields(value):
            yield f"{name}.{field.name}", getattr(value, field.name)


def all_tensors(arguments):
    return [entry for name, value in arguments.items() for entry in tensors_of(value, name)]


def changed(value, name, path, change):
    """`value` with what is at `path` changed; everything else is the same."""
    if name == path:
        return change(value)
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        parts = [
            changed(part, f"{name}.{fields[index]}" if fields else f"{name}[{index}]", path, change)
            for index, part in enumerate(value)
        ]
        return type(value)(*parts) if fields else tuple(parts)
    if isinstance(value, bbk.BranchState):
        parts = {
            field.name: changed(getattr(value, field.name), f"{name}.{field.name}", path, change)
            for field in dataclasses.fields(value)
        }
        return bbk.BranchState(**parts)
    return value


def with_change(arguments, path, change):
    return {name: changed(value, name, path, change) for name, value in arguments.items()}


def cloned(arguments):
    for path, _ in all_tensors(arguments):
        arguments = with_change(arguments, path, torch.clone)
    return arguments


def records_of(argument):
    """(path, class) of the records of an argument."""
    if isinstance(argument, RecordArg):
        if isinstance(argument.kind, type):
            return [(argument.name, argument.kind)]
        return [(f"{argument.name}[{index}]", kind) for index, kind in enumerate(argument.kind)]
    return []


def tensor_rules(row):
    """(path, dims, dtypes, optional) of every tensor that a call may have, as the row and the records say."""
    for argument in row.arguments:
        if isinstance(argument, TensorArg):
            dtype = row[argument.dtype].dtype if isinstance(argument.dtype, str) else argument.dtype
            yield argument.name, dims(argument.shape), dtype, argument.optional
        for path, kind in records_of(argument):
            for field in fields_of(kind):
                if field.layout is not None:
                    rule = dims(field.layout.shape), (field.layout.dtype,), field.optional
                    yield f"{path}.{field.name}", *rule


@dataclasses.dataclass
class Mistake:
    """A wrong argument: the exception that it must cause, and the starts that its message may have."""

    operator: str
    path: str
    about: str
    change: object
    error: type
    named: tuple[str, ...]

    @property
    def id(self):
        return f"{self.operator}-{self.path}-{self.about}"


def mistakes():
    for name, row in OPERATORS.items():
        for about in (_of_tensors, _of_scalars, _of_records):
            for path, what, change, error, named in about(row):
                yield Mistake(name, path, what, change, error, named)


def _of_tensors(row):
    rules = list(tensor_rules(row))
    users = {}  # symbol -> tensors whose sizes it says
    for path, shape, _, _ in rules:
        for dim in shape:
            users.setdefault(dim.symbol, set()).add(path)
    first = rules[0][0]
    for path, shape, dtypes, optional in rules:
        only = (f"{path}: expected ",)
        yield path, "type", lambda x: [1.0], TypeError, (f"{path}: expected a tensor, got list",)
        if not optional:
            yield path, "missing", lambda x: None, TypeError, (f"{path}: expected a tensor, got NoneType",)
        other = torch.float64 if torch.float32 in dtypes else torch.int16
        # What the dtype of others is taken from has only to be one of several.
        yield path, "dtype", lambda x, other=other: x.to(other), TypeError, only
        yield path, "rank", lambda x: x.unsqueeze(0), ValueError, (f"{path}: expected shape ",)
        device = (
            tuple(f"{one[0]}: expected device " for one in rules)
            if path == first
            else (f"{path}: expected device cpu, got meta",)
        )
        if len(rules) > 1:
            yield path, "device", lambda x: x.to("meta"), ValueError, device
        for index, dim in enumerate(shape):
            if dim.symbol is None and dim.plus is None or users[dim.symbol] == {path} and dim.symbol:
                continue  # any size will do
            named = only if dim.symbol is None else tuple(f"{user}: expected " for user in users[dim.symbol])
            yield path, f"size of {dim}", lambda x, index=index: _longer(x, index), ValueError, named


def _longer(x, index):
    shape = list(x.shape)
    shape[index] += 1
    return x.new_zeros(shape)


_EXPECTED = {
    bool: "True or False",
    int: "an int",
    float: "a number",
    str: "a text",
    torch.dtype: "a torch dtype",
}


def _of_scalars(row):
    for argument in row.arguments:
        if not isinstance(argument, Scalar):
            continue
        name, expected = (
            argument.name,
            _EXPECTED[argument.kind],
        )
        wrong = b"many" if argument.kind is str else "many"
        got = (f"{name}: expected {expected}, got {wrong!r}",)
        yield name, "type", lambda x, wrong=wrong: wrong, TypeError, got
        if argument.default is not None:
            yield name, "missing", lambda x: None, TypeError, (f"{name}: expected {expected}, got None",)
        if argument.least is not None:
            below = argument.least - 1
            message = f"{name}: expected at least {argument.least}, got {below}"
            yield name, "below its bound", lambda x, below=below: below, ValueError, (message,)


def _of_records(row):
    for argument in row.arguments:
        kinds = (
            [(argument.name, argument.kind)] if isinstance(argument, SettingsArg) else records_of(argument)
        )
        for path, kind in kinds:
            message = f"{path}: expected a {kind.__name__}, got dict"
            yield path, "type", lambda x: {}, TypeError, (message,)
        if isinstance(argument, RecordArg) and not isinstance(argument.kind, type):
            names = ", ".join(kind.__name__ for kind in argument.kind)
            message = f"{argument.name}: expected a tuple of {names}, got "
            yield argument.name, "type", lambda x: list(x), TypeError, (message,)
            yield argument.name, "part missing", lambda x: x[:1], TypeError, (message,)


def assert_close(one, other, dtype, path):
    """Equal up to the rounding of `dtype`; e4m3 up to a step of its own, for roundings before it."""
    assert one.dtype == other.dtype, path
    if one.dtype == torch.float8_e4m3fn:
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-3, atol=2**-9, equal_nan=True)
    elif one.is_floating_point():
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(one, other, rtol=tolerance, atol=4 * tolerance)
    else:
        assert torch.equal(one, other), path


def complete_arguments(operator):
    """As `arguments_of`, with every scalar that has a default."""
    scalars = {
        argument.name: argument.default
        for argument in OPERATORS[operator].arguments
        if isinstance(argument, Scalar) and isinstance(argument.default, int | float | str)
    }
    optional = dict(distinct_rows=2, num_branches=1, softmax_scale=0.125) if "attention" in operator else {}
    names = {argument.name for argument in OPERATORS[operator].arguments}
    return {**scalars, **{k: v for k, v in optional.items() if k in names}, **arguments_of(operator)}
