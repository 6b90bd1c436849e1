"""Requests of Dynamo's frontend: how they are read, what is sent, and how those go on that have moved."""

import asyncio
import json
from types import SimpleNamespace

import pytest

import blockbatch
from blockbatch.cli import dynamo, main
from blockbatch.serving import moves
from blockbatch.serving.dynamo import Settings, Worker
from blockbatch.serving.errors import ApiError
from blockbatch.serving.reading import Reader
from serving_fakes import ScriptedEngine

ANSWER = "a b c d e f g h"
# As `dynamo.llm.exceptions` has them; the worker needs no more of the package to answer.
ERRORS = SimpleNamespace(
    **{
        name: type(name, (Exception,), {})
        for name in ("InvalidArgument", "WorkerUnavailable", "EngineShutdown", "Unknown")
    }
)


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


def asked(ids=(9, 16), max_tokens=32, **more):
    """A request with the fields that the frontend sends."""
    stop = {"max_tokens": max_tokens, "stop": None, "stop_token_ids_hidden": [1414], "ignore_eos": None}
    return {
        "model": "tiny", "token_ids": list(ids), "stop_conditions": stop,
        "sampling_options": {"n": None, "temperature": None, "seed": None, "top_k": None},
        "output_options": {"logprobs": None}, "annotations": [], "extra_args": {}, **more,
    }  # fmt: skip


def moved(request, sent, link):
    """The same request as the frontend sends it to the next worker."""
    stop = dict(request["stop_conditions"])
    if stop["max_tokens"] is not None:
        stop["max_tokens"] -= len(sent)
    ids = [*request["token_ids"], *sent]
    return {**request, "token_ids": ids, "stop_conditions": stop, "migration_link": link}


@pytest.mark.parametrize("max_tokens", [None, 40])
def test_a_request_that_moved_is_the_one_that_it_was(model, max_tokens):
    reader = Reader(model, {"gen_length": 96})
    request = asked(max_tokens=max_tokens, annotations=['blockbatch:{"preset": "careful"}'])
    request["sampling_options"]["temperature"] = 0.0
    first = moves.read(request, reader, "name")
    assert first.sent == [] and first.job.prompt == [9, 16] and first.job.branches is None
    assert first.job.limit == (max_tokens or 96)
    link = json.loads(json.dumps(moves.link(2, 6)))
    assert {key: len(value) for key, value in link.items()} == {"trace_id": 32, "span_id": 16}
    again = moves.read(moved(request, [30, 31, 32], link), reader, "name")
    assert again.sent == [30, 31, 32] and again.job.branches == 6
    assert (again.job.prompt, again.job.config, again.job.limit) == (
        first.job.prompt, first.job.config, first.job.limit,
    )  # fmt: skip


def test_a_request_keeps_its_seed(model):
    reader, request = Reader(model, {}), asked()
    request["sampling_options"]["temperature"] = 0.8
    first, other = (moves.read(request, reader, name).job.config.seed for name in ("one", "other"))
    assert first != other
    assert moves.read(moved(request, [30], moves.link(2, 1)), reader, "one").job.config.seed == first
    request["sampling_options"]["seed"] = 7
    assert moves.read(request, reader, "one").job.config.seed == 7


@pytest.mark.parametrize(
    "more, name",
    [
        ({"sampling_options": {"n": 2}}, "n"),
        ({"sampling_options": {"presence_penalty": 0.5}}, "presence_penalty"),
        ({"stop_conditions": {"ignore_eos": True}}, "ignore_eos"),
        ({"stop_conditions": {"max_tokens": 0}}, "max_tokens"),
        ({"annotations": ["blockbatch:{"]}, "annotations"),
        ({"annotations": ['blockbatch:{"threshold": 7}']}, "threshold"),
        ({"multi_modal_data": {"image_url": ["x"]}}, "prompt"),
        ({"migration_link": {"trace_id": "0" * 32, "span_id": "0" * 16}}, "migration_link"),
    ],
)
def test_what_there_is_not_is_refused(model, more, name):
    with pytest.raises(ApiError, match=name) as error:
        moves.read(asked(**more), Reader(model, {}), "name")
    assert error.value.status == 400
    assert isinstance(moves.refused(error.value, ERRORS), ERRORS.InvalidArgument)


class Context:
    """What the runtime hands to a worker with each request."""

    def __init__(self, name="name"):
        self._name, self.stopped = name, asyncio.get_running_loop().create_future()

    def id(self):
        return self._name

    def async_killed_or_stopped(self):
        return self.stopped


