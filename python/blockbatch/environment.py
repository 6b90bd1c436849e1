"""What a measurement was taken on."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blockbatch_kernels import cuda


def processor() -> str:
    """The processor's name and its number of cores, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Name of the device, threads and versions, for the record of a benchmark."""
    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        record |= {
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "triton": version("triton") if importlib.util.find_spec("triton") else None,
            "extension": cuda.why_unavailable(device) or cuda.build_info(),
        }
    return record


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.split("\n")[0].strip() or None
