"""What the processes of `rank_processes` do with an engine: rank 0 uses it, the others follow."""

import contextlib
import os
import random
import resource
import threading
import time

import torch

import blockbatch
import rank_processes
from blockbatch.decoding.engine import Engine
from rank_cases import model_of, outcomes, place


@contextlib.contextmanager
def engine_on(model, **options):
    """The engine, on rank 0; elsewhere None, once rank 0 has closed its own."""
    engine = Engine(model, **{"cache_tokens": 1 << 14, **options})
    if place()[0] == 0:
        with contextlib.closing(engine):
            yield engine
    else:
        engine.follow()
        yield None
    # Nobody left anything behind, and the model is free again.
    assert not model.share.group.watch._listeners
    assert engine._lane.pages_in_use() == 0
    model.logits([[1, 2, 3]])


def config_of(settings):
    return blockbatch.DecodeConfig(**settings) if isinstance(settings, dict) else settings


def mix(name, requests, seed, cancel=0.0, dtype="float32", **options):
    """Requests of (prompt, config or its options, options of `submit`) that join before random steps.

    Gives what became of each: its outcome and the confidences, or None where it was cancelled.
    """
    rng, handles, ends = random.Random(seed), {}, {}
    with engine_on(model_of(name, dtype), **options) as engine:
        if engine is None:
            return None
        joins = sorted((rng.randrange(3 * len(requests)), index) for index in range(len(requests)))
        step = 0
        while joins or engine.stats().running or engine.stats().waiting:
            while joins and joins[0][0] <= step:
                _, index = joins.pop(0)
                prompt, settings, given = requests[index]
                handles[index] = engine.submit(prompt, config_of(settings), **given)
                if rng.random() < cancel:
                    ends[index] = step + rng.randrange(8)
            for index in [index for index, at in ends.items() if at <= step]:
                engine.cancel(handles.get(index))
                del ends[index]
            engine.step()
            step += 1
        stats = engine.stats()
    assert stats.cache_usage == 0 and stats.cancelled == sum(
        r.status == "cancelled" for r in handles.values()
    )
    found = [handles[index].result for index in range(len(requests))]
    return [(outcomes(one), one.confidences) if one else None for one in found], stats.steps


def graphs_of(name, prompt, options, count):
    """Requests of one kind one after the other; on every rank the captured steps that served them."""
    model = model_of(name)
    engine = Engine(model, cache_tokens=1 << 14)
    if place()[0] == 0:
        with contextlib.closing(engine):
            for _ in range(count):
                engine.submit(prompt, blockbatch.DecodeConfig(**options))
                engine.run_until_idle()
    else:
        engine.follow()
    return [len(forward._graphs) for forward in engine._lane._forwards.values()]


def refused(name, prompt):
    """What is refused on rank 0, before anybody is told; the engine goes on."""
    errors = []
    model = model_of(name)
    with engine_on(model) as engine:
        if engine is None:
            return None
        calls = [
            lambda: engine.submit([10**6]),
            lambda: engine.submit(prompt, blockbatch.DecodeConfig(gen_length=32), branches=9),
            lambda: blockbatch.generate(model, prompt),
            lambda: model.logits([[1, 2]]),
            lambda: Engine(model),
            engine.follow,
        ]
        for call in calls:
            try:
                call()
                errors.append(None)
            except (ValueError, RuntimeError) as error:
                errors.append(f"{type(error).__name__}: {error}")
        request = engine.submit(prompt, blockbatch.DecodeConfig(gen_length=32))
        engine.run_until_idle()
        return errors, request.status


def used_elsewhere(name):
    """An engine that is used on another rank than the first."""
    errors, engine = [], Engine(model_of(name), cache_tokens=1 << 12)
    if place()[0]:
        for call in (engine.step, lambda: engine.submit([1, 2])):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))
        engine.follow()
    engine.close()
    return errors


def differ(name):
    """Ranks whose engines have different options."""
    Engine(load(name), max_requests=2 + place()[0])


def with_whole_rows(name):
    Engine(load(name, whole_rows=True))


