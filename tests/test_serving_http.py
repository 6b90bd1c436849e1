"""The routes: what they answer, how streams are made, what is refused and how."""

import json
import logging

import pytest

import blockbatch
from serving_fakes import HTTP, ScriptedEngine, ask, get, post, serving, stream, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def server(model):
    with serving(model, ScriptedEngine(model, "hello café, wörld 😀 end", max_queue=200)) as made:
        yield made


def test_a_chat(server):
    answer = post(server, CHAT, ask(model="tiny"), headers={"x-request-id": "mine"})
    body = answer.json()
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine"
    assert body["object"] == "chat.completion" and body["model"] == "tiny" and body["id"] == "chatcmpl-mine"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello café, wörld 😀 end"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = body["usage"]
    count = len(server.engine.model.tokenizer.encode("hello café, wörld 😀 end"))
    assert usage["completion_tokens"] == count and usage["total_tokens"] == count + usage["prompt_tokens"]
    assert usage["blockbatch"]["nfe"] == {"init": 1, "block": count, "refresh": 0, "total": count + 1}


def test_a_stream(server):
    whole = post(server, CHAT, ask()).json()
    events, done = stream(server, CHAT, ask(stream_options={"include_usage": True}))
    assert done and {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    first, *pieces, last, usage = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [event["choices"][0]["delta"]["content"] for event in pieces]
    assert len(deltas) > 5 and "".join(deltas) == whole["choices"][0]["message"]["content"]
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)
    assert last["choices"][0]["finish_reason"] == "stop" and last["choices"][0]["delta"] == {}
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    without = stream(server, CHAT, ask())[0]
    assert without[-1]["choices"] and not any("usage" in event for event in without)


def test_completions_of_every_kind_of_prompt(server):
    ids = server.engine.model.tokenizer.encode("some words")
    for prompt in ("some words", ["some words"], ids, [ids]):
        body = post(server, TEXT, {"prompt": prompt}).json()
        assert body["object"] == "text_completion" and body["usage"]["prompt_tokens"] == len(ids)
        assert [choice["text"] for choice in body["choices"]] == ["hello café, wörld 😀 end"]
    body = post(server, TEXT, {"prompt": ["a", "b", "a b"], "max_tokens": 3}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 9
    events, done = stream(server, TEXT, {"prompt": ["a", "b"]})
    texts = ["", ""]
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert done and texts == ["hello café, wörld 😀 end"] * 2
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"][0]["finish_reason"]] == [
        "stop"
    ] * 2


def test_the_answer_is_cut_at_the_limit_and_at_stop_texts(server):
    tokenizer = server.engine.model.tokenizer
    for field in ("max_tokens", "max_completion_tokens"):
        choice = post(server, CHAT, ask(**{field: 2})).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == tokenizer.decode(tokenizer.encode("hello café")[:2])
    # The canvas is larger than the limit, and nothing is decoded for nobody.
    until(lambda: server.engine.requests[-1].status == "cancelled")
    assert server.engine.requests[-1].config.gen_length == 32
    for stop in ("wörld", [", w", "end"], "😀"):
        text = "hello café, wörld 😀 end"
        first = min(text.index(one) for one in ([stop] if isinstance(stop, str) else stop))
        body = post(server, CHAT, ask(stop=stop)).json()["choices"][0]
        assert body["message"]["content"] == text[:first] and body["finish_reason"] == "stop"
        pieces = [
            e["choices"][0]["delta"].get("content", "") for e in stream(server, CHAT, ask(stop=stop))[0]
        ]
        assert "".join(pieces) == text[:first]


def test_what_the_engine_is_asked(server):
    options = {"preset": "fast", "threshold": 0.8, "branches": 2}
    post(server, CHAT, ask(max_tokens=100, stop=["x"], blockbatch=options))
    request = server.engine.requests[-1]
    assert (request.config.commit, request.config.threshold) == ("local_leap", 0.8)
    assert request.config.gen_length == 128 and request.branches == 2
    post(server, CHAT, ask(max_tokens=30, blockbatch={"block_sizes": [8, 24], "gen_length": 48}))
    assert server.engine.requests[-1].config.block_sizes == (8, 24)
    post(server, CHAT, ask(max_tokens=30, blockbatch={"block_sizes": [8, 24]}))
    assert server.engine.requests[-1].config.gen_length == 48
    post(server, CHAT, ask(blockbatch={"method": "dual_cache", "drafts": [1, 2]}, max_tokens=40))
    config = server.engine.requests[-1].config
    assert (config.method, config.drafts, config.gen_length) == ("dual_cache", (1, 2), 64)
    # A prompt that leaves less room than usual gets a smaller canvas, unless it asks for tokens.
    post(server, TEXT, {"prompt": [5] * 900})
    assert server.engine.requests[-1].config.gen_length == 96
    assert post(server, TEXT, {"prompt": [5] * 900, "max_tokens": 97}).status_code == 400


