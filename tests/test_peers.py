"""Sums of rows over GPUs with the norm behind them, `blockbatch_kernels.cuda.peers`: ranks on one GPU.

A rank knows of the others only what lies in its inbox, so one GPU can play each of them in turn, or all of
them at the same time in streams.
"""

import functools

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch.parallel.head import _merged
from blockbatch_kernels.cuda import peers
from cuda_float_checks import draw, strided

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


class World:
    """The inboxes of so many ranks, all on this GPU."""

    def __init__(self, ranks, source_bytes, lanes=None):
        shape = (peers.TURNS, ranks - 1, source_bytes)
        self.memory = [torch.full(shape, peers.NOT_THERE, dtype=torch.uint8).cuda() for _ in range(ranks)]
        addresses = tuple(inbox.data_ptr() for inbox in self.memory)
        self.inboxes = [
            peers.Inboxes(
                addresses, rank, source_bytes, torch.zeros(2, dtype=torch.int32).cuda(), lanes or ranks
            )
            for rank in range(ranks)
        ]

    def place(self, sender, receiver, turn, part):
        """Where `receiver` finds what `sender` says."""
        source = self.memory[receiver][turn, sender - (sender > receiver)]
        return source[: part.nbytes].view(part.dtype).view(part.shape)

    def clear(self):
        for inbox in self.memory:
            inbox.fill_(peers.NOT_THERE)


def expected(parts, weight, residual, quantized):
    residual = residual.clone()
    norm = bbk.rms_norm_fp8 if quantized else bbk.rms_norm
    rows = norm(functools.reduce(torch.add, parts), weight, eps=EPS, residual=residual, backend="cuda")
    return (*rows, residual) if quantized else (rows, residual)


def same_bits(found, right):
    for one, other in zip(found, right, strict=True):
        if one.dtype == torch.float8_e4m3fn:
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "ranks, tokens, dim",
    [(2, 1, 96), (2, 130, 4096), (3, 7, 3584), (4, 5, 8192), (8, 3, 16384), (2, 700, 64)],
)
def test_each_rank_by_itself(poisoned, ranks, tokens, dim, dtype, quantized):
    """Results, what is pushed to the others, and what is set back; two rounds of both turns."""
    parts = [draw(tokens, dim, dtype=dtype, seed=rank) for rank in range(ranks)]
    weight = draw(dim, dtype=dtype, seed=99)
    before = draw(tokens, dim, dtype=dtype, scale=3.0, seed=100)
    right = expected(parts, weight, before, quantized)
    world = World(ranks, (tokens * dim + 32) * dtype.itemsize, lanes=8)
    for turn in (0, 1, 0, 1):
        for rank, inboxes in enumerate(world.inboxes):
            world.clear()
            for sender in range(ranks):
                if sender != rank:
                    world.place(sender, rank, turn, parts[sender]).copy_(parts[sender])
            x, _, _ = strided(parts[rank], 16, 32)
            residual, storage, beside = strided(before, 32, 16)
            assert peers.takes(x, weight, residual, inboxes.source_bytes)
            rows = peers.all_reduce_norm(x, weight, residual, inboxes, eps=EPS, quantized=quantized)
            same_bits((*rows, residual) if quantized else (rows, residual), right)
            assert storage[beside].isnan().all()
            assert inboxes.turn.tolist() == [1 - turn, 0]
            assert (world.memory[rank] == peers.NOT_THERE).all()
            for receiver in range(ranks):
                if receiver != rank:
                    pushed = world.place(rank, receiver, turn, parts[rank])
                    assert torch.equal(pushed, parts[rank])
                    pushed.view(torch.uint8).fill_(peers.NOT_THERE)
                    assert (world.memory[receiver] == peers.NOT_THERE).all()


def run(world, rank, parts, weight, residual, quantized):
    options = dict(eps=EPS, quantized=quantized, alone=False)  # there are others on this GPU
    rows = peers.all_reduce_norm(parts[rank], weight, residual, world.inboxes[rank], **options)
    return (*rows, residual) if quantized else (rows, residual)


