"""What happens to requests of the engine beside being decoded: they wait, are refused, cancelled or fail."""

import random
import threading

import pytest

import blockbatch
from blockbatch.decoding.engine import (
    Engine,
    EngineClosedError,
    QueueFullError,
    RequestTooLargeError,
)
from engine_mixes import outcome, pages_in_use, random_prompt, scripted
from oracle import ScriptedModel
from scripted_engine import EngineScripted
from test_non_finite import engine as breaking

CONFIG = blockbatch.DecodeConfig(gen_length=16, block_sizes=(4, 8))


@pytest.fixture
def model():
    return scripted(3)


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


def new_engine(model, **options):
    return Engine(model, **{"max_requests": 4, "cache_tokens": 4096, **options})


def test_a_cancelled_request_leaves_before_the_next_forward(model):
    engine = new_engine(model, max_requests=2)
    news = []
    first, second, third = (
        engine.submit([1, 2, number], CONFIG, on_update=lambda request: news.append(request.id))
        for number in range(3)
    )
    engine.step()
    assert (first.status, second.status, third.status) == ("running", "running", "queued")
    held = pages_in_use(engine)
    engine.cancel(second)
    engine.cancel(second)
    assert second.status == "running"
    forwards = second.nfe
    engine.step()
    assert second.status == "cancelled" and second.nfe == forwards and second.result is None
    assert third.status == "running" and third.nfe.init == 1, "it took the place in the same step"
    assert pages_in_use(engine) <= 2 * held and news.count(second.id) == 2
    engine.run_until_idle()
    engine.cancel(first)  # has ended
    assert not engine.step() and first.status == third.status == "finished"
    assert pages_in_use(engine) == 0 and engine.stats().cache_usage == 0
    assert outcome(first.result) == outcome(blockbatch.generate(model, [1, 2, 0], CONFIG))


def test_a_waiting_request_can_be_cancelled(model):
    engine = new_engine(model, max_requests=1)
    running, waiting = engine.submit([1], CONFIG), engine.submit([2], CONFIG)
    engine.step()
    engine.cancel(waiting)
    engine.step()
    assert waiting.status == "cancelled" and waiting.started is None and waiting.finished is not None
    engine.run_until_idle()
    assert running.status == "finished"


def test_many_short_requests_leave_all_pages_free(model):
    rng, engine = random.Random(0), new_engine(model, max_requests=16, max_queue=500)
    configs = [
        blockbatch.DecodeConfig(gen_length=4, block_sizes=(2, 4), threshold=0.3),
        blockbatch.DecodeConfig(gen_length=4, block_sizes=(4,), threshold=0.3),
        blockbatch.DecodeConfig(method="dual_cache", gen_length=4, threshold=0.3, drafts=(1,)),
    ]
    requests = []
    for _ in range(500):
        prompt = random_prompt(rng, model.spec.vocab_size, longest=12)
        requests.append(engine.submit(prompt, rng.choice(configs)))
    engine.run_until_idle()
    stats = engine.stats()
    assert stats.finished == 500 and (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0.0)
    assert pages_in_use(engine) == 0
    assert all(request.status == "finished" for request in requests)
    assert engine._seats == {} and engine._lane._seats == []


def test_layouts_that_nobody_uses_are_dropped(model):
    engine = new_engine(model, max_requests=2)
    for number in range(12):
        config = blockbatch.DecodeConfig(
            method="dual_cache", gen_length=8, drafts=(1,), threshold=0.3 + number / 20
        )
        request = engine.submit([number], config)
        engine.run_until_idle()
        assert outcome(request.result) == outcome(blockbatch.generate(model, [number], config))
    assert len(engine._lane._forwards) <= 4


