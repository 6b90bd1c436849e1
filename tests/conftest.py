import os

import pytest
import torch
from hypothesis import settings

# What operators do not look at without it, since it would wait for a GPU: read when the package is imported.
os.environ.setdefault("BBK_CHECK", "1")

# The same examples on every run, and no limit on an example's time: a slow machine is no failure.
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


# Matrices as small as the tests' only lose by threads, which on a busy machine mostly wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def poisoned():
    """Memory that torch.empty returns is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unchecked(monkeypatch):
    """Without `BBK_CHECK=1`, whose checks wait for the device."""
    from blockbatch_kernels.ops import values

    monkeypatch.setattr(values, "ENABLED", False)


@pytest.fixture
def sm90():
    """For tests of kernels that exist for that architecture alone."""
    from blockbatch_kernels import cuda

    assert cuda.why_unavailable() is None
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for sm_90")
