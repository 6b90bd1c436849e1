"""Triton's version of Dream's published rule: in the interpreter on the CPU, and on a GPU."""

import pytest
import torch

import triton_dream_checks
from interpreter import interpreted_checks


def test_interpreted():
    found = interpreted_checks("triton_dream_checks.py")
    assert len(found) == 26
    assert not any(found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize(
    "limits",
    [{}, {"max_branches": 32, "max_length": 256}, {"max_requests": 40}, {"max_length": 1100}],
    ids=str,
)
def test_random_batches_on_a_gpu(limits):
    for seed in range(16):  # nearly each is compiled anew, which takes seconds
        found = triton_dream_checks.check_batch(seed, torch.device("cuda"), **limits)
        assert not found, (seed, found)