REFUSED = [
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 1}, "top_logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"guided_json": {}}, "guided_json"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": 5}, "stream_options"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "<|mdm_mask|>"}, "stop"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "<|mdm_mask|>"}]}, "prompt"),
    ({"blockbatch": {"treshold": 0.5}}, "blockbatch.treshold"),
    ({"blockbatch": 5}, "blockbatch"),
    ({"blockbatch": {"threshold": 5}}, "blockbatch.threshold"),
    ({"blockbatch": {"strict_published": 3}}, "blockbatch.strict_published"),
    ({"blockbatch": {"block_sizes": [4, "8"]}}, "blockbatch.block_sizes[1]"),
    ({"blockbatch": {"preset": "fats"}}, "blockbatch.preset"),
    ({"blockbatch": {"method": "vanilla", "block_sizes": [4]}}, "blockbatch.block_sizes"),
    ({"blockbatch": {"gen_length": 32}, "max_tokens": 33}, "blockbatch.gen_length"),
    ({"blockbatch": {"block_sizes": [7], "gen_length": 32}}, "blockbatch.block_sizes"),
    ({"blockbatch": {"branches": 0}}, "blockbatch.branches"),
]


@pytest.mark.parametrize("more, param", REFUSED, ids=lambda value: str(value)[:50])
def test_refused_by_name(server, more, param):
    answer = post(server, CHAT, ask() | more)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param.removeprefix("blockbatch.").split("[")[0] in error["message"]


def test_what_asks_for_nothing_is_taken(server):
    harmless = {
        "n": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {},
        "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "metadata": {},
        "seed": 7, "temperature": 0, "top_p": 1, "stop": None, "stream_options": None, "store": False,
        "blockbatch": None, "max_tokens": None,
    }  # fmt: skip
    assert post(server, CHAT, ask(**harmless)).status_code == 200
    assert post(server, TEXT, {"prompt": "a", "echo": False, "best_of": 1, "suffix": ""}).status_code == 200
    for more in ({"echo": True}, {"best_of": 2}, {"suffix": "x"}, {"logprobs": 2}):
        (name,) = more
        assert post(server, TEXT, {"prompt": "a", **more}).json()["error"]["param"] == name
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    assert post(server, CHAT, {"messages": messages}).status_code == 200
    prompt = server.engine.model.tokenizer.decode(server.engine.requests[-1].prompt)
    assert prompt == "x\n\nab"


def test_other_errors(server):
    assert post(server, CHAT, ask(model="other")).status_code == 404
    assert post(server, CHAT, ask(model="other")).json()["error"]["code"] == "model_not_found"
    long = post(server, CHAT, ask(max_tokens=2000)).json()["error"]
    assert long["code"] == "context_length_exceeded"
    for path, status in (("/nothing", 404), (CHAT, 405)):
        answer = get(server, path)
        assert answer.status_code == status and set(answer.json()) == {"error"}
    for content in (b"{", b"", b"[1]", b"\xff\xfe", b"null", b'{"messages": NaN}', b"[" * 100000):
        answer = HTTP.post(server.url + CHAT, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], content[:10]
    plain = HTTP.post(server.url + CHAT, content=json.dumps(ask()), headers={"content-type": "text/plain"})
    assert plain.status_code == 400


def test_models_health_and_version(server):
    assert get(server, "/health").json() == {"status": "ready"}
    assert get(server, "/version").json() == {"version": "0"}
    listed = get(server, "/v1/models").json()
    assert listed["object"] == "list" and [card["id"] for card in listed["data"]] == ["tiny"]
    assert listed["data"][0]["max_model_len"] == 1024
    assert get(server, "/v1/models/tiny").json() == listed["data"][0]
    assert get(server, "/v1/models/other").status_code == 404


