"""What the processes of `rank_processes` do: each function runs on every rank."""

import functools
import importlib
import os
import threading
import time

import torch

import blockbatch
import blockbatch_kernels as bbk
import rank_processes
from blockbatch.decoding import session
from blockbatch.generation import build_result, open_session
from blockbatch.models.checkpoint import load_weights, read_config, read_spec
from blockbatch.models.safetensors_file import ITEM_SIZES
from blockbatch.parallel import RankGroup, Shard
from blockbatch.parallel.lanes import Lanes

CONFORMANCE = os.path.join(os.path.dirname(__file__), "data", "conformance")


def place():
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@functools.cache
def model_of(name, dtype="float32", **options):
    options = dict(device=rank_processes.DEVICE, dtype=dtype, tensor_parallel=place()[1], **options)
    return blockbatch.load_model(name, **options)


def load(name, **options):
    blockbatch.load_model(name, **{"device": "cpu", "tensor_parallel": place()[1], **options})


def decode(name, prompt, options, dtype="float32", **more):
    """What a decode ends with; of several prompts each."""
    config = blockbatch.DecodeConfig(**options)
    return outcomes(blockbatch.generate(model_of(name, dtype, **more), prompt, config))


def outcomes(results):
    """The parts of results that no clock has a say in."""
    if isinstance(results, list):
        return [outcomes(result) for result in results]
    return (
        results.canvas,
        results.text,
        list(results.nfe.__dict__.values()),
        results.stop_reason,
        [(branch.block_size, branch.committed, branch.merged, branch.synced) for branch in results.branches],
    )


def decode_all(name, cases):
    return [decode(name, prompt, options) for prompt, options in cases]


def stream(name, prompt, options):
    return list(blockbatch.stream(model_of(name), prompt, blockbatch.DecodeConfig(**options)))


def logits(name, ids):
    return model_of(name).logits(ids)


def logits_of(name, ids, **options):
    """Those of a model that is loaded with these options."""
    size = place()[1]
    return blockbatch.load_model(name, device="cpu", tensor_parallel=size, **options).logits(ids)


def scales_of(name):
    """Of K and of V in e4m3, those of this rank's heads."""
    model = blockbatch.load_model(name, device="cpu", tensor_parallel=place()[1], kv_dtype="fp8")
    return model.kv_scales.k, model.kv_scales.v


def fill(name, text):
    """The tokens of a text whose gaps are filled."""
    return blockbatch.fill(model_of(name), text, blockbatch.DecodeConfig(method="blockbatch")).tokens


def log_likelihood(name, prompt, answer):
    return model_of(name).log_likelihood(prompt, answer, samples=8)


def check_records(module, test, records, folder, indices, **options):
    """A test module's own test of its records, on the model of the ranks."""
    module = importlib.import_module(module)
    for index in indices:
        getattr(module, test)(model_of(folder, **options), getattr(module, records)[index])


def bytes_read(folder):
    """Bytes that this rank's reading of the weights asked the system for, and bytes that its part has."""
    rank, size = place()
    shard = Shard(read_spec(read_config(folder)), rank, size)
    before = _read_so_far()
    weights = load_weights(folder, shard.local_spec, "cpu", torch.float32, shard=shard)
    read = _read_so_far() - before
    tensors = [weights.embedding, weights.final_norm, weights.lm_head]
    tensors += [tensor for layer in weights.layers for tensor in vars(layer).values() if tensor is not None]
    stored = ITEM_SIZES["BF16"] if "checkpoint" in os.path.basename(folder) else ITEM_SIZES["F32"]
    return read, sum(tensor.numel() for tensor in tensors) * stored


def _read_so_far():
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("rchar:"))


def diverge(name, at_forward, prompt, options):
    """A decode whose last rank holds another token from some forward on: how far each rank comes."""
    model = blockbatch.load_model(name, device=rank_processes.DEVICE, tensor_parallel=place()[1])
    session = open_session(model, prompt, blockbatch.DecodeConfig(**options))
    rank, size = place()
    forwards = 0
    try:
        while session.step() is not None:
            forwards += 1
            if forwards == at_forward and rank == size - 1:
                session.state.committed[0] += 1
    except blockbatch.RankError as error:
        return forwards, str(error)
    return forwards, outcomes(build_result(model, session, 0))


