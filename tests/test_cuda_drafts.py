"""The compiled policy with drafts and with open queries against the reference, turn after turn."""

import pytest
import torch

import blockbatch_kernels as bbk
import drafted
from blockbatch_kernels import reference
from cuda_places import PLACES, check_seeds, open_place
from policy_random import assert_equal_records, garbage, to_device
from random_branches import params_of

OPEN = [
    ((4, 8, 16), 32, {"query_span": "open", "refresh_interval": None}),
    ((2, 16), 48, {"query_span": "open", "refresh_scope": "generation", "prediction_offset": 1}),
    ((8,), 24, {"query_span": "open", "eos_exit": "none", "refresh_interval": 16, "leap_radius": 2}),
    (
        (4, 32),
        64,
        {"query_span": "open", "eos_exit": "window", "refresh_interval": None, "sync_threshold": 2},
    ),
]


@pytest.fixture(params=PLACES)
def place(request):
    return open_place(request.param)


def follow(place, generator, state, plan, params, turns):
    """Number of adopted forwards; every record is equal after every turn."""
    ours, our_plan = to_device(state, place.device), to_device(plan, place.device)
    for turn in range(turns):
        if not plan.flags[0]:
            break
        predictions = drafted.predictions_of(generator, state, plan, params)
        plan, events = reference.decode_policy(state, predictions, plan, params)
        out = our_plan, garbage(ours)[1]  # the plan that comes in is the one that goes out
        our_plan, our_events = place.decode_policy(
            ours, to_device(predictions, place.device), our_plan, params, out=out
        )
        assert_equal_records(ours, state, f"state of turn {turn}")
        assert_equal_records(our_plan, plan, f"plan of turn {turn}")
        assert_equal_records(our_events, events, f"events of turn {turn}")
    return int(state.adopted.sum())


@pytest.mark.parametrize("case", drafted.CASES, ids=[str(case[2]["drafts"]) for case in drafted.CASES])
def test_drafted_decodes(place, case):
    adopted = []

    def check(seed):
        generator = torch.Generator().manual_seed(seed)
        begin = drafted.midway if seed % 3 == 0 else drafted.start
        state, plan, params = begin(generator, case, 1 + seed % 3)
        adopted.append(follow(place, generator, state, plan, params, 40))

    check_seeds(check, range(20))
    assert sum(adopted) > 5


@pytest.mark.gpu
@pytest.mark.parametrize("case", drafted.LARGE_CASES)
def test_long_drafted_decodes(case):
    place, generator = open_place("cuda"), torch.Generator().manual_seed(1)
    state, plan, params = drafted.start(generator, case, 2)
    assert follow(place, generator, state, plan, params, 300) > 0


@pytest.mark.parametrize("case", OPEN, ids=[str(case[0]) for case in OPEN])
def test_decodes_with_open_queries(place, case):
    sizes, gen_length, options = case

    def check(seed):
        generator = torch.Generator().manual_seed(seed)
        params = params_of(**options)
        lengths = torch.randint(1, 10, (1 + seed % 3,), generator=generator, dtype=torch.int32)
        prompts = torch.zeros(len(lengths), 9, dtype=torch.int32)
        state = bbk.BranchState.create(
            prompts, lengths, torch.tensor(sizes), gen_length, params.mask_token_id
        )
        plan = reference.initial_plan(state, params)
        follow(place, generator, state, plan, params, 60)

    check_seeds(check, range(20))


def test_drafts_need_a_row_each(place):
    generator = torch.Generator().manual_seed(0)
    state, plan, params = drafted.start(generator, drafted.CASES[0], 1)
    wrong = to_device(state, place.device)
    params = bbk.PolicyParams(**{**vars(params), "drafts": (1, 2, 3)})
    with pytest.raises(ValueError, match="drafts: expected one for each row of a request but the first, "):
        place.initial_plan(wrong, params)
