"""A server whose model two processes hold, by torchrun: what it answers, and how all of them end."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import blockbatch
from server_processes import process
from serving_fakes import HTTP, ScriptedEngine, ask, events_of, get, post, serving, stream, until
from test_serving_process import later

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "Divide with remainder until zero: 51 and 16."
RUNNING = 'num_requests_running{engine="0",model_name="tiny"} %d.0'
pytestmark = pytest.mark.xdist_group("serving_ranks")


@contextlib.contextmanager
def ranks(*options, model="tiny"):
    """A server of two ranks; `pids` are theirs, `run` is torchrun."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "blockbatch",
               "serve", model, "--device", "cpu", "--port", "0", *options)  # fmt: skip
    with process(*command) as server:
        server.pids = pids = children(server.run.pid)
        (first,) = (line["pid"] for line in server.log if line["event"] == "listening")
        pids.sort(key=lambda pid: pid != first)
        assert len(pids) == 2 and pids[0] == first
        try:
            yield server
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in found if b"serve" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")]


def runs(pid):
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def server():
    with ranks("--max-requests", "4", "--branches", "load") as made:
        yield made


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


def test_answers_are_those_of_one_process(server, tiny):
    options = {"method": "blockbatch", "gen_length": 64, "block_sizes": [4, 8, 16]}
    config = blockbatch.DecodeConfig(**{**options, "block_sizes": (4, 8, 16)})
    prompts = [PROMPT, "Sort: 5 2 9", "Reverse: 3 1 4 1 5"]
    boxes = [
        later(post, server, TEXT, {"prompt": prompt, "blockbatch": {**options, "branches": 3}, "logprobs": 1})
        for prompt in prompts
    ]
    for prompt, box in zip(prompts, boxes, strict=True):
        body, expected = box.get(timeout=120).json(), blockbatch.generate(tiny, prompt, config)
        assert body["choices"][0]["text"] == expected.text
        assert body["usage"]["blockbatch"]["nfe"]["total"] == expected.nfe.total
        logs = body["choices"][0]["logprobs"]["token_logprobs"]
        assert len(logs) == body["usage"]["completion_tokens"] and all(one <= 0 for one in logs)


def test_streams_stop_texts_and_cancels(server):
    whole = post(server, CHAT, ask(PROMPT)).json()["choices"][0]["message"]["content"]
    events, done = stream(server, CHAT, ask(PROMPT))
    assert done
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole
    assert "=" in whole
    cut = post(server, CHAT, ask(PROMPT, stop="=")).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (whole[: whole.index("=")], "stop")


def test_a_client_that_goes_ends_its_request(server):
    endless = {"gen_length": 512, "method": "vanilla", "block_size": 512, "steps": 512}
    with contextlib.suppress(Exception):
        post(server, CHAT, ask(PROMPT, blockbatch=endless), timeout=1.0)
    until(lambda: RUNNING % 0 in get(server, "/metrics").text)
    aborted = 'request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 1.0'
    until(lambda: aborted in get(server, "/metrics").text)
    assert post(server, CHAT, ask(PROMPT, max_tokens=32)).status_code == 200


def test_drawn_answers_are_those_of_one_process(server, tiny):
    options = {"method": "blockbatch", "gen_length": 64, "block_sizes": [4, 8, 16]}
    texts = []
    for drawn in ({"temperature": 1.0, "top_p": 0.9, "seed": 5}, {"temperature": 1.0, "seed": 6}):
        asked = {"prompt": PROMPT, "blockbatch": {**options, "branches": 3}, **drawn}
        texts.append(post(server, TEXT, asked).json()["choices"][0]["text"])
        config = blockbatch.DecodeConfig(**{**options, "block_sizes": (4, 8, 16), **drawn})
        assert texts[-1] == blockbatch.generate(tiny, PROMPT, config).text
    assert texts[0] != texts[1]


def test_a_block_causal_model():
    model = blockbatch.load_model("tiny-block", device="cpu")
    with ranks(model="tiny-block") as server:
        for method, drawn in (("block_diffusion", {}), ("blockbatch", {"temperature": 0.8, "seed": 3})):
            asked = {"prompt": PROMPT, "max_tokens": 64, "blockbatch": {"method": method}, **drawn}
            text = post(server, TEXT, asked).json()["choices"][0]["text"]
            config = blockbatch.DecodeConfig(method, gen_length=64, **drawn)
            assert text == blockbatch.generate(model, PROMPT, config).text and "=" in text


