"""The compiled plan of the attention against the reference's, bit for bit, on the host and on a GPU."""

import random

import pytest
import torch

from blockbatch_kernels import ops, reference, tuning
from blockbatch_kernels.cuda import attention as compiled
from blockbatch_kernels.tuning import AttentionShape
from cuda_places import PLACES

pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")


def random_tables(rng: random.Random, rows: int, pages_per_row: int) -> list[list[int]]:
    """Rows that share stretches of pages with earlier rows, as copies, syncs and writes leave them."""
    tables = []
    for row in range(rows):
        table = [1000 * row + page for page in range(pages_per_row)]
        for _ in range(rng.choice([0, 1, 1, 2, 4])):
            if tables:
                first = rng.randrange(pages_per_row)
                last = rng.randint(first, pages_per_row)
                table[first:last] = rng.choice(tables)[first:last]
        if tables and rng.random() < 0.3:
            table = list(rng.choice(tables))
        tables.append(table)
    return tables


def random_problem(seed: int):
    """Arguments of `attention_plan` on the CPU."""
    rng = random.Random(seed)
    rows = rng.choice([1, 1, 2, 3, 6, 6, 13, 40])
    page_size = rng.choice([1, 3, 16, 16, 64])
    pages_per_row = rng.choice([1, 2, 7, 20, 41])
    longest = pages_per_row * page_size
    lengths = [rng.choice([0, 1, longest, longest, longest, rng.randint(0, longest)]) for _ in range(rows)]
    if rng.random() < 0.4:
        lengths = [rng.randint(1, longest)] * rows
    queries = [rng.choice([0, 1, 4, 8, 16, 32, rng.randint(0, 90)]) for _ in range(rows)]
    bounds = [0]
    for number in queries:
        bounds.append(bounds[-1] + number)
    num_tokens = bounds[-1] + rng.choice([0, 0, 1, 17])
    segment_pages = rng.choice([1, 2, 8])
    max_pieces = rng.choice([1, 2, 4, 16, 32])
    tile_tokens = rng.choice([1, 9, 16, 64])
    block_tokens = rng.choice([1, 9, 16, 64, 64]) if page_size % 16 == 0 else 0
    shape = AttentionShape(
        tile_tokens=tile_tokens,
        segment_pages=segment_pages,
        max_segments=-(-pages_per_row // segment_pages),
        max_pieces=max_pieces,
        max_tiles=max_pieces * -(-num_tokens // tile_tokens),
        target_tiles=rng.choice([1, 4, 30, 1000]),
        min_segments=rng.choice([1, 1, 2, 5]),
        num_heads=16,
        num_kv_heads=rng.choice([1, 2, 4, 16]),
        block_tokens=block_tokens,
        processors=rng.choice([1, 2, 7, 64, 132, 400]) if block_tokens else 0,
        max_slack=rng.choice([0, 0, 1, 2, 5]),
        num_branches=rng.choice([0, 0, 1, 2, 3, 6]),
    )
    tables = (random_tables(rng, rows, pages_per_row), bounds, lengths)
    tensors = [torch.tensor(values, dtype=torch.int32) for values in tables]
    return tensors, dict(page_size=page_size, num_tokens=num_tokens, shape=shape)


def assert_same_plan(got, want, message):
    for name, a, b in zip(want._fields, got, want):
        if isinstance(b, int):
            assert a == b, (message, name)
        else:
            assert a.shape == b.shape and a.dtype == b.dtype, (message, name)
            assert torch.equal(a.cpu(), b.cpu()), (message, name, a, b)


def poison(monkeypatch):
    """Every buffer that is allocated from now on starts full of a value that no plan holds."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(-77))


def test_host_plans_equal_the_reference(monkeypatch):
    poison(monkeypatch)
    for seed in range(600):
        tensors, options = random_problem(seed)
        want = reference.attention_plan(*tensors, **options)
        assert_same_plan(compiled.attention_plan(*tensors, **options), want, seed)


def together(table, bounds, lengths, options) -> bool:
    """Whether rows of different requests would share tiles if they were compared."""
    every = {**options, "shape": options["shape"]._replace(num_branches=0)}
    return bool(
        (
            reference.attention_plan(table, bounds, lengths, **every).tiles
            != reference.attention_plan(table, bounds, lengths, **options).tiles
        ).any()
    )


def test_random_plans_reach_every_case():
    """What the random problems cover: cuts, joined runs, shared tiles, rows that take no part."""
    seen = set()
    for seed in range(600):
        (table, bounds, lengths), options = random_problem(seed)
        shape = options["shape"]
        plan = reference.attention_plan(table, bounds, lengths, **options)
        tiles, pieces = plan.counts.tolist()
        alone = shape._replace(max_pieces=10_000, target_tiles=1, max_tiles=10_000 * options["num_tokens"])
        runs = reference.attention_plan(table, bounds, lengths, **{**options, "shape": alone}).counts[1]
        takes_part = (bounds.diff() > 0) & (lengths > 0)
        seen |= {
            ("nothing", pieces == 0),
            ("joined runs", bool(runs > shape.max_pieces)),
            ("cut finer", bool(pieces > runs)),
            ("as many pieces as allowed", pieces == shape.max_pieces > 1),
            ("shared", bool(0 < tiles < takes_part.sum() * pieces)),
            ("requests that would share", together(table, bounds, lengths, options)),
            ("row without keys", bool(((bounds.diff() > 0) & (lengths == 0)).any())),
            ("several tiles a group", bool((plan.tiles[:, 1] > 0).any() and shape.tile_tokens < 16)),
        }
    names = {name for name, _ in seen}
    assert {name for name, holds in seen if holds} == names


def test_strided_tables():
    tensors, options = random_problem(5)
    want = reference.attention_plan(*tensors, **options)
    table = torch.stack([tensors[0], tensors[0] * 0 - 5], dim=1)[:, 0]  # a row stride beyond the row
    assert_same_plan(compiled.attention_plan(table, *tensors[1:], **options), want, "row stride")
    table = torch.stack([tensors[0], tensors[0] * 0 - 5], dim=2)[..., 0]  # a last stride of 2
    assert_same_plan(compiled.attention_plan(table, *tensors[1:], **options), want, "last stride")


def test_no_rows_and_no_tokens():
    shape = AttentionShape(64, 8, 10, 4, 0, 4, 2)
    table = torch.zeros(0, 80, dtype=torch.int32)
    bounds, lengths = torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    options = dict(page_size=16, num_tokens=0, shape=shape)
    want = reference.attention_plan(table, bounds, lengths, **options)
    assert_same_plan(compiled.attention_plan(table, bounds, lengths, **options), want, "empty")


def test_wrong_sizes_raise():
    tensors, options = random_problem(3)
    with pytest.raises(ValueError, match="attention_plan: page_size: expected at least 1, got 0"):
        compiled.attention_plan(*tensors, **{**options, "page_size": 0})


def test_bounds_that_units_need_raise():
    tensors, options = random_problem(3)
    units = options["shape"]._replace(block_tokens=16, processors=132)
    for name in ("processors", "num_kv_heads"):
        options["shape"] = units._replace(**{name: 0})
        with pytest.raises(ValueError, match=f"attention_plan: {name}: expected at least 1, got 0"):
            compiled.attention_plan(*tensors, **options)


def step(rows, prompt, capacity, sharing, device="cpu"):
    """A denoise step as decoding makes it: windows of 4, 8, 16, ... behind a prompt, pages of 16."""
    windows = [4 << min(row, 5) for row in range(rows)]
    length, page_size = prompt + 256, 16
    pages_per_row = length // page_size
    table = torch.arange(rows * pages_per_row, dtype=torch.int32).view(rows, pages_per_row)
    if sharing == "all":
        table[:] = table[0].clone()
    elif sharing == "prompt":
        table[:, : prompt // page_size] = table[0, : prompt // page_size].clone()
    bounds = torch.tensor([0, *windows], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.full((rows,), length, dtype=torch.int32)
    return (
        (table.to(device), bounds.to(device), lengths.to(device)),
        page_size,
        max(capacity, int(bounds[-1])),
    )


@pytest.mark.parametrize("heads", [(32, 32), (28, 4)])
@pytest.mark.parametrize("sharing", ["none", "prompt", "all"])
def test_steps_as_in_decoding(sharing, heads):
    for rows, prompt in ((1, 256), (2, 1024), (6, 1024), (6, 4096), (12, 512)):
        tensors, page_size, tokens = step(rows, prompt, 256, sharing)
        shape = tuning.attention_shape(tokens, *heads, page_size, tensors[0].shape[1], 132)
        options = dict(page_size=page_size, num_tokens=tokens, shape=shape)
        want = reference.attention_plan(*tensors, **options)
        assert_same_plan(compiled.attention_plan(*tensors, **options), want, (rows, prompt))


@pytest.mark.parametrize(
    ("sharing", "tiles"),
    [
        # (first token, tokens) of the two blocks of each tile
        ("all", [((0, 60), (60, 64)), ((124, 64), (188, 64))]),
        ("prompt", [((0, 60), (60, 64)), ((124, 64), (188, 64))]),
        ("none", [((0, 4), (4, 8)), ((12, 16), (28, 32)), ((60, 64), (124, 0)), ((124, 64), (188, 64))]),
    ],
)
def test_rows_share_blocks_where_they_share_pages(sharing, tiles):
    (table, bounds, lengths), page_size, tokens = step(6, 1024, 256, sharing)
    shape = tuning.attention_shape(tokens, 32, 32, page_size, table.shape[1], 132, units=True)
    plan = compiled.attention_plan(
        table, bounds, lengths, page_size=page_size, num_tokens=tokens, shape=shape
    )
    units = plan.units[1 : 1 + int(plan.units[0, 0])]
    blocks = list(dict.fromkeys(tuple(unit) for unit in units[:, 2:6].tolist()))
    assert blocks == [(a, b, m, n) for (a, m), (b, n) in tiles]
    # Within a segment of 128 keys some page of each window is the row's own.
    once = {"all": 0, "prompt": 12, "none": len(units)}[sharing]
    assert int(units[:, 20].sum()) == once and int((units[:, 20] == 0).sum()) == len(units) - once
    if sharing == "none":
        # The two blocks of the first tile take turns, a unit each.
        first = units[units[:, 2] == 0]
        assert [bool(mask) for mask in first[:, 8]] == [True, False] * (len(first) // 2)


def stretches_of(plan, heads):
    """[begin, end, first] of the processors that have units, after checks of what holds for any cut."""
    units = int(plan.units[0, 0])
    used = [stretch for stretch in plan.stretches.tolist() if stretch[1] > stretch[0]]
    assert plan.stretches.tolist()[: len(used)] == used and not plan.stretches[len(used) :].any()
    # One behind the other, all units of all heads.
    assert [begin for begin, *_ in used] == [0, *(end for _, end, *_ in used[:-1])]
    assert used[-1][1] == units * heads
    for index, (begin, _, first, _) in enumerate(used):
        tile = begin // units * units + int(plan.units[1 + begin % units, 0])
        assert used[first][0] <= tile < used[first][1] and first <= index
    return [stretch[:3] for stretch in used]


def test_stretches_hold_all_units_of_all_heads():
    whole = cut = 0
    for seed in range(600):
        tensors, options = random_problem(seed)
        plan = reference.attention_plan(*tensors, **options)
        if options["shape"].block_tokens and plan.units[0, 0] > 0:
            units, heads = int(plan.units[0, 0]), options["shape"].num_kv_heads
            starts = set(plan.units[1 : 1 + units, 0].tolist())
            stretches = stretches_of(plan, heads)
            covers = [sum(begin < head * units + start < end for head in range(heads) for start in starts)
                      for begin, end, _ in stretches]  # fmt: skip
            whole, cut = whole + (max(covers) == 0), cut + (max(covers) > 0)
    assert whole > 50 and cut > 50


@pytest.mark.parametrize(
    ("rows", "sharing", "heads", "sizes", "tile_starts"),
    [
        # Two tiles of ten units in two stretches each.
        (6, "all", (32, 32), [5, 5, 5, 5], 4),
        # Tiles of 18 and 10 units: whole ones would take nine instead of seven.
        (6, "prompt", (32, 32), [7, 7, 7, 7], 3),
        # One row: as equal as ten units can be.
        (4, "all", (32, 32), [2, 3, 2, 3], 4),
    ],
)
def test_stretches_keep_to_tiles_where_that_is_hardly_longer(rows, sharing, heads, sizes, tile_starts):
    (table, bounds, lengths), page_size, tokens = step(rows, 1024, 0, sharing)
    shape = tuning.attention_shape(tokens, *heads, page_size, table.shape[1], 132, units=True)
    plan = compiled.attention_plan(
        table, bounds, lengths, page_size=page_size, num_tokens=tokens, shape=shape
    )
    stretches = stretches_of(plan, heads[1])
    of_a_head = stretches[: len(sizes)]
    assert [end - begin for begin, end, _ in of_a_head] == sizes
    assert len(stretches) == len(sizes) * heads[1]
    units = plan.units[1:]
    inside = [(begin, end) for begin, end, _ in of_a_head if int(units[begin, 1]) >= end]
    assert len(inside) == tile_starts


@pytest.mark.gpu
def test_gpu_plans_equal_the_reference(monkeypatch):
    poison(monkeypatch)
    for seed in range(300):
        tensors, options = random_problem(seed)
        want = reference.attention_plan(*tensors, **options)
        got = compiled.attention_plan(*(tensor.cuda() for tensor in tensors), **options)
        assert_same_plan(got, want, seed)


@pytest.mark.gpu
def test_gpu_plan_of_many_rows():
    rng = random.Random(7)
    rows, pages_per_row = 300, 34
    table = torch.tensor(random_tables(rng, rows, pages_per_row), dtype=torch.int32)
    queries = torch.tensor([0] + [rng.choice([0, 4, 9, 32]) for _ in range(rows)], dtype=torch.int32)
    lengths = torch.tensor([rng.randint(0, pages_per_row * 16) for _ in range(rows)], dtype=torch.int32)
    tensors = (table, queries.cumsum(0, dtype=torch.int32), lengths)
    tokens = int(tensors[1][-1])
    shape = tuning.attention_shape(tokens, 32, 32, 16, pages_per_row, 132)
    options = dict(page_size=16, num_tokens=tokens, shape=shape)
    want = reference.attention_plan(*tensors, **options)
    got = compiled.attention_plan(*(tensor.cuda() for tensor in tensors), **options)
    assert_same_plan(got, want, "300 rows")


@pytest.mark.gpu
@pytest.mark.parametrize("units", [True, False])
def test_the_front_door_plans_inside_a_graph(monkeypatch, units):
    monkeypatch.setattr(tuning, "plans_units", lambda *sizes, **others: units)
    tensors, page_size, tokens = step(6, 1024, 256, "prompt", "cuda")
    graph = torch.cuda.CUDAGraph()
    options = dict(page_size=page_size, num_tokens=tokens, num_heads=32, num_kv_heads=32)
    ops.attention_plan(*tensors, **options, backend="cuda")
    with torch.cuda.graph(graph):
        got = ops.attention_plan(*tensors, **options, backend="cuda")
    tensors[0].copy_(tensors[0].flip(0))
    graph.replay()
    processors = tuning.num_processors(got.tiles.device)
    shape = tuning.attention_shape(tokens, 32, 32, page_size, tensors[0].shape[1], processors, units=units)
    want = reference.attention_plan(*tensors, page_size=page_size, num_tokens=tokens, shape=shape)
    assert_same_plan(got, want, "graph")
    assert (got.units.shape[0] > 0) == units


@pytest.mark.parametrize("place", PLACES)
def test_a_plan_is_read_where_it_lies(place):
    """A copy in front of every layer's attention would cost more than the plan itself."""
    pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    from blockbatch_kernels.cuda import attention

    for rows, context in ((6, 1024), (3, 500), (1, 16)):
        tensors, page_size, tokens = step(rows, context, 256, "prompt", place)
        for units in (True, False):
            shape = tuning.attention_shape(tokens, 32, 32, page_size, tensors[0].shape[1], 132, units=units)
            plan = attention.attention_plan(*tensors, page_size=page_size, num_tokens=tokens, shape=shape)
            for read in (plan.tiles, plan.units, plan.stretches):
                assert attention._packed(read) is read
            for read in (plan.query_order, plan.pieces, plan.token_row, plan.counts, plan.arrivals):
                assert read.contiguous() is read
