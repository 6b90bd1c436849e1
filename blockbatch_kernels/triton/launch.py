"""Where operators launch, and what the GPU offers a launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from blockbatch_kernels import triton


def on_device_of_first(operator: Callable) -> Callable:
    """Triton launches on the current device: makes it that of the operator's first argument meanwhile."""

    @functools.wraps(operator)
    def launched(*args, **kwargs):
        with torch.cuda.device_of(args[0] if args else next(iter(kwargs.values()))):
            return operator(*args, **kwargs)

    return launched


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program can have, in bytes; on the CPU more than any takes."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def programmatic_launch(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that takes PROGRAMMATIC: launched before the kernel in front of it has ended.

    It waits on the device (`gdc_wait`), and until then neither writes anything nor reads what the kernel in
    front writes. Needs compute capability 9.0.
    """
    if triton.interpreted() or torch.cuda.get_device_capability(device) < (9, 0):
        return dict(PROGRAMMATIC=False)
    return dict(PROGRAMMATIC=True, launch_pdl=True)
