"""What a measurement was taken on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """The processor's name and its number of cores, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Name of the device, threads and versions, for the record of a benchmark."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
