"""The compiled packing and page operators against the reference, bit for bit."""

import dataclasses
import random

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import reference
from cuda_places import PLACES, check_seeds, open_place, random_table
from policy_random import assert_equal_records, random_params, random_state, to_device

# Capacities that are too small are tried, too.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(params=PLACES)
def place(request):
    return open_place(request.param)


def compare_pack(place, seed, max_requests=3, max_branches=6, max_length=80):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = sorted(rng.choice((1, 4, 8, 32)) for _ in range(rng.randint(1, max_branches)))
    state = random_state(rng, rng.randint(1, max_requests), sizes, rng.randint(1, max_length))
    params = random_params(rng)
    plan = reference.initial_plan(state, params)
    kind = rng.choice(("init", "block", "refresh", "loose"))
    if kind in ("block", "refresh"):
        idle = plan._replace(source_row=torch.full_like(plan.source_row, -1))
        state.needs_refresh.fill_(kind == "refresh")
        nothing = bbk.Predictions(
            torch.zeros(0, dtype=torch.int64), torch.zeros(0).int(), torch.zeros(0), torch.zeros(0)
        )
        plan = reference.decode_policy(state, nothing, idle, params)[0]
    page_size = rng.choice((1, 4, 16))
    canvas = int(state.prompt_length.max()) + state.gen_length
    columns = -(-canvas // page_size) + rng.choice((0, 2))
    if kind == "loose":  # any ranges, and wishes for predictions that no query gives
        ends = torch.randint(0, int(state.prompt_length.min()) + state.gen_length + 1, (2, state.num_rows))
        plan.query_start.copy_(ends.amin(0))
        plan.query_end.copy_(ends.amax(0))
        plan.predict.copy_(torch.rand(plan.predict.shape) < 0.5)
    table = torch.randint(0, 1000, (state.num_rows, columns), dtype=torch.int32)
    is_open = params.query_span == "open" and plan.flags[1] == bbk.structs.PHASE_BLOCK and kind != "loose"
    total = int((plan.query_end - plan.query_start).sum())
    options = dict(
        page_size=page_size,
        capacity=total + rng.choice((0, 1, 300)),
        predict_capacity=max(0, total + rng.choice((0, 5, 400, -total // 2))),
        prediction_offset=params.prediction_offset,
        scattered=bool(is_open),
    )
    device = place.device
    wide = torch.full((state.num_rows, columns + 3), -5, dtype=torch.int32, device=device)
    our_table = wide[:, 1 : columns + 1]
    our_table.copy_(table)
    got = place.pack_windows(to_device(state, device), to_device(plan, device), our_table, **options)
    expected = reference.pack_windows(state, plan, table, **options)
    assert_equal_records(got, expected, "packed")


def test_pack_on_random_plans(place):
    check_seeds(lambda seed: compare_pack(place, seed), range(400))


def test_pack_of_long_rows_and_many_rows(place):
    limits = ({"max_requests": 2, "max_length": 4500}, {"max_requests": 60, "max_length": 40})
    check_seeds(lambda seed: compare_pack(place, seed, **limits[seed % 2]), range(500, 530))


def test_pack_never_writes_beyond_its_capacity(place):
    """Contents for too small a capacity are not promised, but nothing points outside."""
    rng = random.Random(5)
    state = random_state(rng, 2, [4, 8, 32], 64)
    state.tokens.fill_(15)
    params = dataclasses.replace(random_params(rng), mask_token_id=15, prediction_offset=0)
    plan = reference.initial_plan(state, params)
    table = torch.zeros(6, 20, dtype=torch.int32)
    on_device = [to_device(record, place.device) for record in (state, plan)]
    for capacity, predict_capacity in ((0, 0), (1, 100), (70, 3), (70, 200)):
        packed = place.pack_windows(
            *on_device,
            table.to(place.device),
            page_size=4,
            capacity=capacity,
            predict_capacity=predict_capacity,
            prediction_offset=0,
        )
        assert packed.input_ids.shape == (capacity,) and packed.predict_index.shape == (predict_capacity,)
        assert (packed.predict_index < max(capacity, 1)).all() and (packed.predict_index >= 0).all()


def compare_pages(place, seed, max_requests=4, max_branches=8, columns=None):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    requests, branches = rng.randint(1, max_requests), rng.randint(1, max_branches)
    columns, page_size = columns or rng.randint(1, 9), rng.choice((1, 4, 16))
    table = random_table(rng, requests, branches, columns)
    rows = requests * branches
    source = torch.randint(-1, rows, (rows,), dtype=torch.int32)
    if rng.random() < 0.3:
        source = torch.where(torch.rand(rows) < 0.5, torch.arange(rows).int(), -1)
    ours = table.to(place.device, copy=True)
    place.share_pages(ours, source.to(place.device))
    shared = table.clone()
    reference.share_pages(shared, source)
    assert torch.equal(ours.cpu(), shared)

    heads, head_dim = rng.choice(((1, 1), (3, 1), (2, 4), (4, 8)))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    shape = (rng.randint(1, 3), 2, rows * columns + 1, page_size, heads, head_dim)
    if rng.random() < 0.5:
        kv = torch.randn(shape).to(dtype)
    else:  # pages outermost, and heads before positions within a page
        order = [shape[2], shape[0], 2, heads, page_size, head_dim]
        kv = torch.randn(order).to(dtype).permute(1, 2, 0, 4, 3, 5)
    start = torch.randint(0, columns * page_size + 1, (rows,), dtype=torch.int32)
    length = torch.randint(0, rng.choice((2, 3 * page_size, columns * page_size)) + 1, (rows,))
    end = torch.clamp(start + length, max=columns * page_size).int()
    layout = torch.empty_strided(kv.shape, kv.stride(), dtype=dtype, device=place.device)
    our_kv, our_table = layout.copy_(kv), table.to(place.device, copy=True)
    scattered = None
    if rng.random() < 0.5:  # some of all positions, in stretches and alone
        chosen = torch.rand(rows, columns * page_size) < rng.choice((0.1, 0.5, 0.97))
        order = (~chosen).int().sort(dim=1, stable=True).indices.int()
        scattered = torch.cat((torch.full((rows, 2), -9, dtype=torch.int32), order), dim=1)
        start = torch.full_like(start, 2)
        end = 2 + chosen.sum(1).int()
    ranges = start.to(place.device), end.to(place.device)
    listed = None if scattered is None else scattered.to(place.device)
    place.copy_pages(our_kv, our_table, *ranges, num_branches=branches, write_positions=listed)
    reference.copy_pages(kv, table, start, end, num_branches=branches, write_positions=scattered)
    assert torch.equal(our_table.cpu(), table)
    assert torch.equal(our_kv.cpu(), kv)


def test_pages_on_random_tables(place):
    check_seeds(lambda seed: compare_pages(place, seed), range(300))


def test_pages_of_many_requests_and_long_rows(place):
    check_seeds(lambda seed: compare_pages(place, seed, 40, 32, 3), range(600, 606))
    check_seeds(lambda seed: compare_pages(place, seed, 2, 6, 1100), range(700, 706))
    rows = 2000
    table = torch.arange(rows * 5, dtype=torch.int32).view(rows, 5)
    source = torch.randperm(rows).int()
    ours = table.to(place.device, copy=True)
    place.share_pages(ours, source.to(place.device))
    assert torch.equal(ours.cpu(), table[source.long()])


def test_pages_that_are_not_dense_raise(place):
    kv = torch.zeros(1, 2, 8, 4, 2, 8, device=place.device)[..., ::2]
    table = torch.zeros(2, 4, dtype=torch.int32, device=place.device)
    ends = torch.zeros(2, dtype=torch.int32, device=place.device)
    with pytest.raises(ValueError, match="kv_cache: expected .* dense"):
        place.copy_pages(kv, table, ends, ends, num_branches=2)
