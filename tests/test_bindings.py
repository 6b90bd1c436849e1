"""How arguments reach the extension: tensors, records and options by name, a clear error for a wrong one."""

import dataclasses
import random

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, policy_params, reference, structs
from blockbatch_kernels.cuda import extension as loader
from cuda_places import random_table
from described_tensors import Described
from policy_random import random_batch

pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")

FLOAT = torch.float32


class Subclass(torch.Tensor):
    pass


@pytest.fixture(scope="module")
def extension():
    return loader.load()


@pytest.fixture
def swiglu_arguments():
    # Never launched: each test makes one of them wrong.
    return dict(gate_up=Described((3, 16)), out=Described((3, 8)), stream=0)


def share_arguments():
    return dict(
        page_table=torch.zeros(2, 3, dtype=torch.int32),
        source_row=torch.zeros(2, dtype=torch.int32),
        workspace=None,
        stream=0,
    )


def test_names_that_are_missing_or_unknown_raise(extension, swiglu_arguments):
    with pytest.raises(TypeError, match="^blockbatch_kernels.swiglu: out: missing$"):
        extension.swiglu(gate_up=swiglu_arguments["gate_up"], stream=0)
    with pytest.raises(TypeError, match="^blockbatch_kernels.swiglu: stream: missing$"):
        extension.swiglu(**{name: swiglu_arguments[name] for name in ("gate_up", "out")})
    with pytest.raises(TypeError, match="^blockbatch_kernels.swiglu: unexpected argument 'beta'$"):
        extension.swiglu(**swiglu_arguments, beta=1)
    with pytest.raises(TypeError, match="^blockbatch_kernels.swiglu: expected arguments by name alone$"):
        extension.swiglu(*swiglu_arguments.values())


def test_names_may_come_in_any_order_and_as_any_string(extension):
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    source = torch.tensor([1, -1], dtype=torch.int32)
    names = ["".join(reversed(name)) for name in ("maerts", "wor_ecruos", "ecapskrow", "elbat_egap")]
    extension.share_pages(**dict(zip(names, (0, source, None, table))))  # names that are not interned
    assert table.tolist() == [[3, 4, 5], [3, 4, 5]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(page_table=5), TypeError, "page_table: expected a torch.Tensor or None, got int"),
        (dict(page_table=None), ValueError, "page_table: expected a tensor, got None"),
        (dict(source_row=torch.zeros(2)), ValueError, "source_row: expected int32, got float32"),
        (
            dict(source_row=torch.zeros(2, dtype=torch.int64)),
            ValueError,
            "source_row: expected int32, got int64",
        ),
        (
            dict(source_row=torch.zeros(2, dtype=torch.float64)),
            ValueError,
            "source_row: expected float32, float16, bfloat16, int32, int64, bool or uint8, got torch.float64",
        ),
        (
            dict(source_row=Described((2,), torch.complex64, device=-1)),
            ValueError,
            "source_row: expected float32, .* got torch.complex64",
        ),
        (
            dict(source_row=torch.zeros(4, dtype=torch.int32)[::2]),
            ValueError,
            r"source_row: expected a contiguous tensor, got strides \(2\)",
        ),
        (
            dict(page_table=torch.zeros(2, dtype=torch.int32)),
            ValueError,
            "page_table: expected at least 2 dimensions, got 1",
        ),
        (
            dict(page_table=torch.zeros(1, 1, 1, 1, 1, 1, 1, dtype=torch.int32)),
            ValueError,
            "page_table: expected at most 6 dimensions, got 7",
        ),
        (
            dict(page_table=torch.zeros(3, 2, dtype=torch.int32).t()),
            ValueError,
            "page_table: expected a last stride of 1, got 2",
        ),
        (
            dict(page_table=Described((2, 2**31), torch.int32, device=-1)),
            ValueError,
            "page_table: expected fewer than 2.31 entries in dimension 1, got 2147483648",
        ),
        (dict(stream="main"), TypeError, "stream: expected an integer, got str"),
    ],
)
def test_wrong_tensors_raise(extension, arguments, error, message):
    with pytest.raises(error, match=f"^blockbatch_kernels.share_pages: {message}$"):
        extension.share_pages(**{**share_arguments(), **arguments})


def test_tensors_on_different_devices_raise(extension, swiglu_arguments):
    beside = {**swiglu_arguments, "out": Described((3, 8), device=1)}
    with pytest.raises(
        ValueError, match="swiglu: out: expected a tensor in cuda:0 as gate_up, got one in cuda:1"
    ):
        extension.swiglu(**beside)
    with pytest.raises(
        ValueError, match="swiglu: out: expected .* cuda:0 as gate_up, got one in host memory"
    ):
        extension.swiglu(**{**swiglu_arguments, "out": torch.zeros(3, 8)})
    elsewhere = Described((2, 3), torch.int32, device=0)
    state, predictions, plan, params = random_batch(8)
    with pytest.raises(ValueError, match="out.flags: expected .* host memory as .*, got one in cuda:0"):
        out = plan._replace(flags=elsewhere)
        cuda.initial_plan(state, params, out=out)