def test_what_is_refused(server):
    assert post(server, "/live", {"prompt": PROMPT}).status_code == 404
    assert post(server, CHAT, ask(PROMPT, max_tokens=32)).status_code == 200


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_server_costs_nothing(server):
    before = [processor_seconds(pid) for pid in server.pids]
    time.sleep(3)
    after = [processor_seconds(pid) for pid in server.pids]
    assert all(new - old < 1 for old, new in zip(before, after, strict=True))
    assert post(server, CHAT, ask(PROMPT, max_tokens=32)).status_code == 200


def test_the_page_decodes_on_no_model_of_several_ranks(tiny, monkeypatch):
    with serving(tiny, ScriptedEngine(tiny)) as server:
        monkeypatch.setattr(tiny, "share", SimpleNamespace(size=2))
        answer = post(server, "/live", {"prompt": "hi"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("live: expected a model of one process")


def test_who_waits_for_a_forward_that_never_ends_hears_of_a_lost_rank(tiny):
    engine, stuck = ScriptedEngine(tiny), threading.Event()
    engine.script = lambda engine: stuck.wait(60) if engine.requests else None
    with serving(tiny, engine) as server:
        boxes = [later(post, server, CHAT, ask(stream=streamed)) for streamed in (False, True)]
        until(lambda: len(engine.requests) == 2)
        for _ in range(2):  # the engine's own error comes behind it
            engine.rank_failed(blockbatch.RankError("rank 1 ended"))
        assert [box.get(timeout=20).status_code for box in boxes] == [500, 500]
        assert get(server, "/health").status_code == 503
        assert post(server, CHAT, ask()).status_code == 500
        stuck.set()


@pytest.mark.parametrize("whom", ["rank 0", "torchrun"])
def test_a_signal_under_load_ends_all_ranks(whom):
    """What was taken is answered whole, then all ranks end with status 0."""
    told, ended = [], threading.Event()

    def client(number):
        while not ended.is_set():
            streamed, began = number % 2 == 0, False
            try:
                with HTTP.stream(
                    "POST", server.url + CHAT, json=ask(PROMPT, max_tokens=32, stream=streamed)
                ) as answer:
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

    with ranks("--max-requests", "4", "--preset", "careful") as server:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        until(lambda: len(told) > 8, seconds=120)
        os.kill(server.pids[0] if whom == "rank 0" else server.run.pid, signal.SIGTERM)
        status = server.run.wait(60)
        ended.set()
        for thread in clients:
            thread.join(60)
        server.reader.join(10)
        assert not any(map(runs, server.pids))
    kinds = [kind for kind, _ in told]
    assert kinds.count("answered") > 8 and set(kinds) <= {"answered", "refused", "nobody"}, told
    events = [line["event"] for line in server.log]
    assert events.count("signal") == 1 and events[-1] == "ended" and "engine_failed" not in events
    # torchrun that is told to end says so with a status of its own.
    assert status == 0 or whom == "torchrun"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(rank):
    """Whoever waits hears of it at once."""
    with ranks() as server:
        sizes = {"gen_length": 256, "method": "vanilla", "block_size": 256, "steps": 256}
        boxes = [
            later(_asked, server, ask(PROMPT, stream=streamed, blockbatch=sizes))
            for streamed in (False, True)
        ]
        until(lambda: RUNNING % 2 in get(server, "/metrics").text)
        os.kill(server.pids[rank], signal.SIGKILL)
        begun = time.monotonic()
        answers = [box.get(timeout=30) for box in boxes]
        if rank == 1:
            (status, _), (_, streamed) = answers
            assert status == 500 and "engine_failed" in streamed and "[DONE]" not in streamed
            assert time.monotonic() - begun < 10
        until(lambda: not any(map(runs, server.pids)), seconds=30)
        assert server.run.wait(30) != 0
        server.reader.join(10)
    if rank == 1:
        (failed,) = (line for line in server.log if line["event"] == "engine_failed")
        assert "rank 1 ended" in failed["traceback"]


def _asked(server, body):
    try:
        answer = post(server, CHAT, body)
        return answer.status_code, answer.text
    except Exception as error:
        return type(error).__name__, ""


def test_a_rank_that_is_killed_while_nothing_runs():
    with ranks() as server:
        os.kill(server.pids[1], signal.SIGKILL)
        until(lambda: not runs(server.pids[0]), seconds=30)
        assert server.run.wait(30) != 0
