"""pack_windows against a naive gather."""

import random

import pytest
import torch

import blockbatch_kernels as bbk
from oracle import policy
from oracle.states import random_case
from policy_bridge import params_of, planned_queries, to_tensors


def naive_pack(state, plan, page_table, page_size, offset, scattered=False):
    """Lists of (input id, position, row, slot) and of (packed index, target)."""
    tokens, predictions = [], []
    for row in range(state.num_rows):
        request = row // state.num_branches
        length = int(state.prompt_length[request])
        canvas = state.prompt_tokens[request, :length].tolist() + state.tokens[row].tolist()
        for position in planned_queries(plan, row, scattered):
            target = position + offset - length
            if 0 <= target < state.gen_length and plan.predict[row, target]:
                predictions.append((len(tokens), row * state.gen_length + target))
            slot = int(page_table[row, position // page_size]) * page_size + position % page_size
            tokens.append((canvas[position], position, row, slot))
    return tokens, predictions


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_random_plans(first):
    for seed in range(first, first + 100):
        rng = random.Random(seed)
        phase, config, state, forwards = random_case(seed)
        offset = rng.choice((0, 1))
        span = rng.choice(("window", "suffix", "canvas"))
        params = params_of(config, state, prediction_offset=offset, query_span=span)
        tensors = to_tensors([state, state] if rng.random() < 0.5 else [state], params)
        plan = rng.choice((bbk.initial_plan(tensors, params), refreshing(tensors, params, rng)))
        page_size = rng.choice((4, 16))
        columns = -(-policy.length_of(state) // page_size)
        page_table = torch.randperm(tensors.num_rows * columns).view(-1, columns).int()
        tokens, predictions = check_pack(rng, tensors, plan, page_table, page_size, offset)
        assert plan.flags[2:4].tolist() == [len(tokens), len(predictions)]


def check_pack(rng, tensors, plan, page_table, page_size, offset, scattered=False):
    """`pack_windows` with some padding or none is what the naive gather says, which is returned."""
    tokens, predictions = naive_pack(tensors, plan, page_table, page_size, offset, scattered)
    padding, more = rng.choice((0, 5)), rng.choice((0, 3))
    packed = bbk.pack_windows(
        tensors,
        plan,
        page_table,
        page_size=page_size,
        capacity=len(tokens) + padding,
        predict_capacity=len(predictions) + more,
        prediction_offset=offset,
        scattered=scattered,
    )
    columns = (packed.input_ids, packed.positions, packed.row_index, packed.slot_mapping)
    expected = tokens + [(0, 0, -1, -1)] * padding
    assert list(zip(*(column.tolist() for column in columns))) == expected
    lengths = (plan.query_end - plan.query_start).tolist()
    assert packed.cu_seqlens_q.tolist() == [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    targets = list(zip(packed.predict_index.tolist(), packed.predict_target.tolist()))
    assert targets == predictions + [(0, -1)] * more
    return tokens, predictions


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_open_queries(first):
    """Plans of the policy, and such with any positions and any wish for predictions."""
    inside_prompt = refreshes = 0
    for seed in range(first, first + 100):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        _, config, state, _ = random_case(seed, cheaper_forwards=True)
        offset = state["prediction_offset"]
        params = params_of(config, state, query_span="open")
        tensors = to_tensors([state, state] if rng.random() < 0.5 else [state], params)
        plan = refreshing(tensors, params, rng)
        page_size = rng.choice((4, 16))
        columns = -(-policy.length_of(state) // page_size)
        page_table = torch.randperm(tensors.num_rows * columns).view(-1, columns).int()
        scattered = int(plan.flags[1]) == bbk.PHASES.index("block")
        refreshes += not scattered
        tokens, predictions = check_pack(rng, tensors, plan, page_table, page_size, offset, scattered)
        assert plan.flags[2:4].tolist() == [len(tokens), len(predictions)]
        inside_prompt += any(position < state["prompt_length"] for _, position, _, _ in tokens)

        # Places behind a row's queries hold what nobody may read.
        plan.query_position.copy_(torch.randint(-9, 999, plan.query_position.shape))
        plan.query_start.zero_()
        for row in range(tensors.num_rows):
            chosen = (torch.rand(tensors.gen_length + 1) < rng.choice((0.0, 0.1, 0.5, 1.0))).nonzero()
            plan.query_end[row] = len(chosen)
            plan.query_position[row, : len(chosen)] = chosen.flatten() + state["prompt_length"] - 1
        plan.predict.copy_(torch.rand(plan.predict.shape) < 0.5)
        check_pack(rng, tensors, plan, page_table, page_size, offset, scattered=True)
    assert inside_prompt >= 5 and refreshes >= 3


def refreshing(tensors, params, rng):
    """The plan after a policy turn without a forward: a block denoise or a refresh."""
    rows = tensors.num_rows
    nothing = bbk.Predictions(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0).int(), torch.zeros(0), torch.zeros(0)
    )
    idle = bbk.StepPlan(
        torch.zeros(rows).int(),
        torch.zeros(rows).int(),
        torch.full((rows,), -1, dtype=torch.int32),
        torch.zeros(rows, tensors.gen_length, dtype=torch.bool),
        torch.tensor([1, rng.choice((1, 2)), 0, 0, 0], dtype=torch.int32),
        torch.zeros(rows, tensors.gen_length + 1, dtype=torch.int32),
    )
    return bbk.decode_policy(tensors, nothing, idle, params)[0]


def test_bad_arguments():
    _, config, state, _ = random_case(1)
    params = params_of(config, state)
    tensors = to_tensors([state], params)
    plan = bbk.initial_plan(tensors, params)
    table = torch.zeros(tensors.num_rows, 4, dtype=torch.int32)
    options = dict(page_size=16, capacity=64, predict_capacity=64)
    for name, value in (("page_size", 0), ("capacity", -1), ("predict_capacity", -2)):
        with pytest.raises(ValueError, match=f"{name}: expected at least [01], got {value}"):
            bbk.pack_windows(tensors, plan, table, **{**options, name: value})
    with pytest.raises(ValueError, match=r"page_table: expected shape"):
        bbk.pack_windows(tensors, plan, table[:-1], **options)
