"""An engine with the face of `blockbatch.decoding.engine.Engine` whose requests a test scripts, and a server
for tests that runs on a thread.
"""

import contextlib
import json
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from blockbatch.branches import NFE
from blockbatch.decoding.prompt_checks import check_prompt, check_stop
from blockbatch.decoding.requests import EngineStats, QueueFullError, Request

for _package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(_package, reason="needs the packages of the extra serve, and clients of it")

import httpx  # noqa: E402
import uvicorn  # noqa: E402

from blockbatch.serving.app import create_app  # noqa: E402
from blockbatch.serving.service import Service, Settings  # noqa: E402

# Making a client takes longer than most answers.
HTTP = httpx.Client(timeout=30, trust_env=False, verify=False)


class ScriptedEngine:
    """Every step makes `pace` more tokens of each running request final.

    Args:
        model: with a tokenizer.
        answer: text of every request.
        pace: tokens a step; 0: none until `pace` is set.
        delay: seconds that a step takes.
    """

    def __init__(self, model, answer="a b c d", pace=1, delay=0.0, max_requests=4, max_queue=4):
        self.model, self.answer, self.pace, self.delay = model, answer, pace, delay
        self.max_requests, self.max_queue = max_requests, max_queue
        self.script = None  # called with the engine before every step
        self.steps, self.closed, self.cancelled = 0, None, []
        self._changed = threading.Condition()
        self.requests, self._cancels = [], []

    def tokens(self, request):
        text = self.answer(request) if callable(self.answer) else self.answer
        return text if isinstance(text, list) else self.model.tokenizer.encode(text)

    def submit(self, prompt, config, *, stop=(), on_update=None, branches=None, confidences=False):
        check_prompt(self.model, prompt, config, "prompt")
        check_stop(self.model, replace(config, stop=tuple(stop)))
        with self._changed:
            free = self.max_requests - len(self.running())
            if len(self.waiting()) >= self.max_queue + free:
                raise QueueFullError(self.max_queue, 7.0)
            request = Request(len(self.requests) + 1, prompt, config, branches or 1, on_update)
            # The n-th token has the probability 1/n.
            request.confidences = [1 / n for n in range(1, 1000)] if confidences else None
            self.requests.append(request)
            self._changed.notify_all()
        return request

    def waiting(self):
        return [request for request in self.requests if request.status == "queued"]

    def running(self):
        return [request for request in self.requests if request.status == "running"]

    def on_rank_failure(self, call):
        self.rank_failed = call

    def cancel(self, request):
        with self._changed:
            self._cancels.append(request)
            self._changed.notify_all()

    def step(self, meanwhile=lambda: None):
        meanwhile()
        if self.script is not None:
            self.script(self)
        time.sleep(self.delay)
        with self._changed:
            self.steps += 1
            cancels, self._cancels = self._cancels, []
            updated = []
            for request in cancels:
                if not request.ended:
                    request.status = "cancelled"
                    self.cancelled.append((request, self.steps))
                    updated.append(request)
            for request in self.waiting()[: self.max_requests - len(self.running())]:
                request.status, request.started = "running", time.monotonic()
                updated.append(request)
            for request in self.running():
                if self.pace:
                    self._grow(request)
                    updated.append(request)
            busy = bool(self.waiting() or self.running())
        for request in dict.fromkeys(updated):
            request.on_update(request)
        return busy

    def _grow(self, request):
        tokens = self.tokens(request)
        size = min(len(tokens), len(request.final) + self.pace, request.config.gen_length)
        request.final += tokens[len(request.final) : size]
        request.nfe = NFE(1, request.nfe.block + 1, 0)
        if size == min(len(tokens), request.config.gen_length):
            eos = self.model.eos_token_ids[0]
            canvas = request.final + [eos] * (request.config.gen_length - size)
            request.result = SimpleNamespace(canvas=canvas, adopted=2)
            request.status = "finished"

    def wait_for_work(self, timeout):
        with self._changed:
            return self._changed.wait_for(
                lambda: bool(self.waiting() or self.running() or self._cancels or self.closed), timeout
            )

    def stats(self):
        ended = dict.fromkeys(("finished", "cancelled", "failed"), 0)
        for request in self.requests:
            if request.ended:
                ended[request.status] += 1
        return EngineStats(
            running=len(self.running()), waiting=len(self.waiting()), cache_usage=0.25,
            forwards={"init": 1, "block": self.steps, "refresh": 0}, steps=self.steps, tokens=3,
            refreshes=0, commits=2, shared_pages=5, **ended,
        )  # fmt: skip

    def close(self, error=None):
        with self._changed:
            self.closed = error or True
            self._changed.notify_all()


class Steps:
    """Lets an engine take steps one by one; used as its `script`."""

    def __init__(self):
        self._allowed = threading.Semaphore(0)
        self.free = False

    def __call__(self, engine):
        while not self.free and not engine.closed and not self._allowed.acquire(timeout=0.01):
            pass

    def allow(self, engine, count=1):
        """Waits until `count` more steps are done."""
        wanted = engine.steps + count
        self._allowed.release(count)
        until(lambda: engine.steps >= wanted)


@contextlib.contextmanager
def serving(model, engine, *, load=None, send_buffer=None, **settings):
    """A server on a free port of this machine.

    Args:
        load: in place of one that gives model and engine; nobody then waits until the server is ready.
        send_buffer: bytes that a connection holds for its reader.
    """
    settings = Settings(**{"model_name": "tiny", **settings})

    class _Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            yield

    service = Service(settings, load or (lambda: (model, engine)))
    config = uvicorn.Config(
        create_app(service, "0"), host="127.0.0.1", port=0, log_config=None, access_log=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = _Server(config)
    listener = socket.socket()
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started or (load is None and service.status == "starting"):
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    made = SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, service=service, engine=engine)
    try:
        yield made
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ask(text="hi", **more):
    """The body of a chat."""
    return {"messages": [{"role": "user", "content": text}], **more}


def post(server, path, body, **options):
    return HTTP.post(server.url + path, json=body, **options)


def get(server, path, **options):
    return HTTP.get(server.url + path, **options)


def events_of(lines):
    """The JSON of a stream's events, and whether it ended with [DONE]."""
    texts = [line.removeprefix("data: ") for line in lines if line]
    assert all(line.startswith("data: ") for line in lines if line)
    done = texts[-1:] == ["[DONE]"]
    return [json.loads(text) for text in texts[: len(texts) - done]], done


def stream(server, path, body):
    """All events of a streamed answer, and whether it ended as one does."""
    with HTTP.stream("POST", server.url + path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events_of(list(answer.iter_lines()))


def until(condition, seconds=20):
    """Waits until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not true in time"
        time.sleep(0.005)
