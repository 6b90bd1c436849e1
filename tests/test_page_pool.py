"""Page tables with ids of another allocator: copy on write out of a list of pages, on every backend."""

import random

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda
from blockbatch_kernels.ops import values
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter

INTS = dict(dtype=torch.int32)


def naive(kv, table, writes, free_pages, page_size):
    """Contents, table and number of missing pages after the writes (a set of positions for each row)."""
    kv, before, after = kv.clone(), table.tolist(), table.tolist()
    num_rows, columns = table.shape
    in_use = {page for line in before for page in line}
    free = [page for page in free_pages if page not in in_use]
    leaving = [[False] * columns for _ in range(num_rows)]
    for row in range(num_rows):
        for column in range(columns):
            page = before[row][column]
            users = [r for r in range(num_rows) if before[r][column] == page and not leaving[r][column]]
            written = any(position // page_size == column for position in writes[row])
            leaving[row][column] = written and (page not in free_pages or len(users) > 1)
    missing, old_kv = 0, kv.clone()
    for row in range(num_rows):
        for column in range(columns):
            if not leaving[row][column]:
                continue
            if not free:
                missing += 1
                continue
            after[row][column] = free.pop(0)
            page, whole = before[row][column], set(range(column * page_size, (column + 1) * page_size))
            if page >= 0 and not whole <= writes[row]:
                kv[:, :, after[row][column]] = old_kv[:, :, page]
    return kv, torch.tensor(after, **INTS).view(table.shape), missing


def random_case(seed, most_rows=7, most_columns=6):
    """kv, table, start, end, listed positions or None, the written sets, the list of pages, page_size."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_rows, columns = rng.randint(1, most_rows), rng.randint(1, most_columns)
    page_size, num_pages = rng.choice((1, 4, 16)), 2 * num_rows * columns + rng.randint(1, 9)
    kv = torch.randn(2, 2, num_pages, page_size, 1, 2)
    # Pages in no order; of each column some rows share one, some have none.
    ids = rng.sample(range(num_pages), num_pages)
    table = torch.full((num_rows, columns), -1, **INTS)
    for column in range(columns):
        own = [ids.pop() for _ in range(num_rows)]
        for row in range(num_rows):
            if rng.random() < 0.8:
                table[row, column] = own[rng.randrange(row + 1) if rng.random() < 0.6 else row]
    length = columns * page_size
    writes = [set() for _ in range(num_rows)]
    start, end = torch.zeros(num_rows, **INTS), torch.zeros(num_rows, **INTS)
    listed = None
    if rng.random() < 0.5:
        for row in range(num_rows):
            start[row], end[row] = sorted(rng.choices(range(length + 1), k=2))
            writes[row] = set(range(int(start[row]), int(end[row])))
    else:
        listed = torch.full((num_rows, length + 1), -7, **INTS)
        for row in range(num_rows):
            writes[row] = {p for p in range(length) if rng.random() < rng.choice((0.0, 0.2, 0.98))}
            start[row], end[row] = 1, 1 + len(writes[row])
            listed[row, 1 : 1 + len(writes[row])] = torch.tensor(sorted(writes[row]), **INTS)
    held = sorted({page for line in table.tolist() for page in line} - {-1})
    others = ids if rng.random() < 0.7 else ids[: rng.randrange(3)]
    pages = [page for page in held if rng.random() < 0.9] + others
    rng.shuffle(pages)
    return kv, table, start, end, listed, writes, pages, page_size


def check(seed, device, backend, copy_pages=bbk.copy_pages, **sizes):
    """Compares with the naive loop; returns how many pages were missing and how many were given."""
    kv, table, start, end, listed, writes, pages, page_size = random_case(seed, **sizes)
    expected_kv, expected_table, missing = naive(kv, table, writes, pages, page_size)
    given = int((expected_table != table).sum())
    free = len(set(pages) - set(table.flatten().tolist())) - given
    pool = bbk.PagePool.of(torch.tensor(pages, **INTS).to(device))
    if seed % 2:  # the counts may lie apart
        pool = pool._replace(counts=torch.stack((pool.counts, pool.counts - 7), 1)[:, 0])
    kv, table = kv.to(device), table.to(device)
    options = {} if backend is None else dict(backend=backend)
    if listed is not None:
        listed = listed.to(device)
    writes = start.to(device), end.to(device)
    try:
        copy_pages(kv, table, *writes, num_branches=1, write_positions=listed, pool=pool, **options)
        assert not missing or backend is None or not values.ENABLED
    except RuntimeError as error:  # raised by BBK_CHECK=1 behind the work
        assert missing and f"{missing} were missing among {len(pages)}" in str(error)
    assert torch.equal(table.cpu(), expected_table), seed
    assert torch.equal(kv.cpu(), expected_kv), seed
    assert pool.counts.tolist() == [free, missing]
    return missing, given


def check_many(seeds, device, backend, **options):
    found = [check(seed, device, backend, **options) for seed in seeds]
    missing, given = (sum(column) for column in zip(*found))
    assert missing > 5 and given > 40, (missing, given)


def test_the_reference():
    check_many(range(200), "cpu", "reference")


def test_the_compiled_source_on_the_host():
    pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    check_many(range(200), "cpu", None, copy_pages=cuda.copy_pages)
    for seed in range(300, 303):
        check(seed, "cpu", None, copy_pages=cuda.copy_pages, most_rows=40, most_columns=60)


def test_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "test_triton")


@in_interpreter
def test_triton_interpreted():
    check_many(range(40), DEVICE, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_a_gpu(backend):
    check_many(range(200), "cuda", backend)
    # More rows than the fixed pool takes branches, more entries than the group has threads.
    for seed in range(300, 308):
        check(seed, "cuda", backend, most_rows=70, most_columns=90)


class Allocator:
    """Somebody else's: hands out ids in an order of its own."""

    def __init__(self, num_pages, seed):
        self.free = random.Random(seed).sample(range(num_pages), num_pages)

    def take(self, number):
        taken, self.free = self.free[:number], self.free[number:]
        return taken


def decode_with_pool(device, backend, seed=0):
    """A history of writes and shares over pages of an allocator; what each row reads at the end, and what it
    should."""
    rng = random.Random(seed)
    num_rows, columns, page_size = 4, 5, 4
    length, allocator = columns * page_size, Allocator(64, seed)
    kv = torch.full((1, 2, 64, page_size, 1, 1), float("nan"), device=device)
    prefix = allocator.take(2)  # of a prompt that other tables use, too
    for column, page in enumerate(prefix):
        kv[:, :, page] = -1.0 - column
    table = torch.full((num_rows, columns), -1, **INTS)
    table[:, :2] = torch.tensor(prefix, **INTS)
    table = table.to(device)
    pool = bbk.PagePool.of(torch.tensor(allocator.take(num_rows * columns), **INTS).to(device))
    plain = torch.full((num_rows, length), float("nan"))
    plain[:, :page_size], plain[:, page_size : 2 * page_size] = -1.0, -2.0
    for turn in range(12):
        start = torch.tensor([rng.randrange(length) for _ in range(num_rows)], **INTS)
        end = torch.tensor([rng.randint(int(first), length) for first in start], **INTS)
        if turn == 0:
            start, end = (
                torch.full((num_rows,), page_size + 1, **INTS),
                torch.full((num_rows,), length, **INTS),
            )
        writes = start.to(device), end.to(device)
        bbk.copy_pages(kv, table, *writes, num_branches=num_rows, pool=pool, backend=backend)
        pages = table.cpu()
        for row in range(num_rows):
            for position in range(int(start[row]), int(end[row])):
                kv[:, :, int(pages[row, position // page_size]), position % page_size] = 10.0 * turn + row
                plain[row, position] = 10.0 * turn + row
        source = torch.tensor([rng.choice((row, -1, 0, 2)) for row in range(num_rows)], **INTS)
        bbk.share_pages(table, source.to(device), backend=backend)
        plain = plain[torch.where(source < 0, torch.arange(num_rows), source)]
    pool.check()
    read = kv[0, 0, table.long().clamp(min=0), :, 0, 0].flatten(1).cpu()
    assert [float(kv[0, 0, page, 0]) for page in prefix] == [-1.0, -2.0]  # nobody wrote into them
    return read, plain


def test_a_decoder_with_its_own_allocator():
    for seed in range(20):
        read, plain = decode_with_pool("cpu", None, seed)
        assert torch.equal(read, plain)


@in_interpreter
def test_triton_with_an_allocator():
    read, plain = decode_with_pool(DEVICE, "triton")
    assert torch.equal(read, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_a_decoder_with_its_own_allocator_on_a_gpu(backend):
    for seed in range(20):
        read, plain = decode_with_pool("cuda", backend, seed)
        assert torch.equal(read, plain)


def test_tables_of_another_allocator_are_refused_without_a_pool():
    kv, ends = torch.zeros(1, 2, 12, 4, 1, 1), torch.zeros(4, **INTS)
    table = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]], **INTS)
    bbk.copy_pages(kv, table, ends, ends, num_branches=2)
    for row, column, page in ((0, 0, 1), (1, 2, 8), (2, 1, 4), (3, 0, 12)):
        wrong = table.clone()
        wrong[row, column] = page
        message = rf"page_table: expected -1 or a page of the fixed pool, .* got {page} in row {row}, "
        with pytest.raises(ValueError, match=f"{message}column {column}; .* need pool="):
            bbk.copy_pages(kv, wrong, ends, ends, num_branches=2)


@pytest.mark.parametrize(
    ("pages", "entry", "message"),
    [
        ([4, 5, 12], 0, "pool.free_pages: expected values from 0 to 11, got 12"),
        ([4, -1], 0, "pool.free_pages: expected values from 0 to 11, got -1"),
        ([4, 5, 4], 0, "pool.free_pages: expected each page once"),
        ([4, 5], 12, "page_table: expected pages from 0 to 11, got 12 in row 0, column 0"),
    ],
)
def test_wrong_pools(pages, entry, message):
    kv, ends = torch.zeros(1, 2, 12, 4, 1, 1), torch.zeros(1, **INTS)
    table, pool = torch.tensor([[entry]], **INTS), bbk.PagePool.of(torch.tensor(pages, **INTS))
    with pytest.raises(ValueError, match=message):
        bbk.copy_pages(kv, table, ends, ends, num_branches=1, pool=pool)


def test_a_pool_that_is_too_short_tells():
    kv, table = torch.zeros(1, 2, 4, 4, 1, 1), torch.full((3, 1), -1, **INTS)
    pool = bbk.PagePool.of(torch.tensor([2, 1], **INTS))
    pool.check()
    start, end = torch.zeros(3, **INTS), torch.ones(3, **INTS)
    with pytest.raises(RuntimeError, match="1 were missing among 2"):
        bbk.copy_pages(kv, table, start, end, num_branches=3, pool=pool)
    assert table.flatten().tolist() == [2, 1, -1]
    with pytest.raises(RuntimeError, match="pool.free_pages: expected a free page for every write, 1 were"):
        pool.check()


@pytest.mark.gpu
def test_a_pool_in_a_captured_graph():
    """No wait for the device, and the list is read anew at every replay."""
    for seed in range(100):
        kv, table, start, end, listed, writes, pages, page_size = random_case(seed)
        expected_kv, expected_table, missing = naive(kv, table, writes, pages, page_size)
        if listed is None and missing == 0 and (expected_table != table).sum() > 4:
            break
    for backend in ("cuda", "triton"):
        pool = bbk.PagePool.of(torch.tensor(pages, **INTS).cuda())
        ours, ours_table, bounds = kv.cuda(), torch.full_like(table, -1).cuda(), (start.cuda(), end.cuda())
        empty = torch.zeros_like(bounds[0])
        bbk.copy_pages(ours, ours_table, empty, empty, num_branches=1, pool=pool, backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bbk.copy_pages(ours, ours_table, *bounds, num_branches=1, pool=pool, backend=backend)
        ours_table.copy_(table)
        graph.replay()
        assert torch.equal(ours_table.cpu(), expected_table) and torch.equal(ours.cpu(), expected_kv)
