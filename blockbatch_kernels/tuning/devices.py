"""What is asked of a device."""

from __future__ import annotations

import functools

import torch

from blockbatch_kernels.tuning.records import DeviceKind


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def device_kind(device: torch.device) -> DeviceKind:
    """The kind of a GPU; (0, 0) and 1 for the CPU."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return DeviceKind(capability, num_processors(device))
