"""The compiled policy: against the reference bit for bit, and against the oracle."""

import dataclasses
import random

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch.generation import generate
from blockbatch_kernels import reference
from cuda_places import PLACES, check_seeds, open_place, random_table
from oracle import ScriptedModel, decode, policy
from oracle.states import random_case
from policy_bridge import assert_plan, assert_same, params_of, step_inputs, to_tensors
from policy_random import assert_equal_records, garbage, random_batch, to_device
from scripted_engine import EngineScripted
from test_decoding import assert_equal, configs, scripted

CPU = torch.device("cpu")
PHASE_FUNCTIONS = {"init": policy.init_phase, "block": policy.block_phase, "refresh": policy.refresh_phase}


@pytest.fixture(params=PLACES)
def place(request):
    return open_place(request.param)


def compare_policy(place, seed, **limits):
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


@pytest.mark.parametrize("first", (0, 400))
def test_policy_on_random_batches(place, first):
    check_seeds(lambda seed: compare_policy(place, seed), range(first, first + 400))


def test_policy_on_large_batches(place):
    limits = ({"max_branches": 32, "max_length": 512}, {"max_requests": 40}, {"max_length": 1500})
    check_seeds(lambda seed: compare_policy(place, seed, **limits[seed % 3]), range(1000, 1045))


@pytest.mark.gpu
def test_policy_beyond_shared_memory_and_one_position_a_thread():
    sizes = ({"max_branches": 32, "max_length": 4096}, {"max_branches": 1, "max_length": 5000})
    for seed in range(2000, 2012):
        compare_policy(open_place("cuda"), seed, max_requests=3, **sizes[seed % 2])


@pytest.mark.gpu
def test_policy_against_the_oracle():
    """Requests of one phase and one configuration in one batch."""
    groups = {}
    for seed in range(1500):
        phase, config, state, forwards = random_case(seed, cheaper_forwards=seed % 2 == 1)
        if phase != "refresh" or forwards:
            key = phase, config, state["prediction_offset"]
            groups.setdefault(key, []).append((state, forwards))
    for (phase, config, _), cases in groups.items():
        states, forwards = [state for state, _ in cases], [forward for _, forward in cases]
        params = params_of(config, states[0])
        tensors = to_tensors(states, params)
        plan, predictions = step_inputs(states, forwards, phase, query_span=config.query_span)
        inputs = [to_device(record, "cuda") for record in (tensors, predictions, plan)]
        new_plan, events = bbk.decode_policy(*inputs, params, backend="cuda")
        for state, forward in cases:
            PHASE_FUNCTIONS[phase](state, config, forward)
        new_plan, ours = to_device(new_plan, CPU), to_device(inputs[0], CPU)
        assert_same(states, [config] * len(states), ours, new_plan, to_device(events, CPU))
        if len(states) == 1:
            assert_plan(states[0], config, new_plan)


def test_policy_defaults_allocate(place):
    state, predictions, plan, params = random_batch(7)
    ours = to_device(state, place.device)
    got = place.decode_policy(
        ours, to_device(predictions, place.device), to_device(plan, place.device), params
    )
    expected = reference.decode_policy(state, predictions, plan, params)
    for name, one, other in zip(("plan", "events"), got, expected):
        assert_equal_records(one, other, name)
    plan = place.initial_plan(ours, params)
    assert torch.equal(plan.host_part()[:5], plan.flags)


def test_whole_decodes_equal_the_oracle(monkeypatch):
    """The scripted engine with the compiled policy, packing and pages in place of the reference."""
    rng = random.Random(11)
    with open_place("cpu").default(monkeypatch):
        for method in blockbatch.METHODS:
            for _ in range(25 if method == "blockbatch" else 4):
                model = scripted(rng)
                oracle_config, config = configs(rng, method)
                prompt = [rng.randrange(20) for _ in range(rng.randint(1, 40))]
                engine = EngineScripted(model, page_size=rng.choice((4, 16, 64)))
                assert_equal(generate(engine, prompt, config), decode(model, prompt, oracle_config), config)
        engine = EngineScripted(ScriptedModel(3, peak=(1.0, 8.0), eos_rate=0.03))
        config = blockbatch.DecodeConfig(gen_length=64)
        prompts = [[1] * length for length in (3, 40, 17, 17)]
        together = generate(engine, prompts, config)
    assert [r.canvas for r in together] == [generate(engine, prompt, config).canvas for prompt in prompts]


