"""Two replicas of the built-in model behind the routers that docs/serving.md names, one of them killed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import blockbatch
from server_processes import process
from serving_fakes import HTTP, ask, events_of, get, httpx, post, stream, until

CHAT = "/v1/chat/completions"
PROMPT = "Divide with remainder until zero: 51 and 16."
PLACES = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
ROUTERS = {"smg": ["launch"], "vllm-router": []}

pytestmark = pytest.mark.skipif(
    os.environ.get("BLOCKBATCH_LONG_TESTS") != "1", reason="takes minutes; make test-serve runs it"
)


def replica():
    """A server that takes several forwards for an answer."""
    return process("-m", "blockbatch", "serve", "tiny", "--device", "cpu", "--port", "0", "--method",
                   "dual_cache", "--eos-exit", "prefix", "--threshold", "0.999")  # fmt: skip


@contextlib.contextmanager
def router(name, *replicas):
    command = shutil.which(name, path=PLACES)
    if command is None:
        pytest.skip(f"needs {name}")
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(str(free.getsockname()[1]))
    urls = [one.url for one in replicas]
    run = subprocess.Popen(
        [command, *ROUTERS[name], "--host", "127.0.0.1", "--port", ports[0], "--prometheus-port", ports[1],
         "--policy", "round_robin", "--worker-urls", *urls],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    made = SimpleNamespace(url=f"http://127.0.0.1:{ports[0]}")

    def ready():
        with contextlib.suppress(httpx.TransportError):
            return get(made, "/v1/models").status_code == 200

    try:
        until(ready, seconds=60)
        yield made
    finally:
        run.kill()
        run.wait()


def answered(server):
    text = get(server, "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total{")]
    return sum(float(line.split()[-1]) for line in lines)


@pytest.mark.parametrize("name", ROUTERS)
def test_two_replicas_and_one_that_is_killed(name):
    model = blockbatch.load_model("tiny", device="cpu")
    config = blockbatch.DecodeConfig(method="dual_cache", eos_exit="prefix", threshold=0.999, gen_length=32)
    expected = blockbatch.generate(model, PROMPT, config).text
    body = ask(PROMPT, model="tiny", max_tokens=32)
    with replica() as first, replica() as second, router(name, first, second) as server:
        for _ in range(4):
            answer = post(server, CHAT, body)
            assert answer.json()["choices"][0]["message"]["content"] == expected
        events, done = stream(server, CHAT, body)
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        assert done and text == expected
        assert post(server, CHAT, {**body, "n": 2}).status_code == 400
        assert answered(first) > 1 and answered(second) > 1

        whole, broken, ended = [], [], threading.Event()
        streamed = {**body, "stream": True}

        def ask_on():
            while not ended.is_set():
                whole.append(post(server, CHAT, body, timeout=120))

        def listen_on():
            while not ended.is_set():
                try:
                    with HTTP.stream("POST", server.url + CHAT, json=streamed, timeout=120) as answer:
                        if answer.status_code == 200:
                            content = answer.read().decode()
                            broken.append(not events_of(content.splitlines())[1])
                except httpx.TransportError:
                    broken.append(True)

        threads = [threading.Thread(target=work) for work in (ask_on, ask_on, ask_on, listen_on)]
        for thread in threads:
            thread.start()
        until(lambda: len(whole) > 6, seconds=300)
        before = len(whole)
        first.run.send_signal(signal.SIGKILL)
        until(lambda: len(whole) > before + 9, seconds=300)
        ended.set()
        for thread in threads:
            thread.join(150)
        # Whole answers are asked for again; a stream that ran there breaks off, and says so.
        assert {answer.status_code for answer in whole} == {200}
        assert all(answer.json()["choices"][0]["message"]["content"] == expected for answer in whole)
        assert broken.count(True) <= 1 and broken.count(False) > 0
