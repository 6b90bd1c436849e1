"""Traces of open queries and of drafts: what their records say, against the decode; and files of before."""

import json
import re
from pathlib import Path

import pytest

import blockbatch
from blockbatch import generation
from blockbatch.cli import main
from blockbatch.decoding import Session
from blockbatch.pictures import consensus
from blockbatch.pictures.states import expand
from blockbatch.tracing import TraceRecorder, load_trace, open_recorder, replay
from blockbatch.tracing.file import check_trace
from picture_traces import decode, handmade, problem, record, write
from plain_models import write_dream

OLD = Path(__file__).parent / "data" / "old_trace.json"
DRAFTED = {"method": "dual_cache", "gen_length": 64, "threshold": 0.99, "drafts": (1, 2, 4)}
OPEN = {"gen_length": 64, "query_span": "open", "refresh_interval": 16, "refresh_scope": "generation"}


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


def test_a_file_of_before(tmp_path):
    """Written before records knew of queries and drafts."""
    trace = load_trace(OLD)
    assert not any({"queries", "drafts", "query_positions"} & set(one) for one in trace["trace"])
    assert trace["adopted"] is None
    canvases = replay(trace["trace"], 2, 16, trace["mask_token_id"])
    assert canvases[trace["block_sizes"].index(trace["winner_block_size"])] == trace["canvas"]
    assert expand(trace).tokens[-1].tolist() == canvases
    assert main(["picture", "replay", str(OLD), "--out", str(tmp_path / "old.html")]) == 0
    consensus.draw(trace, tmp_path / "old.png")


def read(session, config):
    """The trace of a session, and every step with what the policy was asked and what it held before."""
    recorder, steps = open_recorder(session, config), []
    before = session.state.tokens.clone()
    while (step := session.step()) is not None:
        recorder.add(step)
        steps.append((step, before))
        before = session.state.tokens.clone()
    return recorder.traces, steps


@pytest.mark.parametrize("dream", [False, True])
@pytest.mark.parametrize("method", ["blockbatch", "dual_cache"])
def test_open_queries(model, method, dream, tmp_path):
    if dream:
        write_dream(tmp_path, sharpness=3.0)
        model = blockbatch.load_model(tmp_path, device="cpu")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    if not dream:
        prompts = [model.tokenizer.encode(problem(family, 2).prompt) for family in ("arithmetic", "symbolic")]
    options = {**OPEN, "eos_exit": "none", "trace": True, "method": method, "threshold": 0.99}
    if method != "blockbatch":
        del options["refresh_interval"]
    config = blockbatch.DecodeConfig(**options)
    session = generation._session(model, prompts, config)
    (_, trace), steps = read(session, config)
    mask, count = model.spec.mask_token_id, session.state.num_branches
    steps = [
        (step, before)
        for step, before in steps
        if any(step.plan.source_row[i] >= 0 for i in range(count, 2 * count))
    ]
    stale_seen = 0
    for one, (step, before) in zip(trace, steps, strict=True):
        lengths = step.plan.query_lengths[count:]
        assert one["queries"] == [lengths[row] for row in one["rows"]]
        assert one["packed_tokens"] == sum(one["queries"])
        assert ("query_positions" in one) == (one["kind"] == "block")
        if one["kind"] != "block":
            continue
        for row, window, positions, stale in zip(
            one["rows"], one["windows"], one["query_positions"], one["query_stale"], strict=True
        ):
            assert len(positions) == lengths[row] and positions == sorted(set(positions))
            held = before[count + row].tolist()
            masked = {place - dream for place in range(*window) if held[place] == mask}
            assert set(positions) == masked | set(stale)
            assert all(held[place] != mask for place in stale)
            stale_seen += len(stale)
    assert stale_seen > 10
    if dream:
        assert any(-1 in positions for one in trace for positions in one.get("query_positions", []))


def test_no_copies_for_what_nobody_looks_at(model, monkeypatch):
    monkeypatch.setattr(Session, "_open_queries", None)
    prompt, config = problem("symbolic", 2).prompt, blockbatch.DecodeConfig(**OPEN, threshold=0.99)
    assert blockbatch.generate(model, prompt, config).nfe.block > 3


