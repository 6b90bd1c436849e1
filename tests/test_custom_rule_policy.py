"""The policy behind a rule: equal, bit for bit, to the policy with the same rule built in."""

import pytest

from custom_rule_checks import mismatches
from interpreter import interpreted_checks


def test_random_batches():
    found = {seed: mismatches(seed) for seed in range(400)}
    checked = {seed: fields for seed, fields in found.items() if fields is not None}
    assert len(checked) > 150 and not any(checked.values()), checked


def test_random_batches_interpreted():
    found = interpreted_checks("custom_rule_checks.py")
    assert len(found) > 20 and not any(found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_random_batches_on_a_gpu(backend):
    found = {seed: mismatches(seed, "cuda", backend) for seed in range(300)}
    checked = {seed: fields for seed, fields in found.items() if fields is not None}
    assert len(checked) > 100 and not any(checked.values()), checked
