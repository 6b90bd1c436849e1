"""The plan of the attention and copy on write at hundreds of rows: a server's 64 requests of six branches.

Rows of a request share pages, rows of different ones do not. On every backend: the compiled source on the
host and on a GPU, Triton in its interpreter and on a GPU.
"""

import random

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, reference, tuning
from blockbatch_kernels.ops import dispatch
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter

REQUESTS, BRANCHES, COLUMNS, PAGE = 64, 6, 34, 16
INTS = dict(dtype=torch.int32)


def test_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton")


def tables(seed, requests=REQUESTS, branches=BRANCHES, columns=COLUMNS):
    """Page table [requests * branches, columns], queries and keys of each row, as a server's step has."""
    rng = random.Random(seed)
    lines, queries, keys = [], [], []
    for request in range(requests):
        length = rng.randint(columns // 2 * PAGE, columns * PAGE)
        used = rng.choice((1, 2, branches))  # the others are idle
        whole = rng.randrange(used) if rng.random() < 0.2 else None  # a refresh
        for branch in range(branches):
            row = request * branches + branch
            line = [row * columns + column for column in range(columns)]
            if branch:
                shared = rng.randint(0, columns)
                line[:shared] = rng.choice(lines[-branch:])[:shared]
            lines.append(line)
            window = rng.choice((4, 8, 16, 32, 0))
            queries.append(0 if branch >= used else length if branch == whole else window)
            keys.append(length if branch < used else 0)
    bounds = torch.tensor([0, *queries]).cumsum(0).int()
    return torch.tensor(lines, **INTS), bounds, torch.tensor(keys, **INTS)


def plans(seed, device, planner, **sizes):
    """The plan of a backend must be the reference's, which must be that of comparing all rows."""
    given = tables(seed, **sizes)
    branches = sizes.get("branches", BRANCHES)
    tokens = int(given[1][-1]) + 5
    for units in (False, True):
        shape = tuning.attention_shape(tokens, 32, 8, PAGE, given[0].shape[1], 132, units=units)
        if units and planner is not cuda.attention_plan:
            continue
        apart = shape._replace(num_branches=branches)
        options = dict(page_size=PAGE, num_tokens=tokens)
        want = reference.attention_plan(*given, **options, shape=apart)
        every = reference.attention_plan(*given, **options, shape=shape)
        got = planner(*(tensor.to(device) for tensor in given), **options, shape=apart)
        for name, a, b, c in zip(want._fields, got, want, every):
            assert (a == b == c) if isinstance(b, int) else torch.equal(a.cpu(), b) and torch.equal(b, c), (
                name
            )
        rows = int(((given[1].diff() > 0) & (given[2] > 0)).sum())
        assert 0 < int(want.counts[0]) and rows > len(given[0]) // 4


def copies(seed, device, copy_pages, requests=REQUESTS, branches=BRANCHES, columns=COLUMNS):
    """Copy on write against the reference; returns how many rows left a page."""
    table, bounds, _ = tables(seed, requests, branches, columns)
    torch.manual_seed(seed)
    rows, num_pages = len(table), 2 * table.numel()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, columns * PAGE, (rows,), generator=generator).int()
    end = torch.minimum(start + bounds.diff(), torch.tensor(columns * PAGE)).int()
    pages = torch.randperm(num_pages, generator=generator).int()[: rows * columns * 3 // 2]
    kv = torch.randn(1, 2, num_pages, PAGE, 1, 2, generator=generator)
    listed = None
    if seed % 2:  # the same positions, named one by one
        listed = (start.unsqueeze(1) + torch.arange(columns * PAGE + 1)).int()
        start, end = torch.zeros_like(start), end - start
    found = []
    for place, run in (("cpu", reference.copy_pages), (device, copy_pages)):
        held, contents = table.clone().to(place), kv.clone().to(place)
        pool = bbk.PagePool.of(pages.to(place))
        writes = start.to(place), end.to(place)
        positions = None if listed is None else listed.to(place)
        run(contents, held, *writes, num_branches=1, write_positions=positions, pool=pool)
        found.append((held.cpu(), contents.cpu(), pool.counts.cpu()))
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)
    return int((found[0][0] != table).sum())


def test_rows_of_different_requests_are_attended_apart():
    table = torch.arange(COLUMNS, **INTS).expand(4, -1).contiguous()  # four rows on the same pages
    bounds, keys = torch.tensor([0, 8, 16, 24, 32], **INTS), torch.full((4,), 300, **INTS)
    options = dict(page_size=PAGE, num_tokens=32, num_heads=4, num_kv_heads=4, backend="reference")
    tiles = {
        branches: int(bbk.attention_plan(table, bounds, keys, num_branches=branches, **options).counts[0])
        for branches in (1, 2, 3, 4, None)
    }
    pieces = tiles[None]
    assert tiles == {1: 4 * pieces, 2: 2 * pieces, 3: 2 * pieces, 4: pieces, None: pieces}
    with pytest.raises(ValueError, match="num_branches: expected at least 1, got 0"):
        bbk.attention_plan(table, bounds, keys, num_branches=0, **options)


@pytest.mark.parametrize("seed", range(3))
def test_host_plans(seed):
    pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    plans(seed, "cpu", cuda.attention_plan)
    plans(seed, "cpu", cuda.attention_plan, requests=150, branches=1)


def test_host_copies():
    pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    assert min(copies(seed, "cpu", cuda.copy_pages) for seed in range(4)) > 100


@in_interpreter
@pytest.mark.parametrize("branches", [1, 6])
def test_triton_plans(branches):
    from blockbatch_kernels import triton

    plans(7, DEVICE, triton.attention_plan, requests=80 // branches, branches=branches, columns=12)


@in_interpreter
def test_triton_copies():
    from blockbatch_kernels import triton

    assert min(copies(seed, DEVICE, triton.copy_pages, 10, 6, 12) for seed in range(2)) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("seed", range(3))
def test_gpu_plans(backend, seed):
    planner = dispatch.MODULES[backend].attention_plan
    plans(seed, "cuda", planner)
    plans(seed, "cuda", planner, requests=300, branches=1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_copies(backend):
    copy_pages = dispatch.MODULES[backend].copy_pages
    assert min(copies(seed, "cuda", copy_pages) for seed in range(4)) > 100
