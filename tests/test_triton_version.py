"""Which Triton the backend takes."""

import pytest
import torch

from blockbatch_kernels import triton


@pytest.mark.parametrize(
    ("version", "old"),
    [("3.2.0", True), ("3.5.1", True), ("3.6.0", False), ("3.10.0", False), ("4.0", False)],
)
def test_old_versions_are_refused_with_both_versions_named(monkeypatch, version, old):
    monkeypatch.setattr(triton, "_installed", lambda: True)
    monkeypatch.setattr(triton, "_version", lambda: version)
    reason = triton.why_unavailable(torch.device("cpu")) or ""
    assert (reason == f"triton 3.6 or newer is needed, {version} is installed") is old