def test_the_queue_overflows(model):
    engine = new_engine(model, max_requests=1, max_queue=2)
    requests = [engine.submit([number], CONFIG) for number in range(3)]
    with pytest.raises(QueueFullError, match="expected fewer than 2 requests waiting, got 2") as full:
        engine.submit([4], CONFIG)
    assert full.value.retry_after >= 1
    engine.step()
    with pytest.raises(QueueFullError):
        engine.submit([4], CONFIG)
    engine.run_until_idle()
    assert engine.submit([4], CONFIG).status == "queued"
    engine.run_until_idle()
    assert [request.status for request in requests] == ["finished"] * 3


def test_a_request_that_never_fits_is_refused(model):
    engine = new_engine(model, cache_tokens=64)  # four pages
    with pytest.raises(RequestTooLargeError, match=r"at most 4 pages .* got 10 tokens and gen_length = 16"):
        engine.submit(list(range(10)) * 1, blockbatch.DecodeConfig(gen_length=16, block_sizes=(2, 4, 8)))
    small = engine.submit([1, 2], CONFIG)
    engine.run_until_idle()
    assert small.status == "finished"


BAD = [
    (dict(prompt="text"), TypeError, "prompt: expected token ids"),
    (dict(prompt=[1, 2.5]), TypeError, "prompt: expected token ids"),
    (dict(prompt=[1, 99]), ValueError, "prompt: expected ids from 0 to 22, got 99 at 1"),
    (dict(prompt=[22]), ValueError, "prompt: expected no MASK token"),
    (dict(prompt=[1], branches=3), ValueError, "branches: expected a number from 1 to 2, got 3"),
    (dict(prompt=[1], branches=0), ValueError, "branches: expected a number from 1 to 2, got 0"),
    (dict(prompt=[1], stop="x"), ValueError, "stop: expected a model with a tokenizer"),
    (dict(prompt=[1] * 4090), ValueError, "prompt: expected prompt and gen_length to fit"),
]


@pytest.mark.parametrize("given, error, message", BAD, ids=lambda value: str(value)[:30])
def test_bad_requests_are_refused_before_any_work(model, given, error, message):
    engine = new_engine(model)
    with pytest.raises(error, match=message):
        engine.submit(given.pop("prompt"), CONFIG, **given)
    assert not engine.step() and engine.stats().waiting == 0


def test_traces_are_refused(model):
    with pytest.raises(ValueError, match="config.trace: expected False"):
        new_engine(model).submit([1], blockbatch.DecodeConfig(gen_length=8, trace=True))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_requests=0), "max_requests: expected an integer of at least 1, got 0"),
        (dict(max_queue=-1), "max_queue: expected an integer of at least 0, got -1"),
        (dict(branches="many"), "branches: expected one of fixed, load, got 'many'"),
        (dict(max_tokens_per_step=0), "max_tokens_per_step: expected an integer of at least 1, got 0"),
        (dict(cache_tokens="1"), "cache_tokens: expected an integer of at least 1, got '1'"),
    ],
)
def test_bad_engines_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **options)


@pytest.mark.parametrize("forward", range(1, 6))
def test_numbers_that_break_fail_one_request_alone(forward):
    model = breaking()
    config = blockbatch.DecodeConfig(gen_length=32, refresh_interval=8, block_sizes=(4, 8, 16))
    prompts = [[5, 1, 2], [9, 3], [6]]
    expected = [blockbatch.generate(model.broken(None, None, 0.0), prompt, config) for prompt in prompts]
    model.broken(forward, 9, float("nan"))
    engine = new_engine(model)
    requests = [engine.submit(prompt, config) for prompt in prompts]
    engine.run_until_idle()
    assert requests[1].status == "failed" and requests[1].result is None
    assert isinstance(requests[1].error, blockbatch.NonFiniteLogitsError)
    assert requests[1].error.forward == forward
    for request, result in zip(requests[::2], expected[::2], strict=True):
        assert outcome(request.result) == outcome(result)
    assert pages_in_use(engine) == 0
    assert engine._lane._pages.kv.isfinite().all()


