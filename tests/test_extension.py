"""The compiled extension: what it reports, what it refuses, and swiglu against an fp64 truth on a GPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from blockbatch_kernels import cuda
from blockbatch_kernels.cuda import extension as loader

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def extension():
    return pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")


@pytest.fixture
def swiglu_arguments():
    # Never launched: each test makes one of them wrong, or leaves nothing to do.
    return dict(
        gate_up=0,
        out=0,
        num_tokens=3,
        intermediate_size=8,
        gate_up_row_stride=16,
        out_row_stride=8,
        dtype=0,
        device=0,
        stream=0,
    )


def test_build_info(extension):
    info = cuda.build_info()
    assert info["api"] == loader.API
    assert set(info) == {"api", "cuda_archs", "cuda_version", "compiler"}
    assert info["cuda_archs"] and all(arch[:2].isdigit() for arch in info["cuda_archs"])
    assert int(info["cuda_version"].split(".")[0]) >= 12
    assert info["compiler"].startswith(("gcc", "clang"))


def test_links_no_torch_and_no_shared_cuda_runtime(extension):
    content = open(extension.__file__, "rb").read()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in content


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_tokens", -1, "swiglu: num_tokens: expected at least 0, got -1"),
        (
            "intermediate_size",
            -8,
            "swiglu: intermediate_size: expected at least 0, got -8",
        ),
        ("dtype", 7, "swiglu: dtype: expected code 0, 1 or 2, got 7"),
    ],
)
def test_wrong_sizes_raise(extension, swiglu_arguments, argument, value, message):
    with pytest.raises(ValueError, match=message):
        extension.swiglu(**{**swiglu_arguments, argument: value})


def test_wrong_types_raise(extension, swiglu_arguments):
    with pytest.raises(TypeError):
        extension.swiglu(**{**swiglu_arguments, "gate_up": torch.zeros(3, 16)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_without_a_gpu_names_the_operator(extension, swiglu_arguments):
    with pytest.raises(RuntimeError, match="blockbatch_kernels.swiglu: cuda"):
        extension.swiglu(**swiglu_arguments)
    extension.swiglu(**{**swiglu_arguments, "num_tokens": 0})  # nothing to launch


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 6), True),
        ("80", (10, 0), True),  # from its PTX
        ("80", (7, 5), False),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("80-virtual", (12, 0), True),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a-real", (9, 0), True),
        ("100", (10, 0), True),
        ("100", (9, 0), False),
    ],
)
def test_which_gpus_an_architecture_runs_on(arch, capability, runs):
    assert loader._runs_on(arch, capability) is runs


class TestWhyUnavailable:
    """The reasons in turn, each against an extension and a GPU that are described rather than there."""

    class Extension:
        def __init__(self, archs=("80", "90a"), driver="13.0", api=loader.API):
            self.archs, self.driver, self.api = archs, driver, api

        def build_info(self):
            return {
                "api": self.api,
                "cuda_archs": list(self.archs),
                "cuda_version": "13.0",
                "compiler": "gcc",
            }

        def driver_version(self):
            return self.driver

    @pytest.fixture
    def machine(self, monkeypatch):
        def describe(extension, gpu=True, capability=(9, 0)):
            def load():
                if isinstance(extension, Exception):
                    raise extension
                return extension

            monkeypatch.setattr(loader, "load", load)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            loader._why_unavailable.cache_clear()

        yield describe
        loader._why_unavailable.cache_clear()

    def test_available(self, machine):
        machine(self.Extension())
        assert cuda.why_unavailable() is None
        assert cuda.is_available(torch.device("cuda", 0))

    @pytest.mark.parametrize(
        ("description", "reason"),
        [
            (dict(extension=ModuleNotFoundError("no _C")), "not installed"),
            (
                dict(extension=ImportError("undefined symbol: x")),
                "cannot be loaded: undefined symbol: x",
            ),
            (dict(extension=Extension(), gpu=False), "torch sees no CUDA GPU"),
            (dict(extension=Extension(api=None)), "built from another version of the source"),
            (
                dict(extension=Extension(driver="12.8")),
                "built with CUDA 13.0, the driver serves up to 12.8",
            ),
            (
                dict(extension=Extension(), capability=(7, 5)),
                "80, 90a, the GPU is sm_75",
            ),
            (
                dict(extension=Extension(archs=("90a",)), capability=(8, 0)),
                "BBK_CUDA_ARCHS=80",
            ),
        ],
    )
    def test_reasons(self, machine, description, reason):
        machine(**description)
        assert reason in cuda.why_unavailable()
        assert not cuda.is_available()


def strided(rows, columns, row_stride, offset, dtype, fill):
    """A storage full of `fill` and its [rows, columns] view with a row stride, `offset` elements in."""
    storage = torch.full((offset + rows * row_stride,), fill, dtype=dtype, device="cuda")
    return storage, storage[offset:].view(rows, row_stride)[:, :columns]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("intermediate_size", [1, 7, 8, 96, 257, 4099, 12288])
def test_swiglu_errs_no_more_than_torch(dtype, intermediate_size):
    assert cuda.why_unavailable() is None
    layouts = [(0, 0), (64, 0), (3, 0), (0, 1), (5, 3)]
    for num_tokens, (padding, offset) in itertools.product([1, 3, 129], layouts):
        compare_swiglu(num_tokens, intermediate_size, padding, offset, dtype)


def compare_swiglu(num_tokens, intermediate_size, padding, offset, dtype):
    generator = torch.Generator("cuda").manual_seed(num_tokens * 10007 + intermediate_size)
    width = 2 * intermediate_size
    _, gate_up = strided(num_tokens, width, width + padding, offset, dtype, float("nan"))
    gate_up.copy_(torch.randn(num_tokens, width, device="cuda", generator=generator) * 4)
    out_row = intermediate_size + padding
    storage, out = strided(num_tokens, intermediate_size, out_row, offset, dtype, float("nan"))

    assert cuda.swiglu(gate_up, out) is out

    gate, up = gate_up.double().chunk(2, dim=-1)
    truth = F.silu(gate) * up
    gate, up = gate_up.chunk(2, dim=-1)
    torch_error = (F.silu(gate) * up - truth).abs().max()
    error = (out - truth).abs().max()  # NaN, and so a failure, where an element was left out
    rounding = torch.finfo(dtype).eps * truth.abs().max()  # torch may be exact by luck on few elements
    assert error <= 2 * torch_error + rounding
    beside = torch.ones_like(storage, dtype=torch.bool)
    beside[offset:].view(num_tokens, out_row)[:, :intermediate_size] = False
    assert storage[beside].isnan().all()  # nothing is written beside the output


@pytest.mark.gpu
def test_swiglu_allocates_handles_extremes_and_empty_inputs():
    gate = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0]], device="cuda")
    gate_up = torch.cat([gate, torch.full_like(gate, 2.0)], dim=-1)
    torch.testing.assert_close(cuda.swiglu(gate_up), F.silu(gate) * 2.0)
    assert cuda.swiglu(gate_up[:0]).shape == (0, 5)
    torch.testing.assert_close(cuda.swiglu(gate_up.t().contiguous().t()), F.silu(gate) * 2.0)


@pytest.mark.gpu
def test_swiglu_runs_on_the_current_stream():
    stream = torch.cuda.Stream()
    gate_up = torch.randn(64, 512, device="cuda")
    out = torch.zeros(64, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):  # a launch on any other stream would end the capture
        cuda.swiglu(gate_up, out)
    assert not out.any()
    graph.replay()
    torch.testing.assert_close(out, F.silu(gate_up[:, :256]) * gate_up[:, 256:])
