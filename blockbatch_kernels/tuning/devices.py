"""What is asked of a device."""

from __future__ import annotations

import functools

import torch

from blockbatch_kernels.tuning.records import DeviceKind

_LARGE_MEMORY_BYTES = 100 << 30


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU (of its part under MIG); 1 for the CPU."""
    return device_kind(device).num_sms


def device_kind(device: torch.device) -> DeviceKind:
    """The kind of a GPU, without an index of the current one; (0, 0) and 1 for the CPU."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _kind(device)


@functools.cache
def _kind(device: torch.device) -> DeviceKind:
    if device.type != "cuda":
        return DeviceKind((0, 0), 1)
    properties = torch.cuda.get_device_properties(device)
    return DeviceKind(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        large_memory=properties.total_memory > _LARGE_MEMORY_BYTES,
    )
