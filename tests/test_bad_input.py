"""Values that an operator cannot take for reasons of its own, and backends that cannot run.

What the table of operators says of every argument is tried in test_contracts.py. What some backend may
refuse and another take (layouts, alignment, sizes of heads and pages) is tried on a GPU: either the result is
right or a ValueError says what was expected.
"""

import dataclasses
import types

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, triton
from blockbatch_kernels.cuda import extension as loader
from blockbatch_kernels.operators import OPERATORS
from blockbatch_kernels.ops import dispatch
from blockbatch_kernels.shapes import UNIT_INTEGERS
from contract_cases import assert_close, tensors_of, with_change
from operator_arguments import PARAMS, arguments_of, attention, linear_rope, rope

BACKENDS = (None, "reference", "cuda", "triton")
COMPILED = ("cuda", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


INTEGER_OPERATORS = ("attention_plan", "pack_windows", "share_pages", "initial_plan", "decode_policy")


PATHS = [
    (operator, path)
    for operator in OPERATORS
    for name, value in arguments_of(operator).items()
    for path, _ in tensors_of(value, name)
]


def names_what_was_expected(error, path):
    """The message says which argument, what was expected and what came."""
    # A record that fixes the sizes of the others may be blamed through one of them.
    owner = path.split(".")[0].split("[")[0]
    message = str(error)
    if message.startswith("blockbatch_kernels."):  # the compiled backend says which operator, too
        message = message.partition(": ")[2]
    return message.startswith(owner) and ": expected " in message and ", got " in message


def test_a_plan_for_other_heads():
    arguments = arguments_of("varlen_attention")
    plan = arguments["plan"]
    for wrong in (plan._replace(num_heads=2 * plan.num_heads), plan._replace(num_kv_heads=1)):
        with pytest.raises(ValueError, match="plan: expected one for . heads and . kv heads, got one for"):
            bbk.varlen_attention(**{**arguments, "plan": wrong})


def test_a_plan_of_units_without_stretches():
    arguments = arguments_of("varlen_attention")
    units = torch.zeros(3, UNIT_INTEGERS, dtype=torch.int32)
    with pytest.raises(ValueError, match="plan.stretches: expected one for each processor, .* got none"):
        bbk.varlen_attention(**{**arguments, "plan": arguments["plan"]._replace(units=units)})


WRONG_VALUES = [
    ("linear", dict(weight=torch.zeros(32, 63)), r"weight: expected shape \[\*, 64\], got \[32, 63\]"),
    ("linear", dict(bias=torch.zeros(31)), r"bias: expected shape \[32\], got \[31\]"),
    ("linear_swiglu", dict(weight=torch.zeros(33, 64)), "weight: expected an even number of rows"),
    ("swiglu", dict(gate_up=torch.zeros(2, 5)), "gate_up: expected an even last dimension"),
    ("rms_norm", dict(weight=torch.ones(63)), r"weight: expected shape \[64\], got \[63\]"),
    ("rope_kv_write", dict(q=torch.zeros(9, 4, 63)), r"k: expected shape \[9, \*, 63\], got \[9, 2, 64\]"),
    ("rope_kv_write", dict(cos=torch.zeros(40, 64)), r"cos: expected shape \[\*, 32\], got \[40, 64\]"),
    (
        "linear_rope_kv_write",
        dict(num_heads=3),
        r"weight: expected 448 rows \(3 heads of q and 2 each of k and v, of 64\), got 512",
    ),
    ("linear_rope_kv_write", dict(bias=torch.zeros(511)), r"bias: expected shape \[512\], got \[511\]"),
    ("linear_rope_kv_write", dict(x=torch.zeros(8, 64)), r"positions: expected shape \[8\], got \[9\]"),
    (
        "linear_rope_kv_write",
        dict(v_cache=torch.zeros(3, 16, 1, 64).to(torch.float8_e4m3fn)),
        r"v_cache: expected shape \[3, 16, 2, 64\], got \[3, 16, 1, 64\]",
    ),
    (
        "linear_rope_kv_write",
        dict(k_cache=torch.zeros(3, 16, 2, 63), v_cache=torch.zeros(3, 16, 2, 63)),
        "k_cache: expected an even head_dim, got 63",
    ),
    ("linear_rope_kv_write", dict(v_scale=None), "v_scale: expected a tensor beside k_scale, got None"),
    ("linear_rope_kv_write_fp8", dict(k_scale=None), "k_scale: expected a tensor beside v_scale, got None"),
    ("linear_rope_kv_write_fp8", dict(v_scale=torch.ones(3)), r"v_scale: expected shape \[2\], got \[3\]"),
    (
        "linear_rope_kv_write_fp8",
        dict(num_heads=5),
        r"weight: expected 576 rows \(5 heads of q and 2 each of k and v, of 64\), got 512",
    ),
    (
        "varlen_attention",
        dict(q=torch.zeros(10, 3, 64)),
        "k_cache: expected a number of kv heads that divides 3",
    ),
    (
        "varlen_attention",
        dict(q=torch.zeros(11, 4, 64)),
        r"plan.token_row: expected shape \[11\], got \[10\]",
    ),
    ("attention_plan", dict(num_kv_heads=3), "num_kv_heads: expected a divisor of 4, got 3"),
    ("attention_plan", dict(num_kv_heads=0), "num_kv_heads: expected a divisor of 4, got 0"),
    ("lm_head_confidence", dict(suppress_token=50), "suppress_token: expected an id below 50, got 50"),
    ("lm_head_confidence", dict(suppress_token=-1), "suppress_token: expected an id below 50, got -1"),
    ("copy_pages", dict(num_branches=3), "num_branches: expected a divisor of the 4 rows, got 3"),
    (
        "copy_pages",
        dict(kv_cache=torch.zeros(1, 2, 7, 16, 2, 64), pool=None),
        "kv_cache: expected at least 8 pages, got 7",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator, change, message", WRONG_VALUES)
def test_wrong_sizes(operator, change, message, backend):
    with pytest.raises(ValueError, match=message):
        getattr(bbk, operator)(**{**arguments_of(operator), **change}, backend=backend)


WITHOUT_SCALES = dict(k_scale=None, v_scale=None)
HALF_CACHES = {name: torch.zeros(3, 16, 2, 64).half() for name in ("k_cache", "v_cache")}
WRONG_TYPES = [
    ("linear", dict(static_weight=1), "static_weight: expected True or False, got 1"),
    ("linear_rope_kv_write", dict(num_heads=4.0), "num_heads: expected an int, got 4.0"),
    (
        "linear_rope_kv_write",
        WITHOUT_SCALES | HALF_CACHES,
        "k_cache: expected torch.float32 without scales, got torch.float16",
    ),
    (
        "linear_rope_kv_write",
        WITHOUT_SCALES,
        "k_cache: expected torch.float32 without scales, got torch.float8_e4m3fn",
    ),
    (
        "linear_rope_kv_write_fp8",
        HALF_CACHES,
        "k_cache: expected torch.float8_e4m3fn beside scales, got torch.float16",
    ),
    (
        "linear_rope_kv_write_fp8",
        dict(v_cache=torch.zeros(3, 16, 2, 64)),
        "v_cache: expected torch.float8_e4m3fn, got torch.float32",
    ),
    (
        "linear_rope_kv_write_fp8",
        dict(out_dtype=torch.float64),
        "out_dtype: expected torch.float32 or .*, got torch.float64",
    ),
    (
        "linear_rope_kv_write_fp8",
        dict(bias=torch.zeros(512).half()),
        "bias: expected torch.float32, the dtype of the result, got torch.float16",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator, change, message", WRONG_TYPES)
def test_wrong_types(operator, change, message, backend):
    with pytest.raises(TypeError, match=message):
        getattr(bbk, operator)(**{**arguments_of(operator), **change}, backend=backend)


SETTINGS = [
    (dict(eos_exit="never"), "eos_exit: expected one of prefix, window, none, got 'never'"),
    (dict(query_span="all"), "query_span: expected one of window, suffix, canvas, open, got 'all'"),
    (dict(prediction_offset=2), "prediction_offset: expected 0 or 1, got 2"),
    (dict(merge_threshold=0.4), "merge_threshold: expected a value from 0.5 to 1, got 0.4"),
    (dict(threshold=None), "threshold: expected either threshold or steps_per_block"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["initial_plan", "decode_policy"])
@pytest.mark.parametrize("change, message", SETTINGS)
def test_wrong_settings(operator, change, message, backend):
    params = dataclasses.replace(PARAMS, **change)
    with pytest.raises(ValueError, match=message):
        getattr(bbk, operator)(**{**arguments_of(operator), "params": params}, backend=backend)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_backend_that_cannot_run_says_why(operator, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    function, good = getattr(bbk, operator), arguments_of(operator)
    with pytest.raises(
        ValueError, match="backend: expected None or one of reference, triton, cuda, got 'hip'"
    ):
        function(**good, backend="hip")
    for backend in COMPILED:
        if hasattr(dispatch.MODULES[backend], operator):
            with pytest.raises(
                RuntimeError, match=f"backend: {backend} cannot run {operator}: .*not on a GPU"
            ):
                function(**good, backend=backend)


class TestWithoutACompiledBackend:
    """A GPU that is only described: which backend `ops` takes, and what it says."""

    @pytest.fixture
    def machine(self, monkeypatch):
        """Describes what of the extension is there; gives something that stands for a CUDA tensor."""

        def describe(extension, capability=(9, 0), triton_installed=True):
            def load():
                if isinstance(extension, Exception):
                    raise extension
                return extension

            monkeypatch.setattr(loader, "load", load)
            monkeypatch.setattr(triton, "_installed", lambda: triton_installed)
            monkeypatch.setattr(triton, "_version", lambda: "3.6.0")
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            loader._why_unavailable.cache_clear()
            return types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))

        yield describe
        loader._why_unavailable.cache_clear()

    class Built:
        def __init__(self, *archs):
            self.build_info = lambda: {
                "api": loader.API,
                "cuda_archs": list(archs),
                "cuda_version": "13.0",
                "compiler": "gcc",
            }
            self.driver_version = lambda: "13.0"
            self.has_code_for = lambda device: "none" if archs[0] in ("75-real", "80-real") else "portable"

    @pytest.mark.parametrize(
        "extension, reason",
        [
            (
                ModuleNotFoundError("no _C"),
                "blockbatch_kernels._C is not installed; it is built at installation",
            ),
            (ImportError("undefined symbol"), "cannot be loaded: undefined symbol"),
            (
                Built("80-real"),
                "built for the architectures 80-real, the GPU is sm_90; build with BBK_CUDA_ARCHS=90a",
            ),
        ],
    )
    def test_the_extension_does_not_run_here(self, machine, extension, reason):
        tensor = machine(extension)
        for operator in OPERATORS:
            with pytest.raises(RuntimeError, match=f"backend: cuda cannot run {operator}: .*{reason}"):
                dispatch.module_for("cuda", operator, tensor)
            assert dispatch.module_for(None, operator, tensor) is triton
        tensor = machine(extension, triton_installed=False)
        for operator in OPERATORS:
            assert dispatch.module_for(None, operator, tensor) is bbk.reference

    def test_triton_is_not_installed(self, machine):
        tensor = machine(self.Built("90a"), triton_installed=False)
        with pytest.raises(
            RuntimeError, match="backend: triton cannot run swiglu: .* triton is not installed"
        ):
            dispatch.module_for("triton", "swiglu", tensor)
        assert dispatch.module_for(None, "swiglu", tensor) is cuda


def misaligned(x):
    """The same values one element behind the start of an allocation."""
    storage = x.new_empty(x.numel() + 1)
    return storage[1:].view(x.shape).copy_(x)


def spread(x):
    """The same values with a last stride of 2."""
    storage = x.new_zeros(*x.shape, 2)
    storage[..., 0] = x
    return storage[..., 0]


def outcome(operator, arguments, backend):
    """Everything that the call returns and writes."""
    result = getattr(bbk, operator)(**arguments, backend=backend)
    written = [tensor for name, value in arguments.items() for _, tensor in tensors_of(value, name)]
    returned = [tensor for _, tensor in tensors_of(result, "result")] if result is not None else []
    torch.cuda.synchronize()
    return returned + written


def assert_right_or_refused(operator, arguments, backend, path, dtype, expected):
    try:
        got = outcome(operator, arguments, backend)
    except ValueError as error:
        assert names_what_was_expected(error, path), error
        return
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, dtype, path)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("operator, path", PATHS, ids=[f"{operator}-{path}" for operator, path in PATHS])
def test_layouts_give_the_same_or_are_refused(operator, path, backend):
    """Each tensor in turn off its alignment, or with a last stride of 2; the rest stays as it is."""
    # Triton compiles anew for every alignment, in the same way for every dtype; CUDA C++ reads other vectors.
    one_is_enough = operator in INTEGER_OPERATORS or backend == "triton"
    for dtype in FLOATS[:1] if one_is_enough else FLOATS:
        expected = outcome(operator, arguments_of(operator, "cuda", dtype), backend)
        for layout in (misaligned, spread):
            arguments = with_change(arguments_of(operator, "cuda", dtype), path, layout)
            assert_right_or_refused(operator, arguments, backend, path, dtype, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "operator, make",
    [("varlen_attention", attention), ("rope_kv_write", rope), ("linear_rope_kv_write", linear_rope)],
)
def test_sizes_of_heads_and_pages_are_served_or_refused(operator, make, dtype, backend):
    sizes = [dict(head_dim=size) for size in (2, 8, 16, 40, 80, 96, 128, 192, 256, 320)]
    sizes += [dict(page_size=size) for size in (1, 3, 8, 48, 64, 128, 256)]
    sizes += [dict(heads=heads, kv_heads=kv) for heads, kv in ((1, 1), (6, 2), (7, 1), (28, 4), (96, 1))]
    # Triton takes seconds to compile each of them.
    for size in sizes[::3] if backend == "triton" else sizes:
        torch.manual_seed(1)
        arguments = make("cuda", dtype, **size)
        torch.manual_seed(1)
        expected = outcome(operator, make("cuda", dtype, **size), "reference")
        assert_right_or_refused(operator, arguments, backend, "q", dtype, expected)


@pytest.mark.gpu
def test_a_build_for_another_architecture(monkeypatch):
    """The named backend refuses, the default goes on with what there is."""
    gate_up = torch.randn(3, 8, device="cuda")
    other = TestWithoutACompiledBackend.Built("75-real")
    monkeypatch.setattr(loader, "load", lambda: other)
    loader._why_unavailable.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"built for the architectures 75-real, the GPU is sm_\d+"):
            bbk.swiglu(gate_up, backend="cuda")
        torch.testing.assert_close(bbk.swiglu(gate_up), bbk.swiglu(gate_up, backend="reference"))
    finally:
        loader._why_unavailable.cache_clear()


@pytest.mark.gpu
def test_tensors_on_two_devices():
    for operator, path in PATHS:
        arguments = with_change(arguments_of(operator, "cuda"), path, lambda x: x.cpu())
        if all(
            not tensor.is_cuda for name, value in arguments.items() for _, tensor in tensors_of(value, name)
        ):
            continue
        with pytest.raises(ValueError, match=r": expected device (cuda:0|cpu), got (cuda:0|cpu)"):
            getattr(bbk, operator)(**arguments)
