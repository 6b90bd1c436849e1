"""Where a model goes, in which dtype, and within what memory, as callers name them."""

from __future__ import annotations

import torch

from blockbatch.models.spec import ModelSpec, is_block_causal
from blockbatch.values import as_int

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that is named; None: the current GPU where there is one, else the CPU.

    Raises:
        ValueError, RuntimeError: it is none that a model can be on.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: expected a usable GPU for 'cuda', got none (torch sees no CUDA device)")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"device: expected cuda:0{f' to cuda:{last}' if last else ''}, got {str(device)!r}")
    if device.type == "cpu":
        device = torch.device("cpu")
    return device


def dtype_of(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype that is named; None: float32 on the CPU, bfloat16 elsewhere.

    Raises:
        ValueError: it is none that a model can have.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        dtype = _DTYPES[dtype]
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype}")
    return dtype


def check_whole_rows(whole_rows: bool, tensor_parallel: int, kv_dtype: str | None, spec: ModelSpec) -> None:
    """Raises ValueError where rows cannot be dealt out."""
    if not whole_rows:
        return
    if tensor_parallel == 1:
        raise ValueError("whole_rows: expected False for a model of one process, got True")
    if kv_dtype is not None:
        raise ValueError(f"whole_rows: expected False with kv_dtype = {kv_dtype!r}, got True")
    if is_block_causal(spec):
        raise ValueError(
            f"whole_rows: expected False for {spec.family}, whose attention is causal across blocks, got True"
        )


def check_backend(backend: str | None) -> None:
    if backend not in (None, "reference", "triton", "cuda"):
        raise ValueError(f"backend: expected None, 'reference', 'triton' or 'cuda', got {backend!r}")


def limit_of(cache_bytes: int | None) -> int | None:
    """The limit as a plain integer.

    Raises:
        ValueError: not a positive number of bytes.
    """
    if cache_bytes is None:
        return None
    limit = as_int(cache_bytes)
    if limit is None or limit <= 0:
        raise ValueError(f"cache_bytes: expected a positive number of bytes, got {cache_bytes!r}")
    return limit
