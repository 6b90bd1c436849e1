"""Triton's open queries, refreshes of the generation region, and drafts."""

import pytest
import torch

import blockbatch_kernels as bbk
import drafted
import policy_random
import triton_option_checks as checks
from interpreter import interpreted_checks
from random_branches import differences, moved

# Capacities that are too small are tried, too.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def interpreted():
    """Mismatches by case of one run of `triton_option_checks.py`, which interprets Triton on the CPU."""
    return interpreted_checks("triton_option_checks.py")


@pytest.mark.parametrize(
    "subject, least",
    [("random", 90), ("oracle", 20), ("drafts", 12), ("pack", 12), ("pages", 20), ("decode", 5)],
)
def test_interpreted(interpreted, subject, least):
    cases = {name: found for name, found in interpreted.items() if name.startswith(subject)}
    assert len(cases) >= least
    assert not any(cases.values()), {name: found for name, found in cases.items() if found}


def test_drafted_decodes_exercise_every_event():
    adopted_at_once, reasons, phases = {0: 0, 1: 0, 2: 0}, set(), set()
    seen = dict.fromkeys(("no room for a draft", "an EOS in the way", "pages of the branch"), 0)
    for seed in checks.DRAFT_SEEDS:
        case, generator = checks.draft_case(seed), torch.Generator().manual_seed(seed)
        state, plan, params = (drafted.midway, drafted.start)[seed % 2](generator, case, 2)
        for _ in range(checks.DRAFT_TURNS):
            if not plan.flags[0]:
                break
            before = moved(state, "cpu")
            predictions = drafted.predictions_of(generator, state, plan, params)
            phases.add(int(plan.flags[1]))
            plan, events = bbk.decode_policy(state, predictions, plan, params)
            for number in (state.adopted - before.adopted).view(2, -1)[:, 0].tolist():
                adopted_at_once[min(number, 2)] += 1
            reasons.update(state.stop_reason[state.finished & ~before.finished].tolist())
            rows = torch.arange(state.num_rows).view(2, -1)
            seen["pages of the branch"] += int((events.sync_source.view(2, -1) != rows)[:, 1:].any(1).sum())
            running = ~state.finished & ~state.needs_refresh.view(2, -1)[:, 0] & ~state.done.view(2, -1)[:, 0]
            seen["no room for a draft"] += int((state.done.view(2, -1)[:, 1:].any(1) & running).sum())
            open_places = (state.tokens == params.mask_token_id).view(2, -1, state.gen_length)[:, 0].sum(1)
            room = running & (open_places > max(params.drafts)) & state.done.view(2, -1)[:, -1]
            seen["an EOS in the way"] += int(room.sum()) * (params.eos_exit == "prefix")
    assert min(adopted_at_once.values()) >= 5, adopted_at_once
    assert min(seen.values()) >= 3, seen
    assert reasons == {1, 2} and phases == {0, 1, 2}


def test_random_states_exercise_open_queries():
    behind_everything, numbers = 0, []
    for seed in checks.RANDOM_SEEDS:
        state, predictions, plan, params = policy_random.random_batch(seed, **checks.LIMITS)
        if params.query_span != "open":
            continue
        plan, _ = bbk.decode_policy(state, predictions, plan, params)
        if int(plan.flags[1]) == bbk.structs.PHASE_BLOCK:
            lengths = plan.query_end
            numbers += lengths[lengths > 0].tolist()
            last = state.prompt_length.repeat_interleave(state.num_branches) + state.gen_length - 1
            at = plan.query_position.gather(1, (lengths.long() - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
            behind_everything += int(((at == last) & (lengths > 0)).sum()) * params.prediction_offset
    assert len(numbers) >= 60 and behind_everything >= 5, (len(numbers), behind_everything)


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 600, 100))
def test_random_batches_on_a_gpu(first):
    device = torch.device("cuda", torch.cuda.current_device())
    for seed in range(first, first + 100):
        if checks.is_telling(seed):
            assert not checks.check_random(seed, device), seed


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*drafted.CASES, *drafted.LARGE_CASES], ids=str)
def test_drafted_decodes_on_a_gpu(case):
    device = torch.device("cuda", torch.cuda.current_device())
    for seed, num_requests in enumerate((1, 2, 60, 7)):
        found = checks.check_drafts(seed, case, num_requests, 60, device)
        assert not found, (seed, found)


@pytest.mark.gpu
def test_pack_and_pages_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    for seed in range(60):
        assert not checks.check_pages(seed, device), seed
        assert not checks.check_pack(seed, device), seed


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*drafted.CASES[:2], *drafted.LARGE_CASES], ids=str)
def test_a_captured_turn_runs_again(case):
    """The turns of drafted decodes, all of them replays of one CUDA graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(3)
    state, plan, params = drafted.start(generator, case, 5)
    names = bbk.Predictions._fields
    empty = dict(target=-1, top_token=0, confidence=0.0, probe_probability=0.0)
    size = state.tokens.numel() + 3

    def padded(predictions):
        values = []
        for name, given in zip(names, predictions):
            if given is not None:
                rest = torch.full((size - len(given),), empty[name], dtype=given.dtype)
                given = torch.cat((given, rest))
            values.append(given)
        return bbk.Predictions(*values)

    given = padded(drafted.predictions_of(generator, state, plan, params))
    ours, our_given, our_plan = (moved(record, device) for record in (state, given, plan))
    out = our_plan, bbk.PolicyEvents.allocate(*state.tokens.shape, device)
    warm = moved(ours, device), moved(our_plan, device)
    bbk.decode_policy(warm[0], our_given, warm[1], params, out=(warm[1], out[1]), backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bbk.decode_policy(ours, our_given, our_plan, params, out=out, backend="triton")
    turns = 0
    while plan.flags[0] and turns < 60:
        for target, values in zip(our_given, given):
            if values is not None:
                target.copy_(values)
        plan, events = bbk.decode_policy(state, given, plan, params)
        graph.replay()
        pairs = ((state, ours), (plan, our_plan), (events, out[1]))
        found = [text for pair in pairs for text in differences(*pair)]
        assert not found, (turns, found)
        given = padded(drafted.predictions_of(generator, state, plan, params))
        turns += 1
    assert turns > 3


@pytest.mark.gpu
def test_a_turn_does_not_wait_for_the_device(unchecked):
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(4)
    state, plan, params = drafted.midway(generator, drafted.CASES[0], 3)
    predictions = moved(drafted.predictions_of(generator, state, plan, params), device)
    state, plan = moved(state, device), moved(plan, device)
    bbk.decode_policy(moved(state, device), predictions, plan, params, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        bbk.decode_policy(state, predictions, plan, params, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