def test_the_schema_tells_the_answers(server):
    schema = get(server, "/openapi.json").json()
    chat = schema["paths"][CHAT]["post"]
    assert set(chat["responses"]) == {"200", "400", "401", "404", "413", "500", "503", "504"}
    options = schema["components"]["schemas"]["BlockBatchOptions"]["properties"]
    assert {"preset", "branches", "threshold", "block_sizes", "drafts"} <= set(options)
    assert "HTTPValidationError" not in json.dumps(schema)


def test_metrics(model):
    with serving(model, ScriptedEngine(model, "a b c")) as server:
        post(server, CHAT, ask())
        post(server, CHAT, ask(max_tokens=1))
        assert post(server, CHAT, ask("<|mdm_mask|>")).status_code == 400
        found = {}
        for line in get(server, "/metrics").text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[name.replace('engine="0",', "").replace('model_name="tiny"', "m")] = float(value)
    count = len(model.tokenizer.encode("a b c"))
    assert found["vllm:num_requests_running{m}"] == found["vllm:num_requests_waiting{m}"] == 0
    assert found["vllm:kv_cache_usage_perc{m}"] == 0.25
    assert found["vllm:generation_tokens_total{m}"] == count + 1
    assert found["vllm:prompt_tokens_total{m}"] == 2
    assert found['vllm:request_success_total{finished_reason="stop",m}'] == 1
    assert found['vllm:request_success_total{finished_reason="length",m}'] == 1
    assert found["vllm:time_to_first_token_seconds_count{m}"] == 2
    assert found["vllm:e2e_request_latency_seconds_count{m}"] == 2
    assert found["vllm:request_queue_time_seconds_count{m}"] == 2
    assert found['blockbatch:http_answers_total{m,status="200"}'] == 2
    assert found['blockbatch:http_answers_total{m,status="400"}'] == 1
    assert found['vllm:request_success_total{finished_reason="error",m}'] == 0
    assert found['blockbatch:forwards_total{m,phase="init"}'] == 1
    assert found["blockbatch:adopted_drafts_total{m}"] == 2  # of the one that its engine finished
    assert found["blockbatch:shared_pages{m}"] == 5 and found["blockbatch:refreshes_total{m}"] == 0
    assert found["blockbatch:tokens_per_forward_count{m}"] == 2


def test_a_key(model):
    with serving(model, ScriptedEngine(model), api_key="secret") as server:
        for path in ("/health", "/metrics", "/version", "/"):
            assert get(server, path).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"},
                        {"authorization": "Bearer sécret".encode()}):  # fmt: skip
            for path in (CHAT, TEXT, "/live", "/v1/nothing"):
                answer = HTTP.post(server.url + path, content=b"{", headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert get(server, "/v1/models", headers=headers).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert get(server, "/v1/models", headers=right).status_code == 200
        assert post(server, CHAT, ask(), headers=right).status_code == 200
        schema = get(server, "/openapi.json").json()
        assert schema["paths"][CHAT]["post"]["security"] == [{"key": []}]
        assert "security" not in schema["paths"]["/health"]["get"]


def test_bodies_that_are_too_large(model):
    with serving(model, ScriptedEngine(model), max_body_bytes=1000) as server:
        assert post(server, CHAT, ask("x" * 700)).status_code == 200
        answer = post(server, CHAT, ask("x" * 1000))
        assert answer.status_code == 413 and answer.json()["error"]["type"] == "invalid_request_error"

        def parts():
            for _ in range(20):
                yield b" " * 100

        headers = {"content-type": "application/json"}
        assert HTTP.post(server.url + CHAT, content=parts(), headers=headers).status_code == 413
        assert post(server, CHAT, ask()).status_code == 200


def test_the_log_holds_no_prompts_unless_asked(model, caplog):
    for wanted in (False, True):
        caplog.clear()
        with serving(model, ScriptedEngine(model, "ANSWER"), log_prompts=wanted) as server:
            with caplog.at_level(logging.INFO, "blockbatch.serving"):
                post(server, CHAT, ask("PROMPT"))
                stream(server, CHAT, ask("PROMPT"))
        told = [record.fields for record in caplog.records if record.getMessage() == "request"]
        assert [one["finish"] for one in told] == ["stop"] * 2 and told[0]["completion_tokens"] > 0
        assert ("PROMPT" in str(told), "ANSWER" in str(told)) == (wanted, wanted)