def test_a_model_that_writes_its_own_mask_fails():
    model = EngineScripted(ScriptedModel(0, mask_rate=1.0))
    config = blockbatch.DecodeConfig(gen_length=8, block_sizes=(4,), eos_exit="none")
    with pytest.raises(RuntimeError, match="keeps predicting its own MASK"):
        blockbatch.generate(model, [1, 2, 3], config)
    engine = new_engine(model)
    request = engine.submit([1, 2, 3], config)
    engine.run_until_idle()
    assert request.status == "failed" and "keeps predicting its own MASK" in str(request.error)
    assert pages_in_use(engine) == 0


def test_an_error_of_the_forward_fails_what_ran_and_the_engine_goes_on(model, monkeypatch):
    engine = new_engine(model, max_requests=2)
    requests = [engine.submit([number], CONFIG) for number in range(3)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "predict", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert [request.status for request in requests] == ["failed", "failed", "queued"]
    assert isinstance(requests[0].error, ZeroDivisionError)
    engine.run_until_idle()
    assert outcome(requests[2].result) == outcome(blockbatch.generate(model, [2], CONFIG))
    assert pages_in_use(engine) == 0


def test_an_error_while_a_request_joins_fails_all_that_join(model, monkeypatch):
    """Those behind it among them, which have not begun."""
    engine = new_engine(model, max_requests=3)
    requests = [engine.submit([number], CONFIG) for number in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr(engine._lane, "join", lambda seat: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert [request.status for request in requests] == ["failed"] * 3 + ["queued"]
    assert all(isinstance(request.error, ZeroDivisionError) for request in requests[:3])
    engine.run_until_idle()
    assert outcome(requests[3].result) == outcome(blockbatch.generate(model, [3], CONFIG))
    assert pages_in_use(engine) == 0


def test_an_error_of_the_callback_fails_its_request(model):
    def broken(request):
        if request.final:
            raise KeyError("gone")

    engine = new_engine(model)
    bad, good = engine.submit([1], CONFIG, on_update=broken), engine.submit([2], CONFIG)
    engine.run_until_idle()
    assert bad.ended and good.status == "finished"
    assert bad.status == "finished" or isinstance(bad.error, KeyError)


def test_closing_ends_all_requests(model):
    engine = new_engine(model, max_requests=1)
    told = []
    requests = [engine.submit([number], CONFIG, on_update=told.append) for number in range(2)]
    engine.step()
    error = RuntimeError("the device is lost")
    engine.close(error)
    assert [request.error for request in requests] == [error, error]
    assert {request.status for request in told[-2:]} == {"failed"}
    assert not engine.step() and pages_in_use(engine) == 0
    with pytest.raises(EngineClosedError):
        engine.submit([1], CONFIG)


def test_news_tell_only_growing_final_text(model):
    engine, told = new_engine(model), {}

    def note(request):
        told.setdefault(request.id, []).append((request.status, list(request.final)))

    requests = [
        engine.submit([number], blockbatch.DecodeConfig(gen_length=32), on_update=note) for number in range(3)
    ]
    engine.run_until_idle()
    for request in requests:
        news = told[request.id]
        for (_, before), (status, final) in zip(news, news[1:]):
            assert final[: len(before)] == before
            assert len(final) > len(before) or status == "finished"
        assert news[-1] == ("finished", request.final) and request.final == request.result.tokens
        assert request.submitted <= request.started <= request.finished
        if request.final:
            assert request.started <= request.first <= request.finished


def test_stop_texts_end_requests_as_they_end_them_alone(tiny):
    engine = new_engine(tiny)
    prompts = [tiny.tokenizer.encode(f"Q: 3+4*{number}=?\nA:") for number in (2, 5)]
    options = dict(method="dual_cache", gen_length=64, block_size=16, eos_exit="none")
    config = blockbatch.DecodeConfig(**options)
    whole = blockbatch.generate(tiny, prompts[0], config)
    text = whole.text[3:6]
    requests = [engine.submit(prompt, config, stop=text) for prompt in prompts]
    engine.run_until_idle()
    stopping = blockbatch.DecodeConfig(**options, stop=text)
    for request, prompt in zip(requests, prompts, strict=True):
        expected = blockbatch.generate(tiny, prompt, stopping)
        assert (request.result.text, request.result.nfe) == (expected.text, expected.nfe)
        assert outcome(request.result) == outcome(expected)
    assert requests[0].result.stop_reason == "stop"
    assert requests[0].result.nfe.total < whole.nfe.total


def test_branches_fall_with_the_load_and_stay(model):
    engine = new_engine(model, max_requests=4, max_queue=60, branches="load", cache_tokens=1 << 16)
    config = blockbatch.DecodeConfig(gen_length=128)
    requests = [engine.submit([1, 2], config) for _ in range(40)]
    counts = [request.branches for request in requests]
    assert counts[0] == 6 and counts[-1] == 1 and counts == sorted(counts, reverse=True)
    pinned = engine.submit([1, 2], config, branches=4)
    assert pinned.branches == 4 and len(pinned.config.block_sizes) == 4
    some = [*requests[:3], requests[12], requests[-1], pinned]
    for request in set(requests) - set(some):
        engine.cancel(request)
    engine.run_until_idle()
    for request in some:
        assert len(request.result.branches) == request.branches
        alone = blockbatch.generate(model, [1, 2], request.config)
        assert outcome(request.result) == outcome(alone)


def test_drafts_end_with_the_load_and_change_no_token(tiny):
    engine = new_engine(tiny, max_requests=4, max_queue=60, branches="load", cache_tokens=1 << 14)
    config = blockbatch.DecodeConfig.preset("careful", gen_length=64)
    prompts = [tiny.tokenizer.encode(f"Q: {3 + n}+4*{n}=?\nA:") for n in range(6)]
    requests = [engine.submit(prompt, config) for prompt in prompts]
    pinned = engine.submit(prompts[0], config, branches=1)
    assert requests[0].config.drafts == pinned.config.drafts == (1, 2, 3)
    assert [request.config.drafts for request in requests[3:]] == [None] * 3
    engine.run_until_idle()
    for request in (*requests, pinned):
        alone = blockbatch.generate(tiny, request.prompt, config)
        assert request.result.canvas == alone.canvas
        same = request.config.drafts is not None
        assert (request.nfe == alone.nfe) if same else (request.nfe.total >= alone.nfe.total)


def test_something_else_runs_once_a_step(model):
    engine, calls = new_engine(model, max_requests=1), []
    first = engine.submit([1, 2], blockbatch.DecodeConfig(gen_length=16))
    engine.submit([3], blockbatch.DecodeConfig(gen_length=16))
    steps = 1
    while engine.step(lambda: calls.append(first.status)):
        steps += 1
    assert len(calls) == steps and calls[0] == "running" and calls[-1] == "finished"


def test_any_thread_may_submit_and_cancel(model):
    engine = new_engine(model, max_queue=200, cache_tokens=1 << 14)
    done, stop = [], threading.Event()

    def run():
        while not stop.is_set():
            if engine.wait_for_work(0.05):
                engine.step()

    def use(number):
        for turn in range(6):
            request = engine.submit([number, turn], CONFIG)
            if turn % 3 == 2:
                engine.cancel(request)
            done.append(request)

    worker = threading.Thread(target=run)
    users = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in (worker, *users):
        thread.start()
    for thread in users:
        thread.join()
    while not all(request.ended for request in done):
        stop.wait(0.01)
    stop.set()
    worker.join()
    assert len(done) == 24 and not engine.wait_for_work(0)
    for request in done:
        assert request.status in ("finished", "cancelled")
        if request.status == "finished":
            assert outcome(request.result) == outcome(blockbatch.generate(model, request.prompt, CONFIG))
