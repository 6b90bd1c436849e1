"""The compiled version of Dream's published rule: against the reference bit for bit, and the oracle."""

import functools
import random

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
import dream_bridge
from blockbatch_kernels import reference
from cuda_places import PLACES, check_seeds, open_place
from dream_random import random_batch
from oracle.dream_states import random_case
from oracle.states import EOS
from policy_random import assert_equal_records, garbage, to_device
from test_dream_conformance import DATA, RECORDS, check
from test_dream_policy import assert_decode_equals_the_oracle


@pytest.fixture(params=PLACES)
def place(request):
    return open_place(request.param)


def compare(place, seed, **limits):
    """One turn of the policy and the initial plan; every tensor of state, plan and events must be equal."""
    state, predictions, plan, params = random_batch(seed, **limits)
    ours, our_plan = to_device(state, place.device), to_device(plan, place.device)
    expected = reference.decode_policy(state, predictions, plan, params)
    new_plan, events = out = garbage(ours)
    if seed % 2:  # the plan that comes in is the one that goes out
        new_plan = our_plan
        out = new_plan, events
    place.decode_policy(ours, to_device(predictions, place.device), our_plan, params, out=out)
    assert_equal_records(ours, state, "state")
    assert_equal_records(new_plan, expected[0], "plan")
    assert_equal_records(events, expected[1], "events")
    plan = place.initial_plan(ours, params, out=garbage(ours)[0])
    assert_equal_records(plan, reference.initial_plan(state, params), "initial plan")


@pytest.mark.parametrize("first", (0, 300))
def test_random_batches(place, first):
    check_seeds(functools.partial(compare, place), range(first, first + 300))


def test_large_batches(place):
    limits = ({"max_branches": 32, "max_length": 512}, {"max_requests": 40}, {"max_length": 1500})
    check_seeds(lambda seed: compare(place, seed, **limits[seed % 3]), range(1000, 1030))


def test_random_states_equal_the_oracle(place):
    def check_case(seed):
        phase, config, state, forwards = random_case(seed)
        params = dream_bridge.params_of(config, state, EOS)
        inputs = (dream_bridge.to_tensors(state, params), *dream_bridge.step_inputs(state, forwards, phase))
        tensors, plan, predictions = (to_device(record, place.device) for record in inputs)
        plan, events = place.decode_policy(tensors, predictions, plan, params)
        dream_bridge.FUNCTIONS[phase](state, config, forwards)
        records = (to_device(record, "cpu") for record in (tensors, plan, events))
        dream_bridge.assert_same(state, config, *records)

    check_seeds(check_case, range(5000, 5300))


def test_whole_decodes_equal_the_oracle(monkeypatch):
    """The scripted engine with the compiled policy, packing and pages in place of the reference."""
    rng = random.Random(21)
    with open_place("cpu").default(monkeypatch):
        for _ in range(20):
            assert_decode_equals_the_oracle(rng)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_records_on_a_gpu(backend, part):
    model = blockbatch.load_model(DATA, device="cuda", dtype="float32", backend=backend)
    for name in ("decode_policy", "initial_plan", "lm_head_likely"):
        assert bbk.backend_of(name, model.device, backend) == backend
    for record in RECORDS[part::4]:
        check(model, record)
    captured = [runner.graphs._graphs for runner in model.runners._idle.values() if runner.graphs]
    # One record ends with its first forward, before any step that could be captured.
    assert sum(map(bool, captured)) >= len(captured) - 1
    assert bool(captured) == (backend != "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_step_does_not_wait_for_the_device(backend, unchecked):
    state, predictions, plan, params = (
        record if isinstance(record, bbk.PolicyParams) else to_device(record, "cuda")
        for record in random_batch(3)
    )
    hidden, weight = torch.randn(9, 64, device="cuda"), torch.randn(500, 64, device="cuda")

    def step():
        bbk.lm_head_likely(hidden, weight, suppress_token=7, backend=backend)
        bbk.decode_policy(state, predictions, plan, params, backend=backend)
        bbk.initial_plan(state, params, backend=backend)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
