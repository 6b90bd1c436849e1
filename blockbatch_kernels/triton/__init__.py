"""The Triton backend: operators with the names of `blockbatch_kernels.ops`.

With TRITON_INTERPRET=1 in the environment they run on CPU tensors too, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os

import torch

# Operator -> the module that holds it, imported at its first use: the package triton may be absent, and takes
# a second to import.
_OPERATORS = {
    "attention_plan": "attention_work",
    "copy_pages": "pages",
    "decode_policy": "policy",
    "initial_plan": "plan",
    "linear": "gemm",
    "linear_fp8": "gemm_fp8",
    "linear_rope_kv_write": "gemm",
    "linear_rope_kv_write_fp8": "gemm",
    "linear_swiglu": "gemm",
    "linear_swiglu_fp8": "gemm_fp8",
    "lm_head_confidence": "lm_head",
    "lm_head_confidence_fp8": "lm_head_fp8",
    "lm_head_likely": "likely",
    "lm_head_likely_fp8": "lm_head_fp8",
    "lm_head_sample": "sampling",
    "lm_head_sample_fp8": "lm_head_fp8",
    "pack_windows": "pack",
    "quantize_rows": "quantized",
    "rms_norm": "norm",
    "rms_norm_fp8": "quantized",
    "rope_kv_write": "rope",
    "rope_kv_write_fp8": "rope",
    "share_pages": "pages",
    "swiglu": "activation",
    "swiglu_fp8": "quantized",
    "varlen_attention": "attention",
    "varlen_attention_fp8": "attention",
}

# The kernels take named tuples and launch attributes that older versions lack.
_OLDEST = (3, 6)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _version() -> str:
    return importlib.metadata.version("triton")


def _too_old(version: str) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) < _OLDEST


def why_unavailable(device: torch.device | int | None = None) -> str | None:
    """Why this backend cannot run on `device` (default: the current GPU), or None if it can."""
    if not _installed():
        return "the package triton is not installed"
    if _too_old(_version()):
        return f"triton {_OLDEST[0]}.{_OLDEST[1]} or newer is needed, {_version()} is installed"
    on_cpu = isinstance(device, torch.device) and device.type == "cpu"
    if interpreted():
        return None
    if on_cpu:
        return "the tensors are not on a GPU (TRITON_INTERPRET=1 runs Triton on the CPU)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return None


def __getattr__(name: str):
    if name not in _OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _installed():
        return _absent
    return getattr(importlib.import_module(f"{__name__}.{_OPERATORS[name]}"), name)


def _absent(*args, **kwargs):
    raise RuntimeError(why_unavailable())
