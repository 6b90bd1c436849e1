"""The built-in model through the public interface: recorded decodes, batches, streams."""

import json

import pytest

import blockbatch
from blockbatch import tiny
from tiny_decodes import RECORDED, config, decode, problems


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def records():
    return json.loads(RECORDED.read_text())


def test_size(model):
    weights = model.weights
    parameters = weights.embedding.numel() + weights.lm_head.numel() + weights.final_norm.numel()
    for layer in weights.layers:
        parameters += sum(value.numel() for value in vars(layer).values() if value is not None)
    assert parameters <= 20_000_000


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_decodes_are_the_recorded_ones(model, records, method):
    recorded = [record for record in records if record["method"] == method]
    assert len(recorded) == len(problems())
    for problem, expected in zip(problems(), recorded, strict=True):
        assert decode(model, problem, method) == expected


def test_recorded_decodes_show_what_blockbatch_is_for(records):
    """Fewer forwards than the dual cache at no fewer right answers than it may lose by chance."""
    forwards, right = {}, {}
    for record in records:
        forwards[record["method"]] = forwards.get(record["method"], 0) + sum(record["nfe"])
        right[record["method"]] = right.get(record["method"], 0) + record["right"]
    assert forwards["blockbatch"] < forwards["dual_cache"] < forwards["vanilla"]
    assert right["vanilla"] > 0 and right["blockbatch"] > 0


def test_batch_equals_single(model):
    some = problems()[::2]
    together = blockbatch.generate(model, [problem.prompt for problem in some], config("blockbatch"))
    for problem, result in zip(some, together, strict=True):
        alone = blockbatch.generate(model, problem.prompt, config("blockbatch"))
        assert (result.canvas, result.nfe, result.text) == (alone.canvas, alone.nfe, alone.text)


def test_stream_equals_generate(model):
    problem = problems()[0]
    pieces = list(blockbatch.stream(model, problem.prompt, config("blockbatch")))
    assert "".join(pieces) == blockbatch.generate(model, problem.prompt, config("blockbatch")).text
    assert len(pieces) > 1


def test_a_right_answer_is_accepted_and_a_spoiled_one_is_not():
    for problem in problems():
        assert tiny.check(problem, problem.answer)
        assert not tiny.check(problem, problem.answer[: len(problem.answer) // 2])
