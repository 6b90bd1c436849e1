"""Forwards of whole rows by CUDA graphs: which are captured, and that a replay gives what launches give.

Without a GPU a graph is stood for by the function that it captured, run again into the same results.
"""

import gc
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch.decoding import forward, graph_pool, slot_forward
from blockbatch.decoding.engine import Engine
from blockbatch.decoding.forward import block_denoise
from blockbatch.decoding.graph_pool import MAX_GRAPH_TOKENS, GraphPool
from blockbatch.decoding.graphs import StepGraphs, packed_capacity
from blockbatch.decoding.row_graphs import RowGraphs, row_capacity, row_sizes
from blockbatch.steps import HostPlan
from engine_mixes import outcome

CPU = torch.device("cpu")
MODEL = Path(__file__).parent / "data" / "conformance"
OPTIONS = [
    {"refresh_interval": 8},
    {"query_span": "open", "refresh_scope": "generation", "refresh_interval": 8},
    {"method": "dual_cache", "refresh_scope": "generation", "block_size": 8, "drafts": (1, 2)},
    {"method": "dual_cache", "block_size": 8, "temperature": 0.7, "seed": 3},
]


class AgainGraph:
    """Runs what was captured once more and writes what it gives where the capture's results lie."""

    def __init__(self, run, kept):
        self.run, self.kept, self.replays = run, kept, 0

    def replay(self):
        self.replays += 1
        again = self.run()
        for old, new in zip(self.kept or (), again or (), strict=True):
            if old is not None:
                old.copy_(new)

    def pool(self):
        return "pool"


@pytest.fixture
def stand_ins(monkeypatch):
    """Decodes on the CPU go the way of captured forwards; gives the graphs of whole rows."""
    graphs = []

    def capture(run, device, pool, *, idle=True):
        if idle:  # a block step, which must not run twice; of whole rows nobody sees it
            return AgainGraph(run, None), None, 7
        kept = run()
        if kept is not None:
            kept = bbk.Predictions(*(None if part is None else part.clone().fill_(-1) for part in kept))
        graphs.append(AgainGraph(run, kept))
        return graphs[-1], kept, 7

    monkeypatch.setattr(graph_pool, "capture", capture)
    monkeypatch.setattr(StepGraphs, "possible", staticmethod(lambda model: True))
    return graphs


def test_sizes_are_few_and_hold_what_there_is():
    for tokens in range(1, MAX_GRAPH_TOKENS + 1):
        capacity = row_capacity(tokens)
        assert tokens <= capacity <= MAX_GRAPH_TOKENS and capacity == row_capacity(capacity)
        assert capacity - tokens < (16 if tokens <= 1024 else 64)
    assert len({row_capacity(tokens) for tokens in range(1, MAX_GRAPH_TOKENS + 1)}) == 64 + 48
    assert row_capacity(5000) == 5000
    assert row_sizes(1270, 255, 1, 256) == (1280, 256, 1, True)
    assert row_sizes(1270, 64, 1, 256) == (1280, 64, 1, True)
    assert row_sizes(1270, 0, 1, 256) == (1280, 64, 1, True)
    assert row_sizes(100, 300, 2, 300) == (112, 100, 2, True)  # no more predictions than tokens
    assert row_sizes(5001, 300, 1, 256) == (5001, 256, 1, False)


def count_runs(graphs, keys):
    """Which of the calls computed, and which were replayed."""
    found = []
    for key in keys:
        before = graphs.replays
        graphs.run(key, lambda: None)
        found.append("replayed" if graphs.replays > before else "computed")
    return found


def test_the_second_forward_of_its_sizes_is_captured(stand_ins):
    graphs = RowGraphs(None, GraphPool(CPU))
    assert count_runs(graphs, "aabaab") == ["computed"] * 3 + ["replayed"] * 2 + ["computed"]
    assert count_runs(graphs, "ab") == ["replayed"] * 2
    assert graphs.pool_bytes == 2 * 7 and (graphs.runs, graphs.replays) == (8, 4)


def test_sizes_in_turns_do_not_capture_each_other_away(stand_ins):
    graphs = RowGraphs(None, GraphPool(CPU))
    counts = Counter(count_runs(graphs, list(range(20)) * 10))
    assert len(stand_ins) == 8 and counts == {"replayed": 8 * 8, "computed": 200 - 8 * 8}
    # What nobody uses any more gives way.
    assert set(count_runs(graphs, [0] * 300)) == {"replayed"}
    assert count_runs(graphs, "xxx") == ["computed", "computed", "replayed"]
    assert len(graphs._graphs) == 8


