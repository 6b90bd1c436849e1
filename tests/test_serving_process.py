"""The process: how it begins, what a signal does under load, and with which status it ends."""

import json
import logging
import queue
import signal
import socket
import threading

import pytest

from blockbatch.cli import main, serve
from server_processes import TESTS, process
from serving_fakes import HTTP, ask, events_of, get, post, until

CHAT = "/v1/chat/completions"


def later(function, *arguments):
    box = queue.Queue()
    threading.Thread(target=lambda: box.put(function(*arguments)), daemon=True).start()
    return box


def test_a_signal_under_load_loses_nothing():
    """Whatever was taken is answered whole; whatever was not is told so, or finds nobody."""
    told, ended = [], threading.Event()

    def client(number):
        while not ended.is_set():
            streamed = number % 2 == 0
            body = ask("Divide with remainder until zero: 51 and 16.", max_tokens=32, stream=streamed)
            began = False
            try:
                with HTTP.stream("POST", server.url + CHAT, json=body) as answer:
                    began = True
                    content = answer.read().decode()
            except Exception as error:
                told.append(("lost" if began else "nobody", repr(error)))
                return
            if answer.status_code != 200:
                told.append(("refused" if answer.status_code == 503 else "wrong", content))
                return
            whole = events_of(content.splitlines())[1] if streamed else json.loads(content)["choices"]
            told.append(("answered" if whole else "lost", content))

    with process("-m", "blockbatch", "serve", "tiny", "--device", "cpu", "--port", "0",
                 "--preset", "careful", "--max-requests", "4") as server:  # fmt: skip
        clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in clients:
            thread.start()
        until(lambda: len(told) > 16, seconds=120)
        server.run.send_signal(signal.SIGTERM)
        assert server.run.wait(60) == 0
        ended.set()
        for thread in clients:
            thread.join(60)
        server.reader.join(10)
    kinds = [kind for kind, _ in told]
    assert kinds.count("answered") > 16 and set(kinds) <= {"answered", "refused", "nobody"}, told
    requests = [line for line in server.log if line["event"] == "request"]
    assert {line["finish"] for line in requests} <= {"stop", "length"}
    assert len(requests) == kinds.count("answered")
    assert [line["event"] for line in server.log].count("signal") == 1


def test_a_broken_engine_ends_the_process():
    with process(str(TESTS / "serving_process.py"), "crash") as server:
        answers = [later(post, server, CHAT, ask(stream=streamed)) for streamed in (False, False, True)]
        found = [box.get(timeout=30) for box in answers]
        assert [answer.status_code for answer in found[:2]] == [500, 500]
        assert "engine_failed" in found[2].text and "[DONE]" not in found[2].text
        assert server.run.wait(30) == 1
        server.reader.join(10)
    (failed,) = (line for line in server.log if line["event"] == "engine_failed")
    assert "unspecified launch failure" in failed["traceback"] and failed["level"] == "error"


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_end_in_time_is_cut_off(signals):
    with process(str(TESTS / "serving_process.py"), "stuck") as server:
        whole, streamed = (later(post, server, CHAT, ask(stream=one)) for one in (False, True))
        running = 'num_requests_running{engine="0",model_name="tiny"} 2.0'
        until(lambda: running in get(server, "/metrics").text)
        for _ in range(signals):
            server.run.send_signal(signal.SIGTERM)
            until(lambda: any(line["event"] == "signal" for line in server.log))
        if signals == 1:
            assert whole.get(timeout=30).status_code == 503
            assert "it ended before the request did" in streamed.get(timeout=30).text
        assert server.run.wait(30) == 0


@pytest.fixture
def own_log():
    """What a server in this process makes of the loggers is undone."""
    loggers = [logging.getLogger(name) for name in ("blockbatch.serving", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_what_cannot_begin_says_why(tmp_path, capfd, own_log):
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("blockbatch: error: ") and str(tmp_path) in last
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "tiny", "--port", str(port)]) == 2
        assert f"got 127.0.0.1:{port}" in capfd.readouterr().err.splitlines()[-1]
    assert main(["serve", "tiny", "--port", "0", "--threshold", "7"]) == 2
    assert "threshold: expected a value above 0" in capfd.readouterr().err.splitlines()[-1]
    assert main(["serve", "tiny", "--api-key", ""]) == 2


def test_it_names_the_packages_that_lack(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else name)
    assert main(["serve", "tiny"]) == 2
    assert "pip install 'blockbatch[serve]'), lacking are fastapi" in capsys.readouterr().err
