"""The extension `blockbatch_kernels._C`: whether it can run, and on which stream.

It is imported at its first use, and no GPU is touched before.
"""

import functools
import importlib
import warnings

import torch

API = 15  # kApi in csrc/bind/module.cpp


@functools.cache
def load():
    return importlib.import_module("blockbatch_kernels._C")


@functools.cache
def code_for(device_index: int) -> str:
    """What of the loaded extension runs on a GPU: "none", "portable" or, with the kernels of sm_90a, "sm90a".

    Found once for each GPU and kept. Warns where the GPU could run the kernels of sm_90a and the build has
    none. Raises RuntimeError where there is no such GPU.
    """
    code = load().has_code_for(device_index)
    if code == "portable" and torch.cuda.get_device_capability(device_index) == (9, 0):
        archs = ", ".join(load().build_info()["cuda_archs"])
        warnings.warn(
            f"the extension is built for the architectures {archs}, without the fastest kernels of "
            f"cuda:{device_index}, an sm_90: others take their place; build with BBK_CUDA_ARCHS=90a",
            stacklevel=2,
        )
    return code


def _build_for(arch: str) -> str:
    """The architecture to build for: a build for plain 90 has no products with the weights."""
    return "90a" if arch == "90" else arch


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _index_of(device: torch.device | int | None) -> int | None:
    """The GPU's number; without one that of the current GPU, which may be another at the next call."""
    index = device.index if isinstance(device, torch.device) else device
    if index is None and torch.cuda.is_available():
        return torch.cuda.current_device()
    return index


@functools.cache
def _why_unavailable(device_index: int | None) -> str | None:
    try:
        extension = load()
    except ModuleNotFoundError:
        return (
            "the extension blockbatch_kernels._C is not installed; "
            "it is built at installation where nvcc and a GPU are found (BBK_BUILD_CUDA=1: without a GPU)"
        )
    except ImportError as error:
        return f"the extension blockbatch_kernels._C cannot be loaded: {error}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    info = extension.build_info()
    if info.get("api") != API:
        return "the extension was built from another version of the source: install the package again"
    driver = extension.driver_version()
    if _major(driver) < _major(info["cuda_version"]):
        return f"the extension is built with CUDA {info['cuda_version']}, the driver serves up to {driver}"
    if extension.has_code_for(device_index) == "none":
        arch = "{}{}".format(*torch.cuda.get_device_capability(device_index))
        return (
            f"the extension is built for the architectures {', '.join(info['cuda_archs'])}, "
            f"the GPU is sm_{arch}; build with BBK_CUDA_ARCHS={_build_for(arch)}"
        )
    return None


def why_unavailable(device: torch.device | int | None = None) -> str | None:
    """Why this backend cannot run on `device` (a CUDA device; default: the current one), or None if it can.

    The reasons: the extension is not installed or cannot be loaded, there is no GPU, the driver is older than
    the CUDA version of the build, or the extension holds no code for the GPU's architecture. The answer is
    found once per device and kept.
    """
    return _why_unavailable(_index_of(device))


def is_available(device: torch.device | int | None = None) -> bool:
    """Whether this backend can run on `device`; see :func:`why_unavailable`."""
    return why_unavailable(device) is None


def build_info() -> dict:
    """What the extension was built for and with: `api`, `cuda_archs` (list), `cuda_version`, `compiler`.

    Raises ImportError where the extension is not installed.
    """
    return load().build_info()


def stream_of(tensor: torch.Tensor) -> int:
    """The current stream of the tensor's device, as the integer that the extension takes; 0 on the host."""
    # Not `torch.cuda.current_stream`: an object for each of hundreds of calls a step takes the host's time.
    return torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else 0