def test_host_tensors_for_an_operator_of_the_gpu_raise(extension):
    with pytest.raises(ValueError, match="swiglu: expected tensors on a GPU, got host memory"):
        extension.swiglu(gate_up=torch.zeros(3, 16), out=torch.zeros(3, 8), stream=0)


@pytest.mark.parametrize(("name", "dtype"), [("out", torch.bfloat16), ("out", torch.int32)])
def test_floats_of_two_dtypes_raise(extension, swiglu_arguments, name, dtype):
    arguments = {**swiglu_arguments, name: Described((3, 8), dtype)}
    got = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"swiglu: {name}: expected float32 as gate_up, got {got}"):
        extension.swiglu(**arguments)


@pytest.mark.parametrize("kind", ["tensor", "subclass", "parameter", "described"])
def test_every_kind_of_tensor_is_read_alike(extension, kind):
    """Tensors by a table of functions of newer torch, everything else by its attributes."""
    rng = random.Random(3)
    for _ in range(30):
        columns = rng.randint(1, 5)
        table = random_table(rng, rng.randint(1, 3), rng.randint(1, 4), columns + 3)
        source = torch.randint(-1, table.shape[0], (table.shape[0],), dtype=torch.int32)
        view = table[:, 1 : columns + 1]
        expected = table.clone()
        reference.share_pages(expected[:, 1 : columns + 1], source)
        given = {
            "tensor": lambda tensor: tensor,
            "subclass": lambda tensor: tensor.as_subclass(Subclass),
            "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
            "described": lambda tensor: Described(
                tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.data_ptr(), -1
            ),
        }[kind]
        extension.share_pages(page_table=given(view), source_row=given(source), workspace=None, stream=0)
        assert torch.equal(table, expected)


def test_a_parameter_with_a_gradient_is_read(extension):
    heads = torch.nn.Parameter(torch.zeros(5, 4, 64, dtype=torch.bfloat16))
    pieces, stretches = torch.zeros(3, 2), torch.zeros(7, 4)
    number = extension.attention_partials(q=heads, pieces=pieces, stretches=stretches)
    assert number == 7 * (64 + 8) * 128  # more than of three pieces
    assert extension.attention_partials(q=heads, pieces=pieces, stretches=stretches[:0]) == 3 * 5 * 4 * (
        64 + 1
    )
    assert extension.attention_partials(q=heads, pieces=pieces[:1], stretches=stretches[:0]) == 0


def test_records_are_read_with_all_their_fields(extension):
    names = extension.RECORD_FIELDS
    for record in (bbk.BranchState, bbk.PolicyParams):
        fields = {field.name for field in dataclasses.fields(record)}
        assert set(names[record.__name__]) == fields
    for record in (structs.StepPlan, structs.Predictions, structs.PolicyEvents, structs.PackedQueries):
        assert set(names[record.__name__]) == set(record._fields)
    assert names["eos_exit"] == policy_params.EOS_EXITS
    assert names["query_span"] == policy_params.QUERY_SPANS


class Options:
    """Options of the policy as given, without the checks of a PolicyParams."""

    def __init__(self, **options):
        self.__dict__.update(options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(eos_exit="never"), ValueError, "eos_exit: expected 'prefix', 'window' or 'none', got 'never'"),
        (dict(query_span=1), ValueError, "query_span: expected 'window', .* or 'open', got 1"),
        (dict(threshold="high"), TypeError, "threshold: expected a number, got str"),
        (dict(mask_token_id=None), TypeError, "mask_token_id: expected an integer, got NoneType"),
        (dict(mask_token_id=2**31), TypeError, "mask_token_id: expected an integer, got int"),
        (dict(leap_radius=1.5), TypeError, "leap_radius: expected an integer, got float"),
        (dict(eos_token_ids=7), TypeError, "eos_token_ids: expected a sequence, got int"),
        (dict(eos_token_ids=("7",)), TypeError, "eos_token_ids: expected an integer, got str"),
        (dict(eos_token_ids=range(33)), ValueError, "eos_token_ids: expected at most 32 ids, got 33"),
    ],
)
def test_wrong_options_raise(options, error, message):
    state, _, _, params = random_batch(8)
    with pytest.raises(error, match=f"initial_plan: params.{message}$"):
        cuda.initial_plan(state, Options(**{**vars(params), **options}))


def test_a_record_without_a_field_raises():
    state, _, _, params = random_batch(8)
    options = {name: value for name, value in vars(params).items() if name != "leap_radius"}
    with pytest.raises(TypeError, match="initial_plan: params.leap_radius: missing"):
        cuda.initial_plan(state, Options(**options))
    with pytest.raises(ValueError, match="initial_plan: state.confidence: expected float32, got int32"):
        cuda.initial_plan(dataclasses.replace(state, confidence=state.tokens), params)