def test_without_memory_for_a_graph_forwards_run_as_they_are(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    graphs = RowGraphs(None, GraphPool(CPU))
    monkeypatch.setattr(graph_pool, "capture", full)
    assert set(count_runs(graphs, "aaaa")) == {"computed"}


def test_results_of_a_replay_stay_when_the_next_one_runs(stand_ins):
    """Of other values: rows are copied out of the memory that graphs share."""
    graphs, value = RowGraphs(None, GraphPool(CPU)), torch.zeros(3)

    def compute():
        return bbk.Predictions(value.long(), value.int(), value * 2, None)

    seen = []
    for number in range(5):
        value.fill_(number)
        seen.append(graphs.run("a", compute))
    assert [part.confidence.tolist() for part in seen] == [[2.0 * number] * 3 for number in range(5)]
    assert all(part.probe_probability is None for part in seen) and graphs.replays == 3


def load(**options):
    return blockbatch.load_model(MODEL, **{"device": "cpu", "dtype": "float32", **options})


def decodes(model, options, rounds):
    prompts = [[5, 1, 2, 9], [7] * 21, [3, 4]]
    config = blockbatch.DecodeConfig(**{"gen_length": 32, **options})
    found = []
    for _ in range(rounds):
        results = [blockbatch.generate(model, prompt, config) for prompt in prompts[:2]]
        results += blockbatch.generate(model, prompts, config)
        found.append([(result.canvas, result.nfe, result.branches) for result in results])
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decodes_by_graphs_are_those_without(stand_ins, monkeypatch, options):
    by_graphs = decodes(load(), options, 3)
    assert sum(graph.replays for graph in stand_ins) > 10
    monkeypatch.setattr(StepGraphs, "possible", staticmethod(lambda model: False))
    assert decodes(load(), options, 1) * 3 == by_graphs


def engine_outcomes(model, options, engine=None, count=8):
    engine = engine or Engine(model, max_requests=3, cache_tokens=1 << 14)
    config = blockbatch.DecodeConfig(**{"gen_length": 32, **options})
    requests = []
    for number in range(count):
        requests.append(engine.submit([5, 1, 2, 9 + number], config))
        if number < 4:  # alone, then in company
            engine.run_until_idle()
    engine.run_until_idle()
    return [outcome(request.result) for request in requests], engine


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_engine_by_graphs_decodes_as_without(stand_ins, monkeypatch, options):
    model = load()
    by_graphs, engine = engine_outcomes(model, options)
    assert sum(graph.replays for graph in stand_ins) > 1
    (slots,) = engine._lane._forwards.values()
    assert slots._row_graphs.replays > 1
    slots.forget_graphs()
    assert slots._row_graphs.replays == 0 and not slots._graphs
    monkeypatch.setattr(StepGraphs, "possible", staticmethod(lambda model: False))
    assert slot_forward.StepGraphs is StepGraphs
    assert engine_outcomes(model, options)[0] == by_graphs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_windows_beside_whole_rows_by_graphs_decode_as_without(stand_ins, monkeypatch, options):
    model = load()
    config = blockbatch.DecodeConfig(**{"gen_length": 32, **options})

    def decoded():
        engine = Engine(model, max_requests=5, max_queue=40, cache_tokens=1 << 14)
        requests = [engine.submit([5, 1, 2, 9 + number] * (1 + number % 3), config) for number in range(20)]
        engine.run_until_idle()
        (slots,) = engine._lane._forwards.values()
        return [outcome(request.result) for request in requests], slots._mixed_graphs

    by_graphs, graphs = decoded()
    assert graphs.replays > 3
    monkeypatch.setattr(StepGraphs, "possible", staticmethod(lambda model: False))
    assert decoded() == (by_graphs, None)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_on_a_gpu_replays_give_the_bits_of_launches(monkeypatch, options, quantization):
    """Two prompt lengths in turns, alone and in one batch, by graphs and launched as they are."""
    if quantization == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    model = load(device="cuda", dtype="bfloat16", quantization=quantization)
    by_graphs = decodes(model, options, 4)
    runners = [runner for runner in model.runners._idle.values() if runner.row_graphs]
    assert sum(runner.row_graphs.replays for runner in runners) > 10
    assert all(runner.nbytes > runner.batch.cache.kv.nbytes for runner in runners)
    assert graph_pool.pool_bytes(model.device) >= sum(runner.row_graphs.pool_bytes for runner in runners)
    monkeypatch.setattr(GraphPool, "capture", _never)
    monkeypatch.setattr(RowGraphs, "_has_room", lambda self: False)
    monkeypatch.setattr(StepGraphs, "run", _launch)
    assert decodes(load(device="cuda", dtype="bfloat16", quantization=quantization), options, 4) == by_graphs


def _never(*args, **options):
    raise AssertionError("expected no capture")


def _launch(graphs, tokens):
    """The step as it would be captured."""
    capacity = min(packed_capacity(tokens), graphs._most)
    block_denoise(graphs._model, graphs._batch, capacity, capacity)


@pytest.mark.gpu
def test_on_a_gpu_a_replay_finds_its_rows_where_they_are():
    """Every output of one forward, replayed and launched, for each choice of rows; the graphs in turns."""
    model = load(device="cuda", dtype="bfloat16")
    config = blockbatch.DecodeConfig(gen_length=32, block_sizes=(4, 8, 16, 32))
    session = blockbatch.generation.open_session(model, [5, 1, 2, 9], config)
    batch, graphs = session._batch, session._row_graphs
    state, plan, kv, length = batch.state, batch.plan, batch.cache.kv, 4 + 32
    rows = torch.arange(4, dtype=torch.int32, device="cuda")
    host = HostPlan([1, 2, 4 * length, 4 * 32, 0, *[0] * 4, *[length] * 4, *range(4)], 4)
    with torch.inference_mode():
        session.step()
        plan.query_start.zero_()
        plan.source_row.copy_(rows)
        plan.query_end.fill_(length)
        plan.predict.fill_(True)
        for turn in range(6):
            for first, count in ((0, 1), (2, 1), (1, 2), (0, 3), (2, 2)):
                state.tokens[:, turn] = torch.randint(3, 40, (4,), dtype=torch.int32, device="cuda")
                batch.cache.prepare(plan)
                kv.fill_(3.0)
                found = forward._predict_rows(model, batch, host, slice(first, first + count), graphs)
                written = kv.clone()
                kv.fill_(3.0)
                now = (rows >= first) & (rows < first + count)
                chunk = plan._replace(query_end=plan.query_end * now)
                sizes = row_sizes(count * length, 4 * 32, count, count * 32)
                expected = forward._predict(model, batch, chunk, sizes.tokens, sizes.predictions)
                assert int((found.target >= 0).sum()) == 32 * count
                for one, other in zip(found, expected, strict=True):
                    assert one is other or torch.equal(one, other)
                assert torch.equal(kv, written) and int((kv != 3.0).sum()) > 0
    assert graphs.replays >= 3 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_on_a_gpu_the_engine_by_graphs_decodes_as_without(monkeypatch, options):
    model = load(device="cuda")
    by_graphs, engine = engine_outcomes(model, options)
    (slots,) = engine._lane._forwards.values()
    assert slots._row_graphs.replays > 1
    # Behind graphs that are gone others are captured.
    slots.forget_graphs()
    assert engine_outcomes(model, options, engine)[0] == by_graphs
    assert slots._row_graphs.replays > 1 and slots._row_graphs.pool_bytes > 0
    monkeypatch.setattr(StepGraphs, "possible", staticmethod(lambda model: False))
    assert engine_outcomes(load(device="cuda"), options)[0] == by_graphs


@pytest.mark.gpu
def test_on_a_gpu_non_finite_logits_are_found_in_a_replay():
    model = load(device="cuda", dtype="float16")
    config = blockbatch.DecodeConfig(gen_length=32, refresh_interval=8)
    expected = [blockbatch.generate(model, [5, 1, 2, 9], config).canvas for _ in range(3)]
    (runner,) = model.runners._idle.values()
    before = runner.row_graphs.replays
    assert before > 3
    weight = model.weights.layers[0].down_weight
    kept = weight.clone()
    weight[3, 5] = float("nan")
    with pytest.raises(blockbatch.NonFiniteLogitsError, match="init forward 1"):
        blockbatch.generate(model, [5, 1, 2, 9], config)
    assert runner.row_graphs.replays >= before + 2, "the forward that failed was a replay"
    weight.copy_(kept)
    assert blockbatch.generate(model, [5, 1, 2, 9], config).canvas == expected[0] == expected[2]


class Circle:
    """Garbage that only a collection frees."""

    def __init__(self, held):
        self.held, self.itself = held, self


@pytest.mark.gpu
@pytest.mark.parametrize("idle", [True, False])
def test_on_a_gpu_graphs_that_are_garbage_stay_until_a_capture_is_over(idle):
    device = torch.device("cuda", torch.cuda.current_device())
    pool, values = GraphPool(device), torch.zeros(4, device=device)
    gc.collect()
    freed = []
    circle = Circle(pool.capture(lambda: values.add_(1), idle=idle)[0])
    weakref.finalize(circle, freed.append, True)
    del circle

    def run():
        circles = [Circle(number) for number in range(100_000)]  # as many as call for a collection
        assert len(circles) == 100_000 and not freed
        values.add_(2)

    graph, _ = pool.capture(run, idle=idle)
    assert gc.isenabled()
    gc.collect()
    assert freed
    before = values.clone()
    graph.replay()
    assert torch.equal(values, before + 2)
