"""Traces and pictures of decodes by Dream's published rule."""

import pytest

import blockbatch
from blockbatch.generation import build_result, open_session
from blockbatch.pictures import replay
from blockbatch.pictures.states import MERGED, SYNCED, expand, held_up_to
from blockbatch.tracing import load_trace, open_recorder, save_trace, trace_header
from test_dream_oracle import DATA, RECORDS, settings_of


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model(DATA, device="cpu")


def traced(model, record, path):
    """The trace as it is read from a file, and each record's canvases and numbers of held tokens."""
    config = blockbatch.DecodeConfig(policy="dream_published", trace=True, **settings_of(record))
    session = open_session(model, record["prompt"], config)
    recorder, tokens, decoded = open_recorder(session, config), [], []
    while (step := session.step()) is not None:
        recorder.add(step)
        tokens.append(session.state.tokens.tolist())
        decoded.append(session.state.decoded.tolist())
    result = build_result(model, session, 0, recorder.traces[0])
    save_trace(path, result.trace, **trace_header(model, record["prompt"], config, result))
    return load_trace(path), tokens, decoded


@pytest.mark.parametrize("stop_on_eos", [False, True])
def test_states_of_a_trace_are_those_of_the_decode(model, stop_on_eos, tmp_path):
    seen = set()
    for record in [
        one for one in RECORDS if one["stop_on_eos"] == stop_on_eos and any(one["synced"].values())
    ][:4]:
        trace, tokens, decoded = traced(model, record, tmp_path / "trace.json")
        assert held_up_to(trace) == (tuple(model.eos_token_ids) if stop_on_eos else ())
        states = expand(trace)
        assert states.tokens.tolist() == tokens and states.decoded.tolist() == decoded
        for step, syncs in enumerate(states.syncs):
            assert {leader for _, leader in syncs} <= {states.leader[step]}
        seen |= set(states.change.flatten().tolist())
        assert '"heldUpTo":[' in replay.page(trace)
    assert {MERGED, SYNCED} <= seen


def test_the_preset_of_the_paper_is_told_as_what_it_meant(model):
    config = blockbatch.DecodeConfig.preset("paper", gen_length=32)
    result = blockbatch.generate(model, [1, 2, 3], config)
    header = trace_header(model, [1, 2, 3], config, result)
    assert (header["settings"]["policy"], header["settings"]["eos_exit"]) == ("dream_published", "none")
    by_name = blockbatch.DecodeConfig(gen_length=32, policy="dream_published")
    assert blockbatch.generate(model, [1, 2, 3], by_name).canvas == result.canvas
