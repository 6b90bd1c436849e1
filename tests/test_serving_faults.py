"""Clients that go, that read slowly, that send nonsense; queues that are full, engines that break."""

import json
import random
import socket
import threading

import pytest

import blockbatch
from blockbatch.decoding.non_finite import NonFiniteLogitsError
from serving_fakes import HTTP, ScriptedEngine, Steps, ask, get, post, serving, stream, until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture
def stepwise(model):
    """A server whose engine steps when the test says so."""
    engine = ScriptedEngine(model, "a b c d e f g h i j", max_requests=2, max_queue=2)
    engine.script = steps = Steps()
    with serving(model, engine) as server:
        server.steps = steps
        yield server
        steps.free = True


def send(server, body, receive_buffer=None):
    """A connection on which a chat was asked for."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def later(function, *arguments, **options):
    """Runs a call on a thread; `result()` waits for it."""
    box = []
    thread = threading.Thread(target=lambda: box.append(function(*arguments, **options)), daemon=True)
    thread.start()

    def result():
        thread.join(30)
        return box[0]

    return result


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_is_gone_after_one_step(stepwise, streamed):
    server, engine = stepwise, stepwise.engine
    connection = send(server, ask(stream=streamed))
    until(lambda: engine.requests)
    server.steps.allow(engine, 3)
    assert engine.requests[0].status == "running" and len(engine.requests[0].final) > 1
    if streamed:
        assert b"assistant" in connection.recv(10000)
    connection.close()
    until(lambda: server.service.in_flight == 0)
    server.steps.allow(engine)
    assert engine.requests[0].status == "cancelled"


def test_a_client_that_goes_while_it_waits(stepwise):
    server, engine = stepwise, stepwise.engine
    connections = [send(server, ask(stream=True)) for _ in range(3)]
    until(lambda: len(engine.requests) == 3)
    server.steps.allow(engine)
    (waiting,) = engine.waiting()
    for connection in connections:
        connection.close()
    until(lambda: server.service.in_flight == 0)
    server.steps.allow(engine)
    assert [request.status for request in engine.requests] == ["cancelled"] * 3 and waiting.started is None


def test_a_full_queue_turns_away_before_any_chunk(stepwise):
    server, engine = stepwise, stepwise.engine
    kept = []
    for number in range(4):
        kept.append(later(post, server, CHAT, ask()))
        until(lambda number=number: len(engine.requests) == number + 1)
    for streamed in (True, False):
        answer = post(server, CHAT, ask(stream=streamed))
        assert answer.status_code == 503 and answer.headers["retry-after"] == "7"
        assert answer.json()["error"]["type"] == "service_unavailable_error"
    server.steps.free = True
    assert [answer().status_code for answer in kept] == [200] * 4
    # Of several prompts all are taken or none.
    server.steps.free = False
    answer = post(server, "/v1/completions", {"prompt": ["a"] * 5})
    assert answer.status_code == 503
    server.steps.allow(engine)
    assert {request.status for request in engine.requests[4:]} == {"cancelled"}


def test_an_engine_that_breaks_ends_all_at_once(stepwise):
    server, engine = stepwise, stepwise.engine
    events = later(stream, server, CHAT, ask())
    whole = later(post, server, CHAT, ask())
    until(lambda: len(engine.requests) == 2)
    server.steps.allow(engine, 3)
    waiting = [later(post, server, CHAT, ask(stream=streamed)) for streamed in (True, False)]
    until(lambda: len(engine.requests) == 4)

    def broken(engine):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine.script = broken
    server.steps.free = True
    told, done = events()
    assert not done and told[-1]["error"]["code"] == "engine_failed" and len(told) > 2
    for answer in (whole(), *(one() for one in waiting)):
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
        assert "CUDA" not in answer.text
    assert get(server, "/health").status_code == 503 and get(server, "/health").json()["status"] == "failed"
    assert post(server, CHAT, ask()).status_code == 500
    assert get(server, "/metrics").status_code == 200
    until(lambda: engine.closed)
    assert "CUDA" in str(engine.closed) and server.service.ended.is_set()


def test_a_forward_without_memory_ends_its_requests_alone(stepwise):
    server, engine = stepwise, stepwise.engine
    answer = later(post, server, CHAT, ask())
    until(lambda: engine.requests)

    def no_memory(engine):
        engine.script = None
        request = engine.requests[0]
        request.status, request.error = "failed", MemoryError("device: too little")
        request.on_update(request)
        raise request.error

    engine.script = no_memory
    server.steps.free = True
    assert answer().status_code == 500 and answer().json()["error"]["code"] == "out_of_memory"
    assert post(server, CHAT, ask()).status_code == 200


def test_a_request_that_fails_fails_alone(stepwise):
    server, engine = stepwise, stepwise.engine
    first, second = (later(post, server, CHAT, ask()) for _ in range(2))
    until(lambda: len(engine.requests) == 2)
    server.steps.allow(engine)
    request = engine.requests[0]
    request.status = "failed"
    request.error = NonFiniteLogitsError("prompt", 0, "block", 1, 2, "torch.float16")
    request.on_update(request)
    server.steps.free = True
    answers = sorted([first(), second()], key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, 500]
    assert answers[1].json()["error"]["code"] == "non_finite_logits"


def test_requests_end_with_their_time(model):
    engine = ScriptedEngine(model, "a b c d", pace=0)
    with serving(model, engine, request_timeout=0.3) as server:
        for streamed in (True, False):
            answer = post(server, CHAT, ask(stream=streamed))
            if streamed:  # it began with the first news: that it runs
                assert answer.status_code == 200 and "[DONE]" not in answer.text
                assert json.loads(answer.text.strip().splitlines()[-1][6:])["error"]["code"] == "timeout"
            else:
                assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        until(lambda: [request.status for request in engine.requests] == ["cancelled"] * 2)


def test_slow_readers_hold_nobody_up(model):
    engine = ScriptedEngine(model, [9, 16, 21] * 300, delay=0.001, max_requests=8)
    with serving(model, engine, send_buffer=2048) as server:
        slow = [send(server, ask(stream=True, max_tokens=900), receive_buffer=2048) for _ in range(3)]
        until(lambda: len(engine.running()) == 3)
        assert len(stream(server, CHAT, ask(max_tokens=50))[0]) > 3
        until(lambda: all(request.ended for request in engine.requests))
        assert server.service.in_flight == 3  # what they have not read is not sent
        for connection in slow:
            text = b""
            while b"[DONE]" not in text:
                text += connection.recv(1 << 16)
            events = [
                json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: {")
            ]
            content = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
            assert content == model.tokenizer.decode([9, 16, 21] * 300)
            assert len(events) < 890  # what had come meanwhile came as one
            connection.close()
        until(lambda: server.service.in_flight == 0)


def test_who_never_reads_is_cut_off(model):
    engine = ScriptedEngine(model, [9, 16, 21] * 300, max_requests=8)
    with serving(model, engine, send_buffer=2048, request_timeout=1.0) as server:
        connection = send(server, ask(stream=True, max_tokens=900), receive_buffer=2048)
        until(lambda: server.service.in_flight == 1)
        until(lambda: server.service.in_flight == 0, seconds=10)
        connection.close()


def test_draining_finishes_what_runs_and_takes_no_more(stepwise):
    server, engine = stepwise, stepwise.engine
    kept = later(stream, server, CHAT, ask())
    until(lambda: engine.requests)
    server.steps.allow(engine, 2)
    server.service.drain()
    assert get(server, "/health").status_code == 503
    answer = post(server, CHAT, ask())
    assert answer.status_code == 503 and "retry-after" in answer.headers
    assert answer.headers["connection"] == "close"
    server.steps.free = True
    events, done = kept()
    assert done and events[-1]["choices"][0]["finish_reason"] == "stop"


def test_it_says_that_it_starts(model):
    loading = threading.Event()

    def load():
        loading.wait(20)
        return model, ScriptedEngine(model)

    with serving(model, None, load=load) as server:
        assert get(server, "/health").status_code == 503 and get(server, "/health").json() == {
            "status": "starting"
        }
        answer = post(server, CHAT, ask())
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert get(server, "/v1/models").status_code == 200 and get(server, "/metrics").status_code == 200
        loading.set()
        until(lambda: get(server, "/health").status_code == 200)
        assert post(server, CHAT, ask()).status_code == 200


def random_value(draw, depth=0):
    kinds = ["null", "bool", "int", "huge", "float", "text", "half", "list", "object"]
    kind = draw.choice(kinds[: len(kinds) - (2 if depth > 3 else 0)])
    if kind in ("list", "object"):
        members = [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
        names = ["role", "content", "type", "text", "threshold", "", "\ud800"]
        return members if kind == "list" else {draw.choice(names): member for member in members}
    return {
        "null": None, "bool": draw.random() < 0.5, "int": draw.randrange(-5, 5000),
        "huge": draw.choice([10**30, -(10**400), 2**63]),
        "float": draw.choice([0.5, 1e308, float("nan"), -0.0]),
        "text": draw.choice(["", "user", "auto", "x" * 500, "\0", "<|mdm_mask|>", "\u202e"]),
        "half": "\ud83d",
    }[kind]  # fmt: skip


def bad_body(draw):
    """Bytes that are a chat or a completion no more, or hardly."""
    body = draw.choice([ask(max_tokens=4), {"prompt": "a", "max_tokens": 4}])
    fields = [*body, "model", "stop", "stream", "n", "temperature", "top_p", "seed", "blockbatch", "tools",
              "stream_options", "logit_bias", "user"]  # fmt: skip
    for _ in range(draw.randrange(1, 4)):
        body[draw.choice(fields)] = random_value(draw)
    if draw.random() < 0.2:
        options = ["preset", "method", "threshold", "block_sizes", "steps", "drafts", "gen_length", "policy"]
        body["blockbatch"] = {draw.choice(options): random_value(draw) for _ in range(3)}
    content = bytearray(json.dumps(body).encode())
    if draw.random() < 0.4:
        for _ in range(draw.randrange(1, 6)):
            place = draw.randrange(len(content))
            content[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    return bytes(content if draw.random() < 0.9 else content[: draw.randrange(len(content))])


def test_a_thousand_bad_bodies(model):
    draw, statuses = random.Random(18), {}
    with serving(model, ScriptedEngine(model, pace=50, max_queue=1000)) as server:
        for number in range(1000):
            content = bad_body(draw)
            path = "/v1/completions" if b"prompt" in content else CHAT
            answer = HTTP.post(
                server.url + path, content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code in (200, 400, 404), (number, content, answer.text)
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["message"] and error["type"], (content, error)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert post(server, CHAT, ask()).status_code == 200
    assert statuses[400] > 500


def test_connections_with_nonsense_or_nothing(model):
    with serving(model, ScriptedEngine(model)) as server:
        for content in (
            b"\0\1\2\3\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\n",
            b"",
        ):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(content)
            connection.close()
        # A body that never comes holds nobody up, and goes with its connection.
        stuck = socket.create_connection(("127.0.0.1", server.port))
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        )
        stuck.sendall(head.encode() + b"{")
        until(lambda: server.service.in_flight == 1)
        assert post(server, CHAT, ask()).status_code == 200
        stuck.close()
        until(lambda: server.service.in_flight == 0)
