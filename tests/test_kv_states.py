"""What a trace keeps of the K/V cache."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import blockbatch
from blockbatch.cli import main
from blockbatch.decoding import Step
from blockbatch.generation import open_session
from blockbatch.kv_cache import KVCache
from blockbatch.tracing import TraceRecorder, open_recorder
from blockbatch.tracing.kv_states import SKETCH_SIZE, KVSketcher
from plot_traces import PROMPT


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


def make_cache(rows=2, length=24, dtype=torch.float32):
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "dtype": dtype, "device": torch.device("cpu")}
    cache = KVCache(1, rows, length, page_size=8, **sizes)
    generator = torch.Generator().manual_seed(0)
    cache.kv.copy_(torch.randn(cache.kv.shape, generator=generator))
    cache.page_table.copy_(torch.arange(cache.page_table.numel()).view_as(cache.page_table))
    return cache


def test_sketch_depends_on_what_a_row_holds_alone():
    cache = make_cache(rows=3)
    cache.page_table[2] = cache.page_table[0]
    cache.kv[:, :, cache.page_table[1].long()] = cache.kv[:, :, cache.page_table[0].long()]
    cache.kv[:, :, cache.page_table[1, 2].long(), 4:] = 77.0  # behind a canvas of 20 tokens
    groups = KVSketcher(cache, [20]).states([0, 1, 2])
    assert [rows for rows, _ in groups] == [[0, 2], [1]] and groups[0][1] == groups[1][1]
    assert len(groups[0][1]) == SKETCH_SIZE
    cache.kv[2, 1, cache.page_table[1, 2].long(), 3] += 0.1
    assert KVSketcher(cache, [20]).states([1])[0][1] != groups[1][1]


def test_sketch_is_linear_and_keeps_lengths():
    cache = make_cache(rows=3)
    page = cache.page_table.long()
    cache.kv[:, :, page[2]] = cache.kv[:, :, page[0]] - 2 * cache.kv[:, :, page[1]]
    one, two, both = (np.array(state) for _, state in KVSketcher(cache, [24]).states([0, 1, 2]))
    assert both == pytest.approx(one - 2 * two, rel=1e-4, abs=1e-3)
    for row, sketch in enumerate((one, two, both)):
        length = float(torch.linalg.vector_norm(cache.kv[:, :, page[row]].float()))
        # The variance of a squared length is about 2 / SKETCH_SIZE: 25% are some four deviations of a length.
        assert np.linalg.norm(sketch) == pytest.approx(length, rel=0.25)
    assert abs(one @ two) < 0.4 * np.linalg.norm(one) * np.linalg.norm(two)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_traces_follow_the_cache_and_change_no_decode(device):
    model = blockbatch.load_model("tiny", device=device)
    options = {"gen_length": 32, "threshold": 0.97, "sync_threshold": 2}
    config = blockbatch.DecodeConfig(**options, trace=True, trace_kv=True)
    session = open_session(model, model.tokenizer.encode(PROMPT), config)
    recorder = open_recorder(session, config)
    sketcher = KVSketcher(session.cache, [len(model.tokenizer.encode(PROMPT)) + 32])
    held = {}
    while (step := session.step()) is not None:
        recorder.add(step)
        for entry in recorder.traces[0][-1]["kv"]:
            held.update(dict.fromkeys(entry["branches"], entry["state"]))
        rows = sketcher.states(list(range(session.state.num_branches)))
        assert {branch: state for branches, state in rows for branch in branches} == held
    plain = blockbatch.generate(model, PROMPT, blockbatch.DecodeConfig(**options))
    assert plain.canvas == session.state.tokens[session.state.winner[0]].tolist()
    kinds = [one["kind"] for one in recorder.traces[0]]
    assert kinds.count("block") > 3 and len(recorder.traces[0][0]["kv"]) == 1


def test_a_branch_that_only_follows_gets_its_new_state():
    cache = make_cache(rows=2)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    state = SimpleNamespace(num_branches=2, num_requests=1, prompt_length=torch.tensor([20]), gen_length=4)
    state.top_token = state.confidence = torch.zeros(2, 4)
    recorder = TraceRecorder(state, cache)
    for source_row, sync_source, expected in (
        ([0, 0], [0, 1], [[0], [1]]),
        ([0, -1], [0, 1], [[0]]),
        ([0, -1], [0, 0], [[0, 1]]),
    ):
        cache.share(torch.tensor(sync_source, dtype=torch.int32))
        plan = SimpleNamespace(source_row=source_row, query_lengths=[4, 4])
        events = SimpleNamespace(committed=nothing, merged=nothing, sync_source=torch.tensor(sync_source))
        recorder.add(Step("block", plan, [(0, 4)] * 2, events, 0.0))
        assert [entry["branches"] for entry in recorder.traces[0][-1]["kv"]] == expected


def test_each_request_of_a_batch_has_the_states_that_it_has_alone(model):
    config = blockbatch.DecodeConfig(gen_length=16, trace=True, trace_kv=True)
    alone = blockbatch.generate(model, "1+2=", config)
    together = blockbatch.generate(model, [PROMPT, "1+2="], config)[1]
    for one, other in zip(alone.trace, together.trace, strict=True):
        for mine, theirs in zip(one["kv"], other["kv"], strict=True):
            assert mine["branches"] == theirs["branches"]
            assert mine["state"] == pytest.approx(theirs["state"], rel=1e-3, abs=1e-2)


def test_trace_kv_needs_a_trace(capsys):
    with pytest.raises(ValueError, match="trace_kv"):
        blockbatch.DecodeConfig(trace_kv=True)
    with pytest.raises(TypeError, match="trace_kv"):
        blockbatch.DecodeConfig(trace=True, trace_kv=1)
    assert main(["generate", "--prompt", "1", "--trace-kv"]) == 2
    assert "--trace-kv" in capsys.readouterr().err
