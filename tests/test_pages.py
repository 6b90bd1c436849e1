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
    return bbk.StepPlan(*as_ints, None, None)


def write(cache, plain, start, end, value):
    for row, (first, last) in enumerate(zip(start, end)):
        for position in range(first, last):
            page = int(cache.page_table[row, position // cache.page_size])
            cache.kv[:, :, page, position % cache.page_size] = value + position
        plain.rows[row, first:last] = value + torch.arange(first, last)


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
        kind = rng.choice(("block", "block", "sync", "refresh"))
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
