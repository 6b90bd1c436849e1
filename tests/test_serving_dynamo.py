"""NVIDIA Dynamo's frontend with two workers of the built-in model, one of which is killed under load."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import blockbatch
import picture_traces
from command_runs import ROOT
from serving_fakes import HTTP, events_of, get, httpx, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LENGTH, CLIENTS = 48, 6
# A high threshold takes a forward for nearly every token, and so long enough to be killed on the way.
SETTINGS = {"method": "dual_cache", "eos_exit": "prefix", "threshold": 0.999}

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("BLOCKBATCH_LONG_TESTS") != "1", reason="takes minutes; make test-serve runs it"
    ),
    pytest.mark.skipif(
        find_spec("dynamo") is None or find_spec("msgspec") is None,
        reason="needs ai-dynamo-runtime, and ai-dynamo with msgspec and pyzmq for the frontend",
    ),
]


@contextlib.contextmanager
def started(folder, *command):
    """A process of Dynamo that finds the others by a folder and listens on this machine alone."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python"))),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder), "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
    }  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    made = SimpleNamespace(run=run, log=[])

    def read():
        for line in run.stderr:
            with contextlib.suppress(ValueError):
                made.log.append(json.loads(line))

    made.reader = threading.Thread(target=read, daemon=True)
    made.reader.start()
    try:
        yield made
    finally:
        run.kill()
        run.wait()


def worker(folder):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    return started(folder, "-m", "blockbatch.serving.dynamo", "tiny", "--device", "cpu", *options)


def said(process, event):
    return [line for line in process.log if line["event"] == event]


@contextlib.contextmanager
def frontend(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = ["-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", port]
    with started(folder, *command, "--discovery-backend", "file", "--migration-limit", "3") as made:
        made.url = f"http://127.0.0.1:{port}"
        yield made


def has_model(server):
    with contextlib.suppress(httpx.TransportError):
        return bool(get(server, "/v1/models").json()["data"])


def bodies():
    """Requests, each with its path and the text that `generate` gives for it."""
    model = blockbatch.load_model("tiny", device="cpu")
    kinds = ("arithmetic", "code", "symbolic")
    for number in range(6):
        prompt = picture_traces.problem(kinds[number % 3], number).prompt
        sampling = {"temperature": 0.7, "seed": 40 + number} if number % 2 else {}
        config = blockbatch.DecodeConfig(**SETTINGS, gen_length=64, **sampling)
        tokens = blockbatch.generate(model, prompt, config).tokens
        expected = model.tokenizer.decode(tokens[:LENGTH])
        common = {"model": "tiny", "max_tokens": LENGTH, "stream": True, **sampling}
        if number < 3:
            messages = [{"role": "user", "content": prompt}]
            yield CHAT, {**common, "messages": messages}, expected
        else:
            yield COMPLETIONS, {**common, "prompt": prompt}, expected


def answer(server, path, body):
    """Text and usage of a streamed answer."""
    body = {**body, "stream_options": {"include_usage": True}}
    with HTTP.stream("POST", server.url + path, json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        events, done = events_of([line for line in response.iter_lines() if line])
    assert done
    choices = [choice for event in events for choice in event["choices"]]
    if path == CHAT:
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
    else:
        text = "".join(choice["text"] for choice in choices)
    return text, next(event["usage"] for event in events if event.get("usage"))


def test_a_worker_that_is_killed_under_load(tmp_path):
    asked = list(bodies())
    told, wrong, ended = [], [], threading.Event()

    def client(number):
        turn = number
        while not ended.is_set():
            path, body, expected = asked[turn % len(asked)]
            try:
                text, usage = answer(server, path, body)
                told.append(usage["completion_tokens"])
                if text != expected:
                    wrong.append((path, text, expected))
            except Exception as error:
                wrong.append(repr(error))
            turn += 1

    with frontend(tmp_path) as server, worker(tmp_path) as first, worker(tmp_path) as second:
        for one in (first, second):
            until(lambda one=one: said(one, "ready"), seconds=120)
        until(lambda: has_model(server), seconds=60)
        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        until(lambda: all(len(said(one, "request")) > 3 for one in (first, second)), seconds=180)
        first.run.send_signal(signal.SIGKILL)
        before = len(told)
        until(lambda: len(told) >= before + 2 * CLIENTS or wrong, seconds=180)
        ended.set()
        for thread in threads:
            thread.join(120)
        assert wrong == [] and all(0 < count <= LENGTH for count in told)
        # At least one of them had sent something before it moved.
        assert any(line.get("skipped") for line in said(second, "request"))

        second.run.send_signal(signal.SIGTERM)
        assert second.run.wait(60) == 0


def test_what_the_frontend_is_told(tmp_path):
    """Usage, logs without prompts, errors by name, and a client that goes."""
    (path, body, expected), *_ = bodies()
    with frontend(tmp_path) as server, worker(tmp_path) as one:
        until(lambda: has_model(server), seconds=120)
        whole = {**body, "stream": False, "nvext": {"extra_fields": ["engine_data"]}}
        answered = HTTP.post(server.url + path, json=whole).json()
        assert answered["choices"][0]["message"]["content"] == expected
        told = answered["nvext"]["engine_data"]["blockbatch"]
        assert told["branches"] == 1 and told["nfe"]["total"] == sum(
            count for phase, count in told["nfe"].items() if phase != "total"
        )
        options = {"annotations": ['blockbatch:{"threshold": 0.5}']}
        faster = HTTP.post(server.url + path, json={**whole, "nvext": {**whole["nvext"], **options}}).json()
        assert faster["nvext"]["engine_data"]["blockbatch"]["nfe"]["total"] < told["nfe"]["total"]
        told = HTTP.post(server.url + path, json={**whole, "logprobs": True}).json()["choices"][0]["logprobs"]
        assert "".join(one["token"] for one in told["content"]) == expected
        assert all(one["logprob"] <= 0 for one in told["content"])
        refused = HTTP.post(server.url + path, json={**whole, "n": 2})
        assert refused.status_code == 400 and "n: not supported" in refused.text

        with HTTP.stream("POST", server.url + path, json={**body, "max_tokens": 256}) as response:
            next(response.iter_lines())
        until(lambda: any(line["finish"] == "abort" for line in said(one, "request")), seconds=60)
        (gone,) = (line for line in said(one, "request") if line["finish"] == "abort")
        assert gone["completion_tokens"] < 256
        assert all("prompts" not in line for line in one.log)
