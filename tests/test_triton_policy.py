"""Triton's policy, packing and cache operators: in the interpreter on the CPU, and on a GPU."""

import pytest
import torch

import blockbatch_kernels as bbk
import triton_checks
from interpreter import interpreted_checks
from random_branches import differences, moved, params_of, random_batch, random_predictions

# Capacities that are too small are tried, too.
pytestmark = pytest.mark.usefixtures("unchecked")

GPU_CASES = [
    *triton_checks.POLICY_CASES,
    ((4, 8, 16, 32, 64, 128), 256, {}),
    ((4, 8, 16, 32, 64, 128, 256), 1000, {"eos_exit": "window", "leap_radius": 7, "threshold": 0.7}),
]


@pytest.fixture(scope="module")
def interpreted():
    """Mismatches by case of one run of `triton_checks.py`, which interprets Triton on the CPU."""
    return interpreted_checks("triton_checks.py")


@pytest.mark.parametrize("operator", ["policy", "pack", "pages"])
def test_interpreted(interpreted, operator):
    cases = {name: found for name, found in interpreted.items() if name.startswith(operator)}
    assert len(cases) >= 4
    assert not any(cases.values()), cases


def test_random_batches_exercise_every_event():
    seen = dict.fromkeys(("committed", "merged", "synced", "needs_refresh", "done", "finished"), 0)
    reasons, phases = set(), set()
    for index, (block_sizes, gen_length, options) in enumerate(triton_checks.POLICY_CASES):
        generator, params = torch.Generator().manual_seed(index), params_of(**options)
        state, truth = random_batch(generator, params, block_sizes, gen_length, 30)
        plan = triton_checks.reference_plan.next_plan(state, params)
        for _ in range(3):
            before = moved(state, "cpu")
            phases.add(int(plan.flags[1]))
            predictions = random_predictions(generator, params, plan, truth)
            plan, _ = bbk.decode_policy(state, predictions, plan, params)
            for name in seen:
                seen[name] += int((getattr(state, name).int() > getattr(before, name).int()).sum())
            reasons.update(state.stop_reason[state.finished & ~before.finished].tolist())
    assert all(count >= 20 for count in seen.values()), seen
    assert reasons == {1, 2} and phases == {1, 2}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_random_batches_on_a_gpu(case):
    device = torch.device("cuda", torch.cuda.current_device())
    many = 300 if case[1] <= 64 else 20
    for seed, num_requests in enumerate((1, 2, many, 7, many // 2, many)):
        max_prompt = (9, 300)[seed % 2]
        found = triton_checks.check_policy(seed, case, num_requests, 3, device, max_prompt)
        assert not found, (seed, found)
        found = triton_checks.check_pack(seed, case, num_requests, device, max_prompt)
        assert not found, (seed, found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", triton_checks.PAGE_SHAPES + [(2, 6, 7, 16, 4, 128)], ids=str)
def test_page_histories_on_a_gpu(shape, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    for seed in range(3):
        found = triton_checks.check_pages(seed, shape, 8, device, dtype)
        assert not found, (seed, found)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES[:4], ids=str)
def test_a_captured_step_runs_again(case):
    """Pack, policy and the cache's tables in one CUDA graph, replayed on new states and predictions."""
    block_sizes, gen_length, options = case
    generator, params = torch.Generator().manual_seed(5), params_of(**options)
    requests, rows, capacity = 3, 3 * len(block_sizes), 400
    batches = [random_batch(generator, params, block_sizes, gen_length, requests) for _ in range(6)]
    plans = [triton_checks.reference_plan.next_plan(state, params) for state, _ in batches]
    predictions = []
    for plan, (_, truth) in zip(plans, batches):
        given = random_predictions(generator, params, plan, truth)
        fill = {"target": -1, "top_token": 0, "confidence": 0.0, "probe_probability": 0.0}
        padded = []
        for name, values in zip(given._fields, given):
            if values is not None:
                rest = torch.full((rows * gen_length + 3 - len(values),), fill[name], dtype=values.dtype)
                values = torch.cat((values, rest))
            padded.append(values)
        predictions.append(bbk.Predictions(*padded))
    page_size, columns = 4, -(-(9 + gen_length) // 4)
    tables = [(torch.randperm(rows, generator=generator).view(-1, 1) * columns) for _ in batches]
    within = torch.arange(rows) // len(block_sizes) * len(block_sizes)  # pages belong to a request's pool
    tables = [
        ((within.view(-1, 1) + order // columns % len(block_sizes)) * columns + torch.arange(columns)).int()
        for order in tables
    ]
    cache = torch.randn(2, 2, rows * columns, page_size, 1, 4, generator=generator)

    def step(state, given, plan, table, kv, out, backend):
        bbk.copy_pages(
            kv, table, plan.query_start, plan.query_end, num_branches=len(block_sizes), backend=backend
        )
        packed = bbk.pack_windows(
            state,
            plan,
            table,
            page_size=page_size,
            capacity=capacity,
            predict_capacity=capacity,
            prediction_offset=params.prediction_offset,
            backend=backend,
        )
        bbk.decode_policy(state, given, plan, params, out=out, backend=backend)
        bbk.share_pages(table, out[1].sync_source, backend=backend)
        return packed

    def fresh(device):
        plan = bbk.StepPlan.allocate(rows, gen_length, device)
        events = bbk.PolicyEvents.allocate(rows, gen_length, device)
        return plan, events

    def load(into, values):
        fields = vars(into).items() if not isinstance(into, tuple) else zip(into._fields, into)
        for name, tensor in fields:
            if tensor is not None:
                tensor.copy_(getattr(values, name))

    device = torch.device("cuda", torch.cuda.current_device())
    state, given = moved(batches[0][0], device), moved(predictions[0], device)
    (plan, events), table, kv = fresh(device), tables[0].to(device), cache.to(device)
    load(plan, plans[0])
    step(state, given, plan, table, kv, (plan, events), "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = step(state, given, plan, table, kv, (plan, events), "triton")
    for index in range(1, len(batches)):
        other, other_plan, other_events = batches[index][0], *fresh("cpu")
        other_table, other_kv = tables[index].clone(), cache.clone()
        load(state, other)
        load(given, predictions[index])
        load(plan, plans[index])
        load(other_plan, plans[index])
        table.copy_(other_table)
        kv.copy_(other_kv)
        graph.replay()
        other_packed = step(
            other,
            predictions[index],
            other_plan,
            other_table,
            other_kv,
            (other_plan, other_events),
            "reference",
        )
        pairs = ((other, state), (other_plan, plan), (other_events, events), (other_packed, packed))
        found = [text for pair in pairs for text in differences(*pair)]
        assert not found, (index, found)
        assert torch.equal(table.cpu(), other_table) and torch.equal(kv.cpu(), other_kv)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    case = triton_checks.POLICY_CASES[0]
    generator, params = torch.Generator().manual_seed(2), params_of(**case[2])
    state, truth = random_batch(generator, params, case[0], case[1], 4)
    plan = triton_checks.reference_plan.next_plan(state, params)
    predictions = moved(random_predictions(generator, params, plan, truth), device)
    state, plan = moved(state, device), moved(plan, device)
    table = torch.zeros(state.num_rows, 40, dtype=torch.int32, device=device)
    kv = torch.zeros(1, 2, table.numel(), 4, 1, 4, device=device)

    def step():
        bbk.copy_pages(kv, table, plan.query_start, plan.query_end, num_branches=4, backend="triton")
        options = dict(page_size=4, capacity=500, predict_capacity=500, prediction_offset=0)
        bbk.pack_windows(state, plan, table, **options, backend="triton")
        _, events = bbk.decode_policy(state, predictions, plan, params, backend="triton")
        bbk.share_pages(table, events.sync_source, backend="triton")
        bbk.initial_plan(state, params, backend="triton")

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_strides_that_are_refused():
    device = torch.device("cuda", torch.cuda.current_device())
    params = params_of()
    state, _ = random_batch(torch.Generator().manual_seed(0), params, (4, 8), 16, 2)
    state = moved(state, device)
    state.top_token = state.top_token.t().contiguous().t()
    with pytest.raises(ValueError, match=r"state.top_token: expected a contiguous tensor .*\[1, 4\]"):
        bbk.initial_plan(state, params, backend="triton")
    kv = torch.zeros(1, 2, 8, 2, 4, 4, device=device).transpose(3, 4)
    table = torch.zeros(2, 4, dtype=torch.int32, device=device)
    ends = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="kv_cache: expected contiguous pages for the triton backend"):
        bbk.copy_pages(kv, table, ends, ends, num_branches=2, backend="triton")
