"""The compiled extension: what it reports, what it refuses, and swiglu against an fp64 truth on a GPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from blockbatch_kernels import cuda
from blockbatch_kernels.cuda import extension as loader
from blockbatch_kernels.cuda import gemm
from described_tensors import Described, change

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def extension():
    return pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")


@pytest.fixture
def code():
    """For tests that launch kernels: a build for other architectures alone has none for this GPU."""
    reason = cuda.why_unavailable()
    if reason is not None and "is built for the architectures" in reason:
        pytest.skip(reason)
    assert reason is None


@pytest.fixture
def swiglu_arguments():
    # Never launched: each test makes one of them wrong, or leaves nothing to do.
    return dict(gate_up=Described((3, 16)), out=Described((3, 8)), stream=0)


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
    ("fields", "message"),
    [
        (dict(shape=(-1, 16)), "swiglu: num_tokens: expected at least 0, got -1"),
        (dict(shape=(3, -16)), "swiglu: intermediate_size: expected at least 0, got -8"),
        (
            dict(dtype=torch.int32),
            "swiglu: gate_up: expected float32, float16 or bfloat16, got int32",
        ),
    ],
)
def test_wrong_sizes_raise(extension, swiglu_arguments, fields, message):
    with pytest.raises(ValueError, match=message):
        extension.swiglu(**change(swiglu_arguments, "gate_up", **fields))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_without_a_gpu_names_the_operator(extension, swiglu_arguments):
    with pytest.raises(RuntimeError, match="blockbatch_kernels.swiglu: cuda"):
        extension.swiglu(**swiglu_arguments)
    extension.swiglu(**change(swiglu_arguments, "gate_up", shape=(0, 16)))  # nothing to launch
    with pytest.raises(RuntimeError, match="blockbatch_kernels.has_code_for: cuda"):
        extension.has_code_for(device=0)


@pytest.mark.gpu
def test_what_runs_on_this_gpu(extension):
    code = extension.has_code_for(device=torch.cuda.current_device())
    assert code == loader.code_for(torch.cuda.current_device())
    archs = {arch.partition("-")[0] for arch in cuda.build_info()["cuda_archs"]}
    if torch.cuda.get_device_capability() == (9, 0):
        older = any(int(arch.rstrip("af")) <= 90 for arch in archs)
        assert code == ("sm90a" if "90a" in archs else "portable" if older else "none")
    else:
        assert code in ("none", "portable")


class TestWhyUnavailable:
    """The reasons in turn, each against an extension and a GPU that are described rather than there."""

    class Extension:
        def __init__(self, archs=("80", "90a"), driver="13.0", api=loader.API, code="sm90a"):
            self.archs, self.driver, self.api, self.code = archs, driver, api, code

        def build_info(self):
            return {
                "api": self.api,
                "cuda_archs": list(self.archs),
                "cuda_version": "13.0",
                "compiler": "gcc",
            }

        def driver_version(self):
            return self.driver

        def has_code_for(self, device):
            return self.code

    @pytest.fixture
    def machine(self, monkeypatch):
        def describe(extension, gpu=True, capability=(9, 0)):
            def load():
                if isinstance(extension, Exception):
                    raise extension
                return extension

            monkeypatch.setattr(loader, "load", load)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            forget()

        def forget():
            loader._why_unavailable.cache_clear()
            loader.code_for.cache_clear()

        yield describe
        forget()

    @pytest.mark.filterwarnings("ignore:the extension is built")
    @pytest.mark.parametrize("code", ["sm90a", "portable"])
    def test_available(self, machine, code):
        machine(self.Extension(code=code))
        assert cuda.why_unavailable() is None
        assert cuda.is_available(torch.device("cuda", 0))
        assert gemm.kernel_exists(0) is (code == "sm90a")

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
                dict(extension=Extension(code="none"), capability=(7, 5)),
                "built for the architectures 80, 90a, the GPU is sm_75; build with BBK_CUDA_ARCHS=75",
            ),
            (
                dict(extension=Extension(archs=("90a",), code="none"), capability=(8, 0)),
                "built for the architectures 90a, the GPU is sm_80; build with BBK_CUDA_ARCHS=80",
            ),
            (
                dict(extension=Extension(archs=("100",), code="none"), capability=(9, 0)),
                "the GPU is sm_90; build with BBK_CUDA_ARCHS=90a",
            ),
            (
                dict(extension=Extension(archs=("90a",), code="none"), capability=(12, 0)),
                "the GPU is sm_120; build with BBK_CUDA_ARCHS=120",
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
def test_swiglu_errs_no_more_than_torch(code, dtype, intermediate_size):
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
def test_swiglu_allocates_handles_extremes_and_empty_inputs(code):
    gate = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0]], device="cuda")
    gate_up = torch.cat([gate, torch.full_like(gate, 2.0)], dim=-1)
    torch.testing.assert_close(cuda.swiglu(gate_up), F.silu(gate) * 2.0)
    assert cuda.swiglu(gate_up[:0]).shape == (0, 5)
    torch.testing.assert_close(cuda.swiglu(gate_up.t().contiguous().t()), F.silu(gate) * 2.0)


@pytest.mark.gpu
def test_swiglu_runs_on_the_current_stream(code):
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
