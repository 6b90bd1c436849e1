"""What the table of operators promises, for every operator and every backend that runs here.

The mistakes and calls are made from the rows: an argument that is added there is tried here.
"""

import inspect
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import blockbatch_kernels as bbk
from blockbatch_kernels import ops
from blockbatch_kernels.contracts import REQUIRED, RecordArg, TensorArg
from blockbatch_kernels.operators import OPERATORS
from blockbatch_kernels.ops import dispatch
from blockbatch_kernels.shapes import fields_of
from contract_cases import (
    all_tensors,
    assert_close,
    calls,
    cloned,
    complete_arguments,
    mistakes,
    tensors_of,
    with_change,
)
from interpreter import in_interpreter, run_in_the_interpreter
from operator_arguments import arguments_of, whole_numbers

MISTAKES, CALLS = list(mistakes()), list(calls())
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
each_call = pytest.mark.parametrize(
    "operator, change",
    [(name, change) for name, _, change in CALLS],
    ids=[f"{n}-{about}" for n, about, _ in CALLS],
)
each_operator = pytest.mark.parametrize("operator", OPERATORS)


# The table and the functions.


def test_the_table_is_complete():
    public = {name for name in bbk.__all__ if callable(getattr(bbk, name)) and name in vars(ops)}
    assert set(OPERATORS) == public - {"backend_of"}
    for name in OPERATORS:
        assert getattr(bbk, name).__wrapped__ is getattr(ops, name)
        assert all(hasattr(dispatch.MODULES[backend], name) for backend in dispatch.MODULES)


@each_operator
def test_a_row_is_the_signature(operator):
    row, function = OPERATORS[operator], getattr(ops, operator)
    *parameters, backend = inspect.signature(function).parameters.values()
    assert (backend.name, backend.default) == ("backend", None)
    assert [argument.name for argument in row.arguments] == [parameter.name for parameter in parameters]
    for argument, parameter in zip(row.arguments, parameters):
        default = getattr(argument, "default", REQUIRED)
        if getattr(argument, "optional", False):
            default = None
        missing = parameter.default is parameter.empty
        if missing:  # None may have to be said
            assert default is REQUIRED or default is None and isinstance(argument, TensorArg)
        else:
            assert default == parameter.default
    written = any(getattr(argument, "written", False) for argument in row.arguments)
    assert ("*written*" in function.__doc__) == written


# Wrong arguments.


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.id for mistake in MISTAKES])
def test_a_wrong_argument_is_named(mistake):
    arguments = with_change(complete_arguments(mistake.operator), mistake.path, mistake.change)
    for backend in (None, *dispatch.MODULES):
        with pytest.raises(mistake.error) as caught:
            getattr(bbk, mistake.operator)(**arguments, backend=backend)
        message = str(caught.value)
        assert message.startswith(mistake.named) and ", got " in message, message


@each_operator
def test_the_arguments_of_these_tests_are_right(operator):
    """Otherwise a mistake might be found for another reason."""
    getattr(bbk, operator)(**complete_arguments(operator))
    paths = {path for path, _ in all_tensors(complete_arguments(operator))}
    tried = {mistake.path for mistake in MISTAKES if mistake.operator == operator and mistake.about == "rank"}
    assert paths == tried


# Registration.


