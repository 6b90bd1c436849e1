"""A decode by Dream's published rule whose numbers break: on a model with weights, and on a GPU."""

import math

import pytest

import blockbatch
from blockbatch.decoding.graphs import StepGraphs
from blockbatch.generation import generate, open_session
from test_dream_oracle import DATA, RECORDS, settings_of


def check_broken_decodes(model):
    """NaN and infinity in a weight before the first forward, and in the middle of a decode."""
    record = RECORDS[0]
    config = blockbatch.DecodeConfig(policy="dream_published", **settings_of(record))
    weight = model.weights.layers[-1].down_weight
    kept = weight.clone()
    for value in (math.nan, math.inf):
        weight[0, 1] = value
        with pytest.raises(blockbatch.NonFiniteLogitsError, match=r"^prompt: .* in init forward 1 "):
            generate(model, record["prompt"], config)
        weight.copy_(kept)
        assert generate(model, record["prompt"], config).canvas == record["canvas"]
    session = open_session(model, record["prompt"], config)
    for _ in range(3):
        assert session.step()
    weight[0, 1] = math.nan
    with pytest.raises(blockbatch.NonFiniteLogitsError, match=r"forward \d+ \(forward 4 of all\)"):
        session.run()
    weight.copy_(kept)
    del session
    assert generate(model, record["prompt"], config).canvas == record["canvas"]


def test_broken_decodes():
    check_broken_decodes(blockbatch.load_model(DATA, device="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("graphs", [True, False])
def test_broken_decodes_on_a_gpu(monkeypatch, backend, graphs):
    if not graphs:
        monkeypatch.setattr(StepGraphs, "possible", staticmethod(lambda model: False))
    check_broken_decodes(blockbatch.load_model(DATA, device="cuda", dtype="float32", backend=backend))
