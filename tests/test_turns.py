"""Decodes of several threads: turns of a GPU, runners of one shape, results equal to those of one thread."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

import blockbatch
from blockbatch import devices, tiny
from blockbatch.decoding import METHOD_BUILDERS, RunnerPool
from plain_models import write_llada

GPU = torch.device("cuda", 5)


@pytest.fixture
def described(monkeypatch):
    """A GPU that is only described: turns are taken, no device is made current."""
    monkeypatch.setattr(devices, "current", lambda device: nullcontext())
    monkeypatch.setattr(devices, "_turns", {})


def run_all(count, function):
    """Runs `function(number)` in threads of its own; raises what any of them raises."""
    with ThreadPoolExecutor(count) as pool:
        return [task.result(60) for task in [pool.submit(function, number) for number in range(count)]]


def test_one_thread_at_a_time_and_again_within_its_turn(described):
    inside, most = 0, 0

    def work(number):
        nonlocal inside, most
        for _ in range(200):
            with devices.turn(GPU):
                inside += 1
                with devices.turn(GPU):
                    most = max(most, inside)
                    threading.Event().wait(0 if number else 1e-5)
                inside -= 1

    run_all(4, work)
    assert (inside, most) == (0, 1)


def test_devices_do_not_wait_for_each_other(described):
    with devices.turn(GPU):
        for device in (torch.device("cuda", 6), torch.device("cpu")):
            assert run_all(1, lambda _, device=device: _in_turn(device)) == [True]


def _in_turn(device):
    with devices.turn(device):
        return True


def test_an_error_gives_the_turn_back(described):
    with pytest.raises(ZeroDivisionError):
        with devices.turn(GPU), devices.turn(GPU):
            raise ZeroDivisionError
    assert run_all(1, lambda _: _in_turn(GPU)) == [True]


def test_nobody_takes_two_turns_while_another_waits(described):
    order, waits = [], threading.Event()

    def other():
        waits.set()
        with devices.turn(GPU):
            order.append("other")

    thread = threading.Thread(target=other)
    with devices.turn(GPU):
        thread.start()
        waits.wait(10)
        while not devices._turns[GPU.index]._queue.locked():  # until it stands in the queue
            pass
    for _ in range(3):
        with devices.turn(GPU):
            order.append("own")
    thread.join(10)
    assert order == ["other", "own", "own", "own"]


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


def prompts(count):
    return [problem.prompt for problem in tiny.generate_problems("arithmetic", "test", count, 3)]


def outcome(result):
    return result.canvas, result.text, result.nfe, result.branches, result.stop_reason


@pytest.mark.parametrize("method", ["blockbatch", "dual_cache"])
def test_threads_give_what_one_thread_gives(model, method):
    config = blockbatch.DecodeConfig(method, gen_length=32)
    given = prompts(8)
    alone = [outcome(blockbatch.generate(model, prompt, config)) for prompt in given]

    def decode(number):
        mine = given[2 * number : 2 * number + 2]
        first = blockbatch.generate(model, mine, config)
        text = "".join(blockbatch.stream(model, mine[0], config))
        assert text == first[0].text
        return [outcome(result) for result in first]

    assert sum(run_all(4, decode), []) == alone


def test_a_pool_keeps_a_runner_for_every_thread(tmp_path):
    write_llada(tmp_path)
    small = blockbatch.load_model(tmp_path, device="cpu")
    config = blockbatch.DecodeConfig(gen_length=16)
    method = METHOD_BUILDERS["blockbatch"](config, small.spec, (2,))
    pool = RunnerPool()

    def open_sessions(count, longest=8):
        return [pool.open_session(small, [[1, 2]], method, 16, longest) for _ in range(count)]

    sessions = open_sessions(3)
    caches = {id(session.cache) for session in sessions}
    assert len(caches) == 3 and pool.idle_bytes() == 0
    size = sessions[0].cache.kv.nbytes
    del sessions
    assert pool.idle_bytes() == 3 * size and pool.has(1, method, 16, 8)
    sessions = open_sessions(2)
    assert {id(session.cache) for session in sessions} < caches and pool.idle_bytes() == size
    del sessions
    del open_sessions(1, longest=16)[:]
    assert len(pool._idle) == 4
    # The others go, the one used longest ago first; what is about to be used stays.
    pool.make_room(2**40, 0, keep=(1, method, 16, 8))
    assert [shape.max_prompt for shape in pool._idle] == [8] and pool.idle_bytes() == size
    pool.make_room(1, 0)
    assert not pool.has(1, method, 16, 8)


def test_a_session_may_end_in_any_thread_at_any_time(tmp_path):
    """A runner comes back while another thread looks through the pool."""
    write_llada(tmp_path)
    small = blockbatch.load_model(tmp_path, device="cpu")
    method = METHOD_BUILDERS["blockbatch"](blockbatch.DecodeConfig(gen_length=16), small.spec, (2,))
    pool, ends = RunnerPool(), threading.Event()
    spare = [pool.open_session(small, [[1]], method, 16, 8 * (number + 1)) for number in range(12)]

    def give_back(_):
        while spare:
            spare.pop()
        ends.set()

    def look(_):
        while not ends.is_set():
            pool.idle_bytes()
            pool.has(1, method, 16, 8)

    with ThreadPoolExecutor(2) as threads:
        for task in [threads.submit(look, 0), threads.submit(give_back, 0)]:
            task.result(60)
    assert len(pool._idle) == 12
