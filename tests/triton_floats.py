"""What the tests of Triton's float operators share."""

import contextlib

import torch

from interpreter import DEVICE


@contextlib.contextmanager
def poisoned():
    """Memory that is allocated here holds NaN, or the largest integer, until it is written."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    was_on, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def rand(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def nan(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