def break_off(name, at_forward, prompt, options, how):
    """A decode in which the last rank fails within a forward."""
    model = blockbatch.load_model(name, device=rank_processes.DEVICE, tensor_parallel=place()[1])
    predict, forwards = model.predict, 0

    def failing(*args, **more):
        nonlocal forwards
        forwards += 1
        if forwards == at_forward and place()[0] == place()[1] - 1:
            if how == "dies":
                os._exit(9)
            raise MemoryError("expected room for this test, got none")
        return predict(*args, **more)

    model.predict = failing
    session = open_session(model, prompt, blockbatch.DecodeConfig(**options))
    session.run()


def poison(name, prompt, options, dtype="float32"):
    """A decode of a model one of whose ranks holds a NaN: in its part of a product, or of the LM head."""
    errors = []
    for field in ("down_weight", "lm_head"):
        model = blockbatch.load_model(name, device=rank_processes.DEVICE, tensor_parallel=place()[1])
        weights = model.weights.layers[1] if field == "down_weight" else model.weights
        if place()[0] == place()[1] - 1:
            getattr(weights, field)[3, 2] = float("nan")
        try:
            blockbatch.generate(model, prompt, blockbatch.DecodeConfig(**options))
        except blockbatch.NonFiniteLogitsError as error:
            errors.append(str(error))
        # Nobody waits for anybody, and the model runs on.
        errors.append(model.logits([[1, 2, 3]]).shape)
    return errors


def sums(dtype):
    """Sums of random numbers by the group's all-reduce, and the parts they are of."""
    group = model_of(CONFORMANCE).share.group
    random = torch.Generator().manual_seed(place()[0])
    part = torch.randn(7, 384, generator=random).to(dtype)
    return part, group.all_reduce(part.clone())


def disagree(name):
    """Ranks that were given different prompts."""
    model = blockbatch.load_model(name, device=rank_processes.DEVICE, tensor_parallel=place()[1])
    blockbatch.generate(
        model, [1, 2, 3 + place()[0]], blockbatch.DecodeConfig(gen_length=8, block_sizes=(4,))
    )


def keep_waiting():
    """The last rank does not come where the others wait for it."""
    group = RankGroup(torch.device("cpu"), torch.float32, stall_seconds=1.0)
    if place()[0] == place()[1] - 1:
        group.watch.wait_for_failure(60.0)
        group.watch.check()
    group.exchange("a meeting")


def wait_in_a_call():
    """The last rank dies while the others are in a call that nothing breaks."""
    group = RankGroup(torch.device("cpu"), torch.float32)
    if place()[0] == place()[1] - 1:
        os._exit(9)
    with group.forward("a forward"):
        time.sleep(120.0)


def be_elsewhere():
    """Ranks that make different calls."""
    group = RankGroup(torch.device("cpu"), torch.float32)
    group.exchange(f"place {place()[0]}")


def two_threads():
    """A second thread that enters a forward while the first is in one."""
    group, errors = RankGroup(torch.device("cpu"), torch.float32), []

    def enter():
        try:
            with group.forward("another"):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with group.forward("one"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    return errors


def steps(name, prompt, options):
    """The phases of a decode."""
    session, phases = open_session(model_of(name), prompt, blockbatch.DecodeConfig(**options)), []
    while (step := session.step()) is not None:
        phases.append(step.phase)
    return phases


def transport_of(name):
    return model_of(name).share.group.transport


@functools.cache
def group_of(transport, dtype):
    return RankGroup(torch.device("cuda", place()[0]), dtype, transport=transport)


def sums_on_gpus(transport, dtype, counts):
    """Checks sums of random numbers, and returns digests of their bits."""
    device, found = torch.device("cuda", place()[0]), []
    torch.cuda.set_device(device)
    group = group_of(transport, dtype)
    for count in counts:
        parts = [
            torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(device, dtype)
            for rank in range(group.size)
        ]
        expected = functools.reduce(torch.add, parts)
        mine, graph = parts[group.rank], torch.cuda.CUDAGraph()
        total = group.all_reduce(mine.clone()).clone()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = group.all_reduce(mine.clone()).clone()
        for _ in range(3):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, total)
        assert torch.equal(total, expected), count  # of two ranks, any order gives these bits
        found.append(total.view(torch.int32 if dtype.itemsize == 4 else torch.int16).long().sum().item())
    return found