def test_drafts(model):
    config = blockbatch.DecodeConfig(**DRAFTED, trace=True)
    prompts = [problem(family, 2).prompt for family in ("arithmetic", "symbolic")]
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    session = generation._session(model, ids, config)
    traces, _ = read(session, config)
    several = 0
    for request, trace in enumerate(traces):
        result = generation.build_result(model, session, request)
        held = [model.spec.mask_token_id] * 64
        assert len(trace) == result.nfe.total
        assert sum(one["adopted"] for one in trace) == result.adopted > 5
        for one in trace:
            assert one["rows"] == [0] and one["syncs"] == []
            assert one["packed_tokens"] == one["queries"][0] + sum(
                draft["queries"] for draft in one["drafts"]
            )
            written = {p: t for c in one["commits"] for p, t in zip(c["positions"], c["tokens"])}
            matches = []
            for draft in one["drafts"]:
                assert draft["length"] == len(draft["positions"]) and draft["queries"] == one["queries"][0]
                assert all(held[position] == model.spec.mask_token_id for position in draft["positions"])
                guess = dict(zip(draft["positions"], draft["tokens"]))
                matches.append(guess.items() <= written.items())
                if draft["length"] == one["adopted_length"]:
                    assert matches[-1], "what an adopted draft held was written"
            assert one["adopted"] <= sum(matches)
            assert (one["adopted"] > 0) == (one["adopted_length"] is not None)
            several += one["adopted"] > 1
            assert one["kind"] == "block" or one["drafts"] == []
            for position, token in written.items():
                held[position] = token
        assert held == result.canvas == replay(trace, 1, 64, model.spec.mask_token_id)[0]
    assert several, "some turn adopts more than one draft"


def test_a_drafted_file_and_its_states(model, tmp_path):
    trace, tokens, _ = decode(model, problem("symbolic", 4), **DRAFTED)
    loaded = load_trace(write(tmp_path / "trace.json", trace))
    assert loaded["trace"] == trace["trace"] and loaded["block_sizes"] == [32]
    assert loaded["adopted"] == sum(one["adopted"] for one in loaded["trace"]) > 0
    assert expand(loaded).tokens[:, 0].tolist() == [step[0] for step in tokens]
    guessed = {token for one in loaded["trace"] for draft in one["drafts"] for token in draft["tokens"]}
    assert guessed <= set(loaded["pieces"])
    with pytest.raises(ValueError, match="several branches"):
        consensus.draw(loaded, tmp_path / "a.png")


def test_where_the_cache_goes_with_drafts(model):
    """Every forward leaves one state, that of the branch: where it adopts a draft, the draft's."""
    options = {**DRAFTED, "gen_length": 32, "trace": True, "trace_kv": True}
    config = blockbatch.DecodeConfig(**options)
    prompt = problem("arithmetic", 2).prompt
    drafted = blockbatch.generate(model, prompt, config)
    plain = blockbatch.generate(model, prompt, blockbatch.DecodeConfig(**{**options, "drafts": None}))
    states, tokens = [one["kv"] for one in drafted.trace], 0
    assert all([entry["branches"] for entry in kv] == [[0]] for kv in states)
    # The undrafted decode passes through every state that the drafted one stops at.
    place = 0
    for kv, one in zip(states, drafted.trace):
        place += one["adopted"]
        assert kv[0]["state"] == pytest.approx(plain.trace[place]["kv"][0]["state"], rel=1e-2, abs=2e-2)
        place += 1
        tokens += one["adopted"]
    assert tokens > 3 and place == len(plain.trace)


def broken(change):
    one = record("block", {0: (0, 4)})
    one |= {"queries": [4], "query_positions": [[0, 1, 2, 3]], "query_stale": [[0]]}
    one |= {"drafts": [{"length": 1, "queries": 4, "positions": [2], "tokens": [5]}]}
    one |= {"adopted": 1, "adopted_length": 1}
    trace = [record("init", {0: (0, 4)}), one]
    content = {"block_sizes": [4], "winner_block_size": None}
    handmade(trace=json.loads(json.dumps(trace)), **content)
    change(one)
    return {**handmade(), **content, "pieces": {}, "trace": trace}


BAD = {
    "queries: [4, 4] for 1 rows": lambda one: one["queries"].append(4),
    "queries: 'x' where": lambda one: one.update(queries=["x"]),
    "query_positions: [] for 1 rows": lambda one: one.update(query_positions=[]),
    "query_positions: -2 where": lambda one: one.update(query_positions=[[-2]]),
    "query_stale: 4 where": lambda one: one.update(query_stale=[[4]]),
    "drafts: 1": lambda one: one.update(drafts=1),
    "length: 0 where": lambda one: one["drafts"][0].update(length=0),
    "tokens: 0 for 1 positions": lambda one: one["drafts"][0].update(tokens=[]),
    "adopted: 2 where": lambda one: one.update(adopted=2),
    "adopted_length: 3": lambda one: one.update(adopted_length=3),
}


@pytest.mark.parametrize("message", BAD)
def test_records_that_contradict_themselves(message):
    with pytest.raises(ValueError, match="record 1: " + re.escape(message)):
        check_trace(broken(BAD[message]))


def test_a_recorder_of_a_batch_is_told_of_drafts(model):
    session = generation._session(model, [[1, 2]], blockbatch.DecodeConfig(**DRAFTED))
    assert open_recorder(session, blockbatch.DecodeConfig(**DRAFTED)) is None
    assert TraceRecorder(session.state, drafts=(1, 2, 4)).traces == [[]]