class Recorder(TorchDispatchMode):
    """The calls of registered operators, with their arguments as they were before the call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "blockbatch_kernels":
            self.calls.append((func, *tree_map_only(torch.Tensor, torch.clone, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_call
def test_opcheck(operator, change, device):
    with Recorder() as recorder:
        getattr(bbk, operator)(**change(arguments_of(operator, device)))
    registered, args, kwargs = recorder.calls[-1]
    suffix = "_out" if change(arguments_of(operator)).get("out") is not None else ""
    assert registered.name() == f"blockbatch_kernels::{operator}{suffix}"
    checks = list(OPCHECKS)
    if any(isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn for value in args):
        checks.remove("test_schema")  # compares arguments by an operator that has no e4m3
    torch.library.opcheck(registered, args, kwargs, test_utils=checks)


@each_call
def test_the_registered_operator_gives_the_same(operator, change):
    """Bit for bit what the plain call gives and writes, in memory that nothing else uses."""
    plain, registered = (change(arguments_of(operator)) for _ in range(2))
    expected = getattr(bbk, operator)(**plain)
    with Recorder():
        got = getattr(bbk, operator)(**registered)
    assert_same(tensors_of(got, "result"), tensors_of(expected, "result"))
    assert_same(all_tensors(registered), all_tensors(plain))
    results = [] if "out" in registered else [tensor for _, tensor in tensors_of(got, "result")]
    everything = [*results, *(tensor for _, tensor in all_tensors(registered))]
    for index, result in enumerate(results):
        assert result.is_contiguous()
        places = [other.untyped_storage().data_ptr() for other in everything[index + 1 :]]
        assert result.numel() == 0 or result.untyped_storage().data_ptr() not in places


def assert_same(got, expected):
    for (path, one), (other_path, other) in zip(got, expected, strict=True):
        assert path == other_path
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@each_call
@pytest.mark.parametrize("mode, device", [(FakeTensorMode, "cpu"), (Recorder, "meta")])
def test_fakes_are_as_the_real(operator, change, mode, device):
    """Shapes, dtypes, strides and numbers of results that nobody computed."""
    with Recorder():
        expected = getattr(bbk, operator)(**change(arguments_of(operator)))
    arguments = arguments_of(operator)
    with mode():
        for path, _ in all_tensors(arguments):
            arguments = with_change(
                arguments, path, lambda x: torch.empty(x.shape, dtype=x.dtype, device=device)
            )
        got = getattr(bbk, operator)(**change(arguments))
    real, fake = (list(tensors_of(result, "result")) for result in (expected, got))
    for (path, one), (other_path, other) in zip(fake, real, strict=True):
        assert path == other_path and one.device.type == device
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride()), path
    if isinstance(expected, bbk.AttentionPlan):
        assert got[-3:] == expected[-3:]


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((torch.ones(2, 4),), {}, "weight: expected an argument of rms_norm, got none"),
        ((torch.ones(2, 4), torch.ones(4)), dict(eps=1e-5, bias=None), "rms_norm: expected its arguments"),
        ((torch.ones(2, 4), torch.ones(4), 1e-5), {}, "eps: expected an argument of rms_norm, got none"),
        ((torch.ones(2, 4), torch.ones(4), 1e-5), dict(eps=1e-5), "rms_norm: expected its arguments"),
    ],
)
def test_a_traced_call_takes_the_same_arguments(args, kwargs, message):
    with pytest.raises(TypeError):
        bbk.rms_norm(*args, **kwargs)
    with Recorder(), pytest.raises(TypeError, match=message):
        bbk.rms_norm(*args, **kwargs)


# What is written, and what comes out, by every backend.


def written_paths(operator, arguments):
    """Tensors that the operator may write, by argument."""
    row, paths = OPERATORS[operator], {}
    for argument in row.arguments:
        if not getattr(argument, "written", False) or arguments.get(argument.name) is None:
            continue
        found = [path for path, _ in tensors_of(arguments[argument.name], argument.name)]
        if isinstance(argument, RecordArg) and argument.kind is bbk.BranchState:
            given = {
                f"{argument.name}.{field.name}" for field in fields_of(bbk.BranchState) if field.layout.given
            }
            found = [path for path in found if path not in given]
        paths[argument.name] = found
    return paths


def check_what_is_written(operator, arguments, backend):
    before = dict(all_tensors(cloned(arguments)))
    getattr(bbk, operator)(**arguments, backend=backend)
    writable = written_paths(operator, arguments)
    after = dict(all_tensors(arguments))
    different = {path for path in before if not same_bits(before[path], after[path])}
    allowed = {path for paths in writable.values() for path in paths}
    assert different <= allowed, f"{different - allowed} are not written, says the row"
    for name, paths in writable.items():
        assert different & set(paths), f"{name} is written, says the row"


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def check_against_the_reference(operator, change, backend, device, dtype):
    for seed in range(1, 4):
        expected, got = (change(exact_arguments(operator, device, dtype, seed)) for _ in range(2))
        want = getattr(bbk, operator)(**expected, backend="reference")
        result = getattr(bbk, operator)(**got, backend=backend)
        if operator == "attention_plan":
            # Only the CUDA backend plans units; test_attention_plan.py compares them.
            want, result = want[:5], result[:5]
        for left, right in (
            (tensors_of(result, "result"), tensors_of(want, "result")),
            (all_tensors(got), all_tensors(expected)),
        ):
            for (path, one), (_, other) in zip(left, right, strict=True):
                assert_close(one, other, dtype, path)


def exact_arguments(operator, device, dtype, seed):
    """Logits that are exact in every dtype, so that there is one top token."""
    arguments = arguments_of(operator, device, dtype, seed)
    if operator == "lm_head_confidence":
        for name in ("hidden", "weight"):
            arguments[name] = whole_numbers(arguments[name].shape, device, dtype)
        arguments["hidden"] /= 16
    return arguments


@each_call
def test_the_reference_writes_what_its_row_says(operator, change):
    check_what_is_written(operator, change(arguments_of(operator)), "reference")


def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "interpreted")


@in_interpreter
@each_call
def test_interpreted(operator, change, poisoned):
    check_what_is_written(operator, change(arguments_of(operator)), "triton")
    check_against_the_reference(operator, change, "triton", "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@each_call
def test_on_a_gpu(operator, change, backend, dtype, poisoned):
    check_what_is_written(operator, change(arguments_of(operator, "cuda", dtype)), backend)
    check_against_the_reference(operator, change, backend, "cuda", dtype)


# Records.


def test_a_state_starts_and_restarts_as_its_layouts_say():
    def start():
        prompts = torch.tensor([[1, 2, 3], [4, 5, 0]], dtype=torch.int32)
        lengths, sizes = torch.tensor([3, 2], dtype=torch.int32), torch.tensor([4, 8], dtype=torch.int32)
        return bbk.BranchState.create(prompts, lengths, sizes, 16, 49)

    state, fresh = start(), start()
    for name, tensor in tensors_of(state, "state"):
        if name != "state.block_size":
            tensor.fill_(True)
    state.reset(fresh.prompt_tokens[:, :3], fresh.prompt_length, 49)
    assert_same(tensors_of(state, "state"), tensors_of(fresh, "state"))


def test_every_setting_is_an_argument_of_the_registered_operator():
    schema = str(torch.ops.blockbatch_kernels.decode_policy.default._schema)
    for field, setting in bbk.PolicyParams.__dataclass_fields__.items():
        assert re.search(rf"(int|float|str|bool)(\[\])?\?? {field}[,)]", schema), setting