def load(name, **options):
    """A model that a test may break."""
    options = dict(device=rank_processes.DEVICE, dtype="float32", tensor_parallel=place()[1], **options)
    return blockbatch.load_model(name, **options)


def idle(name, prompt, options, seconds):
    """A request, a pause that is longer than any forward may take, and another request; what each rank's
    processor did meanwhile."""
    model = load(name)
    with engine_on(model) as engine:  # loads what the first forwards load
        if engine is not None:
            engine.submit(prompt, blockbatch.DecodeConfig(**options))
            engine.run_until_idle()
    model.share.group.watch._stall_seconds = seconds / 4
    found, used = [], 0.0
    engine = Engine(model, cache_tokens=1 << 12)
    if place()[0]:
        before = resource.getrusage(resource.RUSAGE_SELF)
        begun = time.monotonic()
        engine.follow()
        after = resource.getrusage(resource.RUSAGE_SELF)
        assert time.monotonic() - begun > seconds
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    for pause in (0, seconds):
        before = time.process_time()
        time.sleep(pause)
        used = time.process_time() - before
        request = engine.submit(prompt, blockbatch.DecodeConfig(**options))
        engine.run_until_idle()
        found.append(outcomes(request.result))
    engine.close()
    return found, used


def break_off(name, prompt, options, at_step, how):
    """An engine in which a rank ends within a forward ("follower dies", "leader dies", "follower fails"), or
    while nothing runs ("idle follower dies")."""
    model = load(name)
    engine, (rank, _) = Engine(model, cache_tokens=1 << 12), place()
    predict, forwards = model.predict, 0

    def failing(*args, **more):
        nonlocal forwards
        forwards += 1
        if forwards == at_step and rank == (how != "leader dies"):
            if how.endswith("dies"):
                os._exit(9)
            raise MemoryError("expected room for this test, got none")
        return predict(*args, **more)

    if how != "idle follower dies":
        model.predict = failing
    if rank:
        if how == "idle follower dies":
            threading.Timer(0.5, os._exit, (9,)).start()
        engine.follow()
        return "ended"
    if how == "idle follower dies":
        while True:
            engine.step()
            engine.wait_for_work(60)
    told = []
    engine.on_rank_failure(lambda error: told.append(str(error)))
    requests = [
        engine.submit(prompt, blockbatch.DecodeConfig(**options), on_update=lambda _: None) for _ in range(2)
    ]
    try:
        engine.run_until_idle()
    except blockbatch.RankError as error:
        try:
            engine.submit(prompt)
        except blockbatch.RankError as again:
            return str(error), str(again), told, [request.status for request in requests]
    return None


def diverge(name, prompt, options, at_step):
    """An engine whose last rank holds another number from some step on; the step at which that is found."""
    engine = Engine(load(name), cache_tokens=1 << 12)
    lane, steps = engine._lane, 0
    usual = lane.step

    def step(meanwhile):
        nonlocal steps
        steps += 1
        took_part = usual(meanwhile)
        if steps == at_step and place()[0]:
            with torch.inference_mode():
                lane.states()[0].committed[0] += 1
        return took_part

    lane.step = step
    try:
        if place()[0]:
            engine.follow()
        else:
            engine.submit(prompt, blockbatch.DecodeConfig(**options))
            engine.run_until_idle()
            engine.close()
    except blockbatch.RankError as error:
        return steps, str(error)
    return steps, None


def bad_callback(name, prompt, options):
    """A request whose callback fails on rank 0 alone, beside one that goes on."""

    def fail(request):
        raise ValueError("this test")

    with engine_on(model_of(name)) as engine:
        if engine is None:
            return None
        config = blockbatch.DecodeConfig(**options)
        bad, good = engine.submit(prompt, config, on_update=fail), engine.submit(prompt, config)
        engine.run_until_idle()
        return bad.status, str(bad.error), outcomes(good.result)


def closed_at_work(name, prompt, options):
    """An engine that is closed while requests run."""
    with engine_on(model_of(name)) as engine:
        if engine is None:
            return None
        request = engine.submit(prompt, blockbatch.DecodeConfig(**options))
        engine.step()
        engine.step()
        engine.close()
        assert not engine.step() and request.ended
    return request.status