def collect_on_gpus(transport):
    """Checks that every rank gets what each gave, bit for bit."""
    device = torch.device("cuda", place()[0])
    torch.cuda.set_device(device)
    group = group_of(transport, torch.bfloat16)
    for rows in (1, 7, 128, 3000, 20000, 5 << 20):  # the last ones are more than a buffer holds
        parts = [
            torch.randn(rows, 4, generator=torch.Generator().manual_seed(rank)).to(device)
            for rank in range(group.size)
        ]
        parts[1][0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 126463.0])
        for dtype in (torch.float32, torch.bfloat16):
            given = [part.to(dtype) for part in parts]
            found = group.all_gather(given[group.rank])
            torch.testing.assert_close(found, torch.stack(given), rtol=0.0, atol=0.0, equal_nan=True)
            if rows <= 20000:
                replayed(group, given)


def replayed(group, given):
    """The same within a graph that is replayed with other numbers."""
    mine, graph = given[group.rank].clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = [group.all_gather(mine), group.all_gather(mine + 1)]
    for turn in range(3):
        mine.copy_(given[group.rank] * 2**turn)
        graph.replay()
        for found, more in zip(captured, (0, 1), strict=True):
            expected = torch.stack(given) * 2**turn + more
            torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def decode_by_lanes(name, prompt, options):
    """A decode by one lane and by two of small pieces of whole rows; how many went into the second."""
    model, found, entered = model_of(name, "float32"), [], []
    usual, session.ROW_TOKENS = session.ROW_TOKENS, dict.fromkeys(session.ROW_TOKENS, 100)
    one = model.share._lanes
    two = Lanes(model.share.group, 2)
    through = model.share.group.through
    model.share.group.through = lambda transport: (entered.append(1), through(transport))[1]
    try:
        for model.share._lanes in (one, two, two):
            found.append(decode(name, prompt, options))
    finally:
        model.share._lanes, session.ROW_TOKENS = one, usual
        del model.share.group.through
    assert found[0] == found[1] == found[2]
    return found[0], len(entered)


def norm_inputs(dtype, tokens=7, dim=384, device="cpu"):
    """A weight, and the residual that a norm of a sum is added to."""
    residual = torch.linspace(-3, 3, tokens * dim).view(tokens, dim)
    return torch.linspace(0.5, 2, dim).to(device, dtype), residual.to(device, dtype)


def norms(dtype, quantized):
    """The norm of a sum over the ranks: this one's part, what comes out, and the residual."""
    group = model_of(CONFORMANCE).share.group
    part = torch.randn(7, 384, generator=torch.Generator().manual_seed(place()[0])).to(dtype)
    weight, residual = norm_inputs(dtype)
    rows = group.all_reduce_norm(part.clone(), weight, residual, eps=1e-5, quantized=quantized)
    return part, rows, residual


def norms_on_gpus(dtype, quantized, sizes):
    """Checks norms of sums against the two steps, as they are and captured; digests of all bits."""
    device, found, rank = torch.device("cuda", place()[0]), [], place()[0]
    torch.cuda.set_device(device)
    group = group_of("symmetric", dtype)
    assert group._transport.inboxes is not None
    norm = bbk.rms_norm_fp8 if quantized else bbk.rms_norm
    for tokens, dim in sizes:
        part = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(rank)).to(device, dtype)
        weight, before = norm_inputs(dtype, tokens, dim, device)
        right = before.clone()
        rows = norm(group.all_reduce(part.clone()), weight, eps=1e-5, residual=right)
        expected = [*rows, right] if quantized else [rows, right]
        held = before.clone()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
        rows = group.all_reduce_norm(part, weight, held, eps=1e-5, quantized=quantized)
        torch.use_deterministic_algorithms(False)
        results = [[*rows, held] if quantized else [rows, held]]
        graph, again = torch.cuda.CUDAGraph(), before.clone()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            again.copy_(before)
            for _ in range(3):  # an odd number: the turn is not that of the capture
                again.copy_(before)
                rows = group.all_reduce_norm(part, weight, again, eps=1e-5, quantized=quantized)
        for _ in range(4):
            for tensor in rows if quantized else [rows]:
                tensor.view(torch.uint8).fill_(255)
            graph.replay()
            results.append([*rows, again] if quantized else [rows, again])
            torch.cuda.synchronize()
        for tensors in results:
            for tensor, right in zip(tensors, expected, strict=True):
                assert torch.equal(tensor.view(torch.uint8), right.view(torch.uint8)), (tokens, dim)
        found.append([tensor.view(torch.uint8).long().sum().item() for tensor in results[-1]])
    return found
