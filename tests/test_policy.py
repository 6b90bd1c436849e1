"""`decode_policy` against the naive oracle, one phase at a time on random states."""

import copy
from dataclasses import replace
from itertools import chain, product

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda
from oracle import OracleConfig, policy
from oracle.states import EOS, MASK, random_case
from policy_bridge import assert_plan, assert_same, params_of, step_inputs, to_tensors
from policy_random import to_device

PHASE_FUNCTIONS = {"init": policy.init_phase, "block": policy.block_phase, "refresh": policy.refresh_phase}
CASES, CHUNK = 6_000, 500


def policies():
    """The reference and, where the extension is built, the compiled policy on the host."""
    runs = {"reference": bbk.decode_policy}
    try:
        cuda.build_info()
    except ImportError:
        return runs
    return {**runs, "compiled": cuda.decode_policy}


@pytest.mark.parametrize("cheaper_forwards", [False, True])
@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_states(first, cheaper_forwards):
    runs = policies()
    for seed in range(first, first + CHUNK):
        phase, config, state, forwards = random_case(seed, cheaper_forwards)
        if phase == "refresh" and not forwards:
            continue  # every branch is done: such a request has ended before
        params = params_of(config, state)
        tensors = to_tensors([state], params)
        plan, predictions = step_inputs([state], [forwards], phase, config.query_span)
        PHASE_FUNCTIONS[phase](state, config, forwards)
        for name, decode_policy in runs.items():
            ours = to_device(tensors, "cpu")
            next_plan, events = decode_policy(ours, predictions, plan, params)
            try:
                assert_same([state], [config], ours, next_plan, events)
                assert_plan(state, config, next_plan)
            except AssertionError as error:
                raise AssertionError(f"{name}, seed {seed}, {phase}, {config}: {error}") from error


def test_random_states_exercise_open_queries():
    """Stale positions inside the window, before and behind it, that are computed, adopted and left alone."""
    seen = dict.fromkeys(("inside", "before", "behind", "of a row that is done", "synced", "in both ways"), 0)
    offsets, scopes = set(), set()
    for seed in range(1500):
        phase, config, state, forwards = random_case(seed, True)
        if config.query_span != "open":
            continue
        synced = [branch["synced"] for branch in state["branches"]]
        PHASE_FUNCTIONS[phase](state, config, forwards)
        if state["winner"] is not None:
            continue
        offsets.add(state["prediction_offset"])
        if state["refresh_due"]:
            scopes.add(config.refresh_scope)
            continue
        for index, branch in enumerate(state["branches"]):
            start, end = policy.window_of(state, config, branch)
            stale = policy.stale_positions(state, branch)
            if index not in policy.block_rows(state, config):
                seen["of a row that is done"] += branch["done"] and bool(stale)
                continue
            seen["inside"] += any(start <= p < end for p in stale)
            seen["before"] += any(p < start for p in stale)
            seen["behind"] += any(p >= end for p in stale)
            seen["synced"] += branch["synced"] > synced[index] and bool(stale)
            predicting = {p - state["prediction_offset"] for p in policy.window_masks(state, config, branch)}
            seen["in both ways"] += bool(predicting.intersection(stale))
    assert min(seen.values()) >= 20, seen
    assert offsets == {0, 1} and scopes == {"canvas", "generation"}


def test_random_states_with_a_tail_threshold():
    differ = 0
    for seed in range(1500):
        phase, config, state, forwards = random_case(seed)
        if phase == "refresh" and not forwards:
            continue
        config = replace(config, tail_threshold=max(config.threshold, (0.9375, 1.0)[seed % 2]))
        params = params_of(config, state)
        tensors, usual = (to_tensors([state], params) for _ in range(2))
        plan, predictions = step_inputs([state], [forwards], phase)
        PHASE_FUNCTIONS[phase](state, config, forwards)
        next_plan, events = bbk.decode_policy(tensors, predictions, plan, params)
        assert_same([state], [config], tensors, next_plan, events)
        assert_plan(state, config, next_plan)
        bbk.decode_policy(usual, predictions, plan, replace(params, tail_threshold=None))
        differ += not torch.equal(usual.committed, tensors.committed)
    assert differ > 100


def test_random_states_exercise_every_event():
    seen = dict.fromkeys(("merged", "synced", "done", "needs_refresh", "eos", "length"), 0)
    for seed in range(1000):
        phase, config, state, forwards = random_case(seed)
        before = copy.deepcopy(state)
        PHASE_FUNCTIONS[phase](state, config, forwards)
        for old, new in zip(before["branches"], state["branches"]):
            for name in ("merged", "synced", "done", "needs_refresh"):
                seen[name] += int(new[name]) > int(old[name])
        if state["stop_reason"]:
            seen[state["stop_reason"]] += 1
    assert all(count >= 5 for count in seen.values()), seen