def test_bad_tensors_raise(place):
    state, predictions, plan, params = (
        x if isinstance(x, bbk.PolicyParams) else to_device(x, place.device) for x in random_batch(8)
    )
    rows, length = state.tokens.shape

    wide = torch.zeros(rows, 2 * length, device=place.device)[:, ::2]
    with pytest.raises(ValueError, match="state.confidence: expected a contiguous tensor"):
        place.decode_policy(dataclasses.replace(state, confidence=wide), predictions, plan, params)
    with pytest.raises(ValueError, match="eos_token_ids: expected at most 32 ids, got 33"):
        place.initial_plan(state, dataclasses.replace(params, eos_token_ids=tuple(range(33))))
    scheduled = dataclasses.replace(params, threshold=None, tail_threshold=None, steps_per_block=0)
    with pytest.raises(ValueError, match="steps_per_block: expected at least 1, got 0"):
        place.initial_plan(state, scheduled)
    many = bbk.BranchState.create(
        torch.zeros(1, 1, dtype=torch.int32, device=place.device),
        torch.ones(1, dtype=torch.int32, device=place.device),
        torch.ones(33, dtype=torch.int32),
        4,
        mask_token_id=15,
    )
    with pytest.raises(ValueError, match="num_branches: expected at most 32, got 33"):
        place.initial_plan(many, params)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", (1, 5))
def test_policy_in_a_graph_writes_its_plan_in_place(requests):
    """Replays of one captured step follow the reference from state to state."""
    seed = next(
        seed
        for seed in range(100, 10_000)
        if random_batch(seed, max_requests=requests)[0].num_requests == requests
    )
    state, predictions, plan, params = random_batch(seed, max_requests=requests)
    device = torch.device("cuda")
    ours, our_predictions, our_plan = (to_device(x, device) for x in (state, predictions, plan))
    events = garbage(ours)[1]
    table = random_table(random.Random(0), requests, state.num_branches, 7)
    our_table = table.to(device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        bbk.decode_policy(ours, our_predictions, our_plan, params, out=(our_plan, events), backend="cuda")
        bbk.share_pages(our_table, events.sync_source, backend="cuda")
        packed = bbk.pack_windows(
            ours, our_plan, our_table, page_size=16, capacity=999, predict_capacity=999, backend="cuda"
        )
    assert_equal_records(ours, state, "capture changes nothing")
    for _ in range(6):
        graph.replay()
        plan, expected = reference.decode_policy(state, predictions, plan, params)
        reference.share_pages(table, expected.sync_source)
        assert_equal_records(ours, state, "state")
        assert_equal_records(our_plan, plan, "plan")
        assert_equal_records(events, expected, "events")
        assert torch.equal(our_table.cpu(), table)
        other = reference.pack_windows(
            state, plan, table, page_size=16, capacity=999, predict_capacity=999, prediction_offset=0
        )
        assert_equal_records(packed, other, "packed")


@pytest.mark.gpu
def test_no_host_synchronisation(unchecked):
    state, predictions, plan, params = random_batch(21, max_requests=3)
    device = torch.device("cuda")
    ours, our_predictions, our_plan = (to_device(x, device) for x in (state, predictions, plan))
    kv = torch.zeros(2, 2, state.num_rows * 16, 16, 1, 8, device=device)
    table = torch.arange(state.num_rows * 16, dtype=torch.int32, device=device).view(state.num_rows, 16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = bbk.initial_plan(ours, params, backend="cuda")
        new_plan, events = bbk.decode_policy(ours, our_predictions, our_plan, params, backend="cuda")
        bbk.share_pages(table, events.sync_source, backend="cuda")
        spans = new_plan.query_start, new_plan.query_end
        bbk.copy_pages(kv, table, *spans, num_branches=state.num_branches, backend="cuda")
        bbk.pack_windows(ours, first, table, page_size=16, capacity=64, predict_capacity=64, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
