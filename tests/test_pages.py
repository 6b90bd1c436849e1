"""The paged cache against a plain one: every row its own copy, copied whole at every sync."""

import random

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch.kv_cache import KVCache, cache_bytes


class PlainCache:
    """rows of K/V without any sharing."""

    def __init__(self, num_rows, length):
        self.rows = torch.full((num_rows, length), float("nan"))


def make(num_requests, num_branches, length, page_size):
    return KVCache(
        num_requests,
        num_branches,
        length,
        num_layers=2,
        num_kv_heads=1,
        head_dim=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
        page_size=page_size,
    )


def plan(cache, start, end, source_row):
    as_ints = [torch.tensor(x, dtype=torch.int32) for x in (start, end, source_row)]
    return bbk.StepPlan(*as_ints, None, None, None)


def write(cache, plain, start, end, value):
    for row, bounds in enumerate(zip(start, end)):
        write_row(cache, plain, row, range(*bounds), value)


def write_row(cache, plain, row, positions, value):
    for position in positions:
        page = int(cache.page_table[row, position // cache.page_size])
        cache.kv[:, :, page, position % cache.page_size] = value + position
        plain.rows[row, position] = value + position


def check(cache, plain, rows):
    length = plain.rows.shape[1]
    for row in rows:
        pages = cache.page_table[row].long()
        assert (pages >= 0).all()
        for layer in range(2):
            for side in range(2):
                seen = cache.kv[layer, side, pages].flatten()[:length]
                assert torch.equal(seen, plain.rows[row]), row


@pytest.mark.parametrize("seed", range(60))
def test_random_histories_equal_a_plain_cache(seed):
    rng = random.Random(seed)
    num_requests, num_branches = rng.choice(((1, 1), (1, 6), (3, 2), (2, 4)))
    page_size, length = rng.choice(((4, 22), (16, 50), (8, 8), (16, 9)))
    num_rows = num_requests * num_branches
    cache, plain = make(num_requests, num_branches, length, page_size), PlainCache(num_rows, length)
    first = [row - row % num_branches for row in range(num_rows)]

    def full_forward(source_row, value):
        end = [length if source == row else 0 for row, source in enumerate(source_row)]
        start = [0] * num_rows
        step = plan(cache, start, end, source_row)
        cache.prepare(step)
        write(cache, plain, start, end, value)
        cache.share(step.source_row)
        for row, source in enumerate(source_row):
            if source >= 0:
                plain.rows[row] = plain.rows[source]

    full_forward(first, 1000.0)
    # All branches of a request share the one row that was computed.
    assert len(cache.page_table.unique()) == num_requests * cache.page_table.shape[1]
    check(cache, plain, range(num_rows))
    for turn in range(12):
        value = 1000.0 * (turn + 2)
        kind = rng.choice(("block", "block", "scattered", "scattered", "sync", "refresh"))
        if kind == "block":
            start, end = [], []
            for _ in range(num_rows):
                begin = rng.randrange(length)
                stop = begin + rng.randint(1, length - begin) if rng.random() < 0.7 else begin
                start.append(begin)
                end.append(stop)
            source = [row if b < e else -1 for row, (b, e) in enumerate(zip(start, end))]
            cache.prepare(plan(cache, start, end, source))
            for row in range(num_rows):  # each row its own values
                only = [(b, e) if r == row else (0, 0) for r, (b, e) in enumerate(zip(start, end))]
                write(cache, plain, *zip(*only), value + 7 * row)
        elif kind == "scattered":
            chosen = [random_positions(rng, length, page_size) for _ in range(num_rows)]
            cache.make_private(*as_writes(rng, chosen, length))
            for row, positions in enumerate(chosen):
                write_row(cache, plain, row, positions, value + 7 * row)
        elif kind == "sync":
            source = list(range(num_rows))
            for request in range(num_requests):
                leader = first[request * num_branches] + rng.randrange(num_branches)
                for row in range(request * num_branches, (request + 1) * num_branches):
                    if rng.random() < 0.4:
                        source[row] = leader
            cache.share(torch.tensor(source, dtype=torch.int32))
            plain.rows = plain.rows[source]
        else:
            source = []
            for row in range(num_rows):
                earlier = [r for r in range(first[row], row) if source[r] == r]
                choices = [-1, row, row] + earlier
                source.append(rng.choice(choices))
            full_forward(source, value)
        check(cache, plain, range(num_rows))


def random_positions(rng, length, page_size):
    """Some positions, some pages whole, some pages but for one position, or nothing, in ascending order."""
    rate = rng.choice((0.0, 0.02, 0.3))
    chosen = {position for position in range(length) if rng.random() < rate}
    for start in range(0, length, page_size):
        if rng.random() < 0.3 * (rate > 0):
            chosen.update(range(start, min(start + page_size, length)))
            if rng.random() < 0.3:
                chosen.remove(rng.choice(range(start, min(start + page_size, length))))
    return sorted(chosen)


def as_writes(rng, chosen, capacity, start=0):
    """write_start, write_end and write_positions; places that no row writes hold what nobody may read."""
    size = capacity + start + rng.choice((0, 1, 5))
    places = torch.randint(-capacity, 3 * capacity, (len(chosen), size), dtype=torch.int32)
    for row, positions in enumerate(chosen):
        places[row, start : start + len(positions)] = torch.tensor(positions, dtype=torch.int32)
    first = torch.full((len(chosen),), start, dtype=torch.int32)
    return first, first + torch.tensor([len(positions) for positions in chosen], dtype=torch.int32), places


def naive_copy_pages(kv, table, chosen, num_branches):
    """Page by page: (cache, table, copies made) after each row got pages of its own where it writes."""
    page_size, columns = kv.shape[3], table.shape[1]
    new_kv, new, copies = kv.clone(), table.tolist(), 0
    for first in range(0, len(new), num_branches):
        request = range(first, first + num_branches)
        for column in range(columns):
            pool = [(first + place) * columns + column for place in range(num_branches)]
            for row in request:
                written = [position for position in chosen[row] if position // page_size == column]
                users = [new[other][column] for other in request]
                old = new[row][column]
                if not written or (old >= 0 and users.count(old) == 1):
                    continue
                new[row][column] = next(page for page in pool if page not in users)
                if old >= 0 and len(written) < page_size:
                    new_kv[:, :, new[row][column]] = kv[:, :, old]
                    copies += 1
    return new_kv, torch.tensor(new, dtype=torch.int32), copies


def random_table(rng, num_requests, num_branches, columns):
    """Rows that share some pages of their request, in any order, and lack others."""
    table = torch.full((num_requests * num_branches, columns), -1, dtype=torch.int32)
    sharing, missing = rng.choice((0.0, 0.5, 1.0)), rng.choice((0.0, 0.0, 0.2))
    for first in range(0, len(table), num_branches):
        for column in range(columns):
            pool = rng.sample(range(num_branches), num_branches)
            for branch in range(num_branches):
                place = pool[rng.randrange(branch + 1) if rng.random() < sharing else branch]
                if rng.random() >= missing:
                    table[first + branch, column] = (first + place) * columns + column
    return table


def test_scattered_writes_equal_a_naive_loop():
    copied = moved = 0
    for seed in range(300):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        num_requests, num_branches = rng.choice(((1, 1), (1, 6), (3, 2), (2, 4)))
        page_size, columns = rng.choice(((4, 6), (16, 3), (8, 1), (1, 9)))
        length = page_size * columns
        table = random_table(rng, num_requests, num_branches, columns)
        kv = torch.randn(2, 2, table.numel() + rng.choice((0, 2)), page_size, 1, 3)
        chosen = [random_positions(rng, length, page_size) for _ in range(len(table))]
        expected_kv, expected_table, copies = naive_copy_pages(kv, table, chosen, num_branches)
        copied += copies
        moved += int((expected_table != table).sum())
        start, end, places = as_writes(rng, chosen, length, rng.choice((0, 0, 2)))
        bbk.copy_pages(kv, table, start, end, num_branches=num_branches, write_positions=places)
        assert torch.equal(table, expected_table) and torch.equal(kv, expected_kv), seed
    assert copied > 200 and moved - copied > 200, (copied, moved)


def test_scattered_writes_of_a_stretch_equal_the_stretch():
    for seed in range(100):
        rng = random.Random(seed)
        columns, page_size = rng.randint(1, 6), rng.choice((1, 4, 16))
        table = random_table(rng, 2, 4, columns)
        kv = torch.randn(1, 2, table.numel(), page_size, 1, 2)
        bounds = [sorted(rng.choices(range(columns * page_size + 1), k=2)) for _ in range(8)]
        other_kv, other_table = kv.clone(), table.clone()
        start, end = torch.tensor(bounds, dtype=torch.int32).unbind(1)
        bbk.copy_pages(kv, table, start, end, num_branches=4)
        chosen = [range(*bound) for bound in bounds]
        start, end, places = as_writes(rng, [list(row) for row in chosen], columns * page_size)
        bbk.copy_pages(other_kv, other_table, start, end, num_branches=4, write_positions=places)
        assert torch.equal(table, other_table) and torch.equal(kv, other_kv)


def test_a_private_page_is_not_moved():
    cache = make(1, 2, 32, 16)
    cache.prepare(plan(cache, [0, 0], [32, 0], [0, 0]))
    cache.share(torch.tensor([0, 0], dtype=torch.int32))
    cache.prepare(plan(cache, [4, 4], [8, 4], [0, -1]))  # the first row leaves the shared first page
    table = cache.page_table.clone()
    assert table[0, 0] != table[1, 0] and table[0, 1] == table[1, 1]
    cache.prepare(plan(cache, [4, 4], [8, 8], [0, 1]))  # both rows are alone on theirs now
    assert torch.equal(cache.page_table, table)


def test_memory_is_known_beforehand():
    cache = make(3, 4, 50, 16)
    assert cache.kv.numel() * 4 == cache_bytes(
        12, 50, num_layers=2, num_kv_heads=1, head_dim=1, dtype=torch.float32, page_size=16
    )


def test_bad_arguments():
    cache = make(1, 2, 32, 16)
    ends = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="num_branches: expected a divisor of the 2 rows, got 3"):
        bbk.copy_pages(cache.kv, cache.page_table, ends, ends, num_branches=3)
    with pytest.raises(ValueError, match="kv_cache: expected at least 4 pages, got 2"):
        bbk.copy_pages(cache.kv[:, :, :2], cache.page_table, ends, ends, num_branches=2)
    with pytest.raises(TypeError, match="source_row: expected torch.int32, got torch.int64"):
        bbk.share_pages(cache.page_table, torch.zeros(2, dtype=torch.int64))