def test_requests_of_a_batch_do_not_touch_each_other():
    """A batch of random requests in the same phase gives what each gives alone."""
    groups = {}
    for case in chain(product(range(3000), [False]), product(range(8000), [True])):
        phase, config, state, forwards = random_case(*case)
        if phase != "refresh":
            key = phase, config, state["prediction_offset"]
            groups.setdefault(key, []).append((state, forwards))
    batches = [(key, cases) for key, cases in groups.items() if len(cases) >= 2]
    assert len(batches) >= 50 and sum(key[1].query_span == "open" for key, _ in batches) >= 20
    for (phase, config, _), cases in batches:
        states, forwards = [state for state, _ in cases], [forward for _, forward in cases]
        params = params_of(config, states[0])
        tensors = to_tensors(states, params)
        plan, predictions = step_inputs(states, forwards, phase, config.query_span)
        next_plan, events = bbk.decode_policy(tensors, predictions, plan, params)
        for state, forward in cases:
            PHASE_FUNCTIONS[phase](state, config, forward)
        assert_same(states, [config] * len(states), tensors, next_plan, events)


def test_equal_rows_of_a_full_forward_take_the_first_ones_predictions():
    phase, config, state, forwards = next(
        case
        for seed in range(1000)
        if (case := random_case(seed))[0] == "init" and len(case[1].block_sizes) > 2
    )
    params = params_of(config, state)
    tensors = to_tensors([state], params)
    plan = bbk.initial_plan(tensors, params)
    assert plan.source_row.tolist() == [0] * tensors.num_rows
    _, predictions = step_inputs([state], [{0: forwards[0]}], phase)
    next_plan, events = bbk.decode_policy(tensors, predictions, plan, params)
    policy.init_phase(state, config, forwards)
    assert_same([state], [config], tensors, next_plan, events)


@pytest.mark.parametrize("query_span", bbk.QUERY_SPANS)
def test_the_first_forward_is_the_whole_canvas(query_span):
    _, config, state, _ = random_case(9)
    params = params_of(config, state, refresh_scope="generation", query_span=query_span, prediction_offset=1)
    tensors = to_tensors([state, state], params)
    plan, count = bbk.initial_plan(tensors, params), tensors.num_branches
    assert plan.query_start.tolist() == [0] * 2 * count
    assert plan.query_end.tolist() == [policy.length_of(state), *[0] * (count - 1)] * 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"merge_threshold": 0.4}, "merge_threshold: expected a value from 0.5 to 1, got 0.4"),
        ({"eos_exit": "never"}, "eos_exit: expected one of prefix, window, none, got 'never'"),
        ({"query_span": "all"}, "query_span: expected one of window, suffix, canvas, open, got 'all'"),
        ({"steps_per_block": 3}, "threshold: expected either"),
        ({"threshold": 0.9, "tail_threshold": 0.8}, "tail_threshold: expected at least threshold = 0.9"),
        ({"threshold": None, "steps_per_block": 3, "tail_threshold": 0.9}, "tail_threshold: expected None"),
        ({"prediction_offset": 2}, "prediction_offset: expected 0 or 1, got 2"),
    ],
)
def test_bad_params(change, message):
    _, config, state, _ = random_case(0)
    params = params_of(config, state)
    bad = bbk.PolicyParams(**{**params.__dict__, **change})
    with pytest.raises(ValueError, match=message):
        bbk.initial_plan(to_tensors([state], params), bad)


def test_bad_predictions():
    phase, config, state, forwards = random_case(3)
    params = params_of(config, state)
    tensors = to_tensors([state], params)
    plan, predictions = step_inputs([state], [forwards], phase)
    with pytest.raises(TypeError, match="predictions.confidence: expected torch.float32, got torch.float64"):
        bbk.decode_policy(
            tensors, predictions._replace(confidence=predictions.confidence.double()), plan, params
        )
    with pytest.raises(ValueError, match=r"predictions.top_token: expected shape \[\d+\], got \[1\]"):
        bbk.decode_policy(tensors, predictions._replace(top_token=torch.zeros(1).int()), plan, params)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_refresh_of_the_generation_region_leaves_the_prompt_alone(offset):
    config = OracleConfig(gen_length=16, block_sizes=(4, 8)).resolve()
    state = policy.new_state([1, 2, 3], config, MASK, EOS)
    params = params_of(config, state, refresh_scope="generation", prediction_offset=offset)
    tensors = to_tensors([state], params)
    plan = bbk.initial_plan(tensors, params)
    assert (int(plan.query_start[0]), int(plan.query_end[0])) == (0, 19)
    tensors.needs_refresh.fill_(True)
    _, predictions = step_inputs([state], [{}], "block")
    plan.source_row.fill_(-1)
    plan.flags[1] = bbk.PHASES.index("block")
    plan, _ = bbk.decode_policy(tensors, predictions, plan, params)
    assert bbk.PHASES[int(plan.flags[1])] == "refresh"
    assert (int(plan.query_start[0]), int(plan.query_end[0])) == (3 - offset, 19)