def run(model, engine, test, **settings):
    """Runs `test(worker)` with a worker on an engine."""

    async def inside():
        worker = Worker(model, engine, Settings("tiny", None, **settings), ERRORS)
        try:
            await test(worker)
        finally:
            await worker.bridge.stop()

    asyncio.run(inside())


async def chunks(worker, request, context=None):
    return [chunk async for chunk in worker.generate(request, context or Context())]


def test_tokens_come_once_and_a_move_skips_what_was_sent(model):
    ids = model.tokenizer.encode(ANSWER)

    async def test(worker):
        told = await chunks(worker, asked())
        assert [token for chunk in told for token in chunk["token_ids"]] == ids and len(told) > 4
        last = told[-1]
        assert last["finish_reason"] == "stop"
        assert last["completion_usage"]["completion_tokens"] == len(ids)
        assert last["completion_usage"]["prompt_tokens"] == 2
        assert last["engine_data"]["blockbatch"]["branches"] == 1
        link = told[0]["worker_trace_link"]
        for count in (0, 3, len(ids)):
            told = await chunks(worker, moved(asked(), ids[:count], link))
            assert [token for chunk in told for token in chunk["token_ids"]] == ids[count:]
            assert told[-1]["completion_usage"]["completion_tokens"] == len(ids)
        for sent in ([ids[0], ids[0]], [*ids, 9]):
            with pytest.raises(ERRORS.Unknown, match="got others"):
                await chunks(worker, moved(asked(), sent, link))
        text = worker.metrics.text().decode()
        assert 'finished_reason="stop",model_name="tiny"} 4.0' in text
        assert 'finished_reason="error",model_name="tiny"} 2.0' in text

    run(model, ScriptedEngine(model, ANSWER), test)


def test_limits_and_stop_texts_end_the_tokens(model):
    ids = model.tokenizer.encode(ANSWER)

    async def test(worker):
        told = await chunks(worker, asked(max_tokens=3))
        assert [token for chunk in told for token in chunk["token_ids"]] == ids[:3]
        assert told[-1]["finish_reason"] == "length"
        request = asked()
        request["stop_conditions"]["stop"] = ["d e"]
        told = await chunks(worker, request)
        tokens = [token for chunk in told for token in chunk["token_ids"]]
        assert told[-1]["finish_reason"] == "stop"
        assert model.tokenizer.decode(tokens).startswith("a b c") and len(tokens) < len(ids)

    run(model, ScriptedEngine(model, ANSWER, pace=2), test)


def test_who_goes_is_gone_after_one_step(model):
    engine = ScriptedEngine(model, ANSWER, delay=0.01, pace=0)

    async def test(worker):
        context = Context()
        waiting = asyncio.ensure_future(chunks(worker, asked(), context))
        while not engine.running():
            await asyncio.sleep(0.001)
        context.stopped.set_result(True)
        assert await asyncio.wait_for(waiting, 10) == [] and worker.in_flight == 0
        before = engine.steps
        while engine.running():
            await asyncio.sleep(0.001)
        assert engine.requests[0].status == "cancelled" and engine.steps <= before + 2

    run(model, engine, test)


def test_what_ends_here_goes_elsewhere(model):
    """A full queue, a worker that is told to end, an engine that breaks: another worker may take it."""
    engine = ScriptedEngine(model, ANSWER, pace=0, max_requests=1, max_queue=1)

    async def test(worker):
        kept = [asyncio.ensure_future(chunks(worker, asked(), Context(str(n)))) for n in range(2)]
        while len(engine.requests) < 2:
            await asyncio.sleep(0.001)
        with pytest.raises(ERRORS.WorkerUnavailable, match="queue"):
            await chunks(worker, asked())
        await worker.drain(0.05)
        for one in kept:
            with pytest.raises(ERRORS.WorkerUnavailable, match="it ended before the request did"):
                await one

    run(model, engine, test)

    def broken(engine):
        if engine.requests:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = ScriptedEngine(model, ANSWER)
    engine.script = broken

    async def breaks(worker):
        with pytest.raises(ERRORS.EngineShutdown):
            await chunks(worker, asked())
        assert worker.ended.is_set() and "CUDA" in str(worker.error)

    run(model, engine, breaks)


def test_the_command_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(dynamo, "find_spec", lambda name: None if name == "dynamo" else name)
    assert main(["dynamo", "tiny"]) == 2
    assert "pip install 'blockbatch[cluster]'), lacking are dynamo" in capsys.readouterr().err
    monkeypatch.setattr(dynamo, "find_spec", lambda name: name)
    assert main(["dynamo", "tiny", "--endpoint", "one.two"]) == 2
    assert "--endpoint: expected three names with dots" in capsys.readouterr().err