def load_kernels(ranks, dim):
    """A first launch loads a kernel and may wait for the device, and so for ranks there, for ever."""
    world = World(ranks, dim * 2)
    for quantized in (False, True):
        world.memory[0].zero_()
        part, weight, residual = (
            draw(*shape, dtype=torch.bfloat16) for shape in ((1, dim), (dim,), (1, dim))
        )
        run(world, 0, [part], weight, residual.clone(), quantized)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_at_the_same_time(ranks, captured):
    """Each in a stream, many calls of changing sizes without a pause: nobody reads a call's neighbours."""
    dim, sizes, rounds = 4096, (1, 128, 3, 40, 128, 700, 2), 3
    load_kernels(ranks, dim)
    cases = []
    for call, tokens in enumerate(sizes):
        parts = [draw(tokens, dim, dtype=torch.bfloat16, seed=10 * call + rank) for rank in range(ranks)]
        weight = draw(dim, dtype=torch.bfloat16, seed=1000 + call)
        before = draw(tokens, dim, dtype=torch.bfloat16, seed=2000 + call)
        quantized = call % 2 == 1
        cases.append((parts, weight, before, quantized, expected(parts, weight, before, quantized)))
    # The last call is in pieces.
    world = World(ranks, 512 * dim * 2)
    streams = [torch.cuda.Stream() for _ in range(ranks)]

    def of_rank(rank):
        return [
            run(world, rank, parts, weight, before.clone(), quantized)
            for parts, weight, before, quantized, _ in cases
        ]

    torch.cuda.synchronize()
    found, graphs = [None] * ranks, []
    if captured:
        for rank, stream in enumerate(streams):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                found[rank] = of_rank(rank)
            graphs.append(graph)
    for _ in range(rounds):
        for results in found if captured else ():
            for tensors in results:
                for tensor in tensors:
                    tensor.view(torch.uint8).fill_(255)
        torch.cuda.synchronize()
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if captured:
                    graphs[rank].replay()
                else:
                    found[rank] = of_rank(rank)
        torch.cuda.synchronize()
        for results in found:
            for tensors, case in zip(results, cases, strict=True):
                same_bits(tensors, case[-1])
    assert all((inbox == peers.NOT_THERE).all() for inbox in world.memory)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_that_looks_like_none(dtype):
    """NaN of the bits that stand for "not there", and -0: numbers like others."""
    parts = [draw(2, 64, dtype=dtype, seed=rank) for rank in range(2)]
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    parts[0].view(integers)[0, 8:16] = -1
    parts[1].view(integers)[1, 3] = -1
    parts[0][1, 20:40], parts[1][1, 20:40] = -0.0, -0.0
    weight, residual = torch.ones(64, dtype=dtype).cuda(), torch.full((2, 64), -0.0, dtype=dtype).cuda()
    right = expected(parts, weight, residual, False)
    world = World(2, 2 * 64 * dtype.itemsize)
    for rank in range(2):
        other = 1 - rank
        words = world.place(other, rank, 0, parts[other]).copy_(parts[other]).view(torch.int32)
        words[words == -1] = 2**31 - 1  # as a rank sends it
        held = residual.clone()
        same_bits(run(world, rank, parts, weight, held, False), right)
        assert torch.equal(held.signbit()[1, 20:40], torch.ones(20, dtype=torch.bool).cuda())
        sent = world.place(rank, other, 0, parts[rank])
        assert (sent.view(torch.int32) != -1).all()
        assert torch.equal(sent.isnan(), parts[rank].isnan())
        world.clear()


def head_parts(ranks, rows):
    """Of each rank, with ties, with ranks that have no logit above minus infinity, and with NaN."""
    parts = []
    for rank in range(ranks):
        part = draw(rows, 4, scale=3.0, seed=rank).round()
        part[:, 1] = draw(rows, seed=50 + rank).abs() + 1.0
        part[:, 2] = 10_000 * rank + draw(rows, seed=90 + rank).abs().mul(100).round()
        if rows > 2:
            part[rank % rows, :2] = torch.tensor([float("-inf"), 0.0])
            part[2, 0] = float("nan") if rank == 1 else 0.0
        parts.append(part)
    return parts


@pytest.mark.gpu
@pytest.mark.parametrize("probes", [False, True])
@pytest.mark.parametrize("ranks, rows", [(2, 1), (2, 128), (3, 700), (8, 5)])
def test_the_merged_head_of_each_rank(poisoned, ranks, rows, probes):
    parts = head_parts(ranks, rows)
    highest, total, token, probe = torch.stack(parts).unbind(-1)
    top, right, whole = _merged(highest, total, token)
    world = World(ranks, rows * 16 + 64)
    for turn in (0, 1, 0):
        for rank, inboxes in enumerate(world.inboxes):
            world.clear()
            for sender in range(ranks):
                if sender != rank:
                    world.place(sender, rank, turn, parts[sender]).copy_(parts[sender])
            top_token, confidence, probability = peers.merge_head(parts[rank], inboxes, probes=probes)
            known = ~top.isnan()
            assert torch.equal(top_token[known], right.int()[known])
            torch.testing.assert_close(confidence, 1.0 / whole, rtol=1e-5, atol=0.0, equal_nan=True)
            if probes:
                expected = (probe.amax(0) - top).exp() / whole
                torch.testing.assert_close(probability, expected, rtol=1e-5, atol=0.0, equal_nan=True)
            else:
                assert probability is None
            assert inboxes.turn.tolist() == [1 - turn, 0]
            assert (world.memory[rank] == peers.NOT_THERE).all()
            for receiver in set(range(ranks)) - {rank}:
                pushed = world.place(rank, receiver, turn, parts[rank])
                torch.testing.assert_close(pushed, parts[rank], rtol=0.0, atol=0.0, equal_nan=True)


def test_rows_that_the_kernel_does_not_have():
    def rows(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype)

    x, weight, residual = rows(3, 64), rows(64), rows(3, 64)
    assert peers.takes(x, weight, residual, 256)
    assert not peers.takes(x, weight, residual, 255)  # no row fits
    assert not peers.takes(rows(3, 66), rows(66), rows(3, 66), 1 << 20)
    assert not peers.takes(rows(1, 16388), rows(16388), rows(1, 16388), 1 << 20)
    assert not peers.takes(rows(3, 65)[:, :64], weight, residual, 1 << 20)
    assert not peers.takes(x, weight, rows(64, 3).t(), 1 << 20)
    assert not peers.takes(x, weight, rows(64).expand(3, 64), 1 << 20)
    assert not peers.takes(x, rows(65)[1:], residual, 1 << 20)
    assert not peers.takes(*(t.half() for t in (x, weight, residual)), 1 << 20)
