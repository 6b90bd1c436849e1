"""`logprobs` of chats and completions: the log of how sure the model was of each token at its commit."""

import math

import openai
import pytest

import blockbatch
from blockbatch.decoding.engine import Engine
from blockbatch.serving import moves
from blockbatch.serving.logprobs import TokenLogprobs, of_chat, of_completion
from blockbatch.serving.reading import Reader
from serving_fakes import ScriptedEngine, ask, get, post, serving, stream

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ANSWER = "a b c d e f g h"


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture(params=[1, 3])
def server(request, model):
    with serving(model, ScriptedEngine(model, ANSWER, pace=request.param)) as made:
        yield made


def expected(model, text=ANSWER, first=1):
    ids = model.tokenizer.encode(text)
    return [(model.tokenizer.decode([token]), math.log(1 / n)) for n, token in enumerate(ids, first)]


def entries(content):
    return [(one["token"], one["logprob"]) for one in content]


def test_whole_answers(server, model):
    body = ask(logprobs=True, top_logprobs=0)
    choice = post(server, CHAT, body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert choice["message"]["content"] == ANSWER and entries(content) == expected(model)
    assert all(one["top_logprobs"] == [] for one in content)
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == ANSWER
    for count in (0, 1):
        choice = post(server, TEXT, {"prompt": "x", "logprobs": count}).json()["choices"][0]
        told = choice["logprobs"]
        assert list(zip(told["tokens"], told["token_logprobs"], strict=True)) == expected(model)
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert choice["text"].startswith(token, offset)
        tops = [{token: value} for token, value in expected(model)]
        assert told["top_logprobs"] == (tops if count else None)
    for path, body in (
        (CHAT, ask()),
        (CHAT, ask(logprobs=False)),
        (TEXT, {"prompt": "x", "logprobs": False}),
    ):
        assert post(server, path, body).json()["choices"][0]["logprobs"] is None


def test_streams_tell_each_token_with_its_text(server, model):
    events, done = stream(server, CHAT, ask(logprobs=True))
    text, content = "", []
    for event in events:
        choice = event["choices"][0]
        text += choice["delta"].get("content") or ""
        content += (choice["logprobs"] or {"content": []})["content"]
        assert len("".join(one["token"] for one in content)) <= len(text)  # none before its text
    assert done and text == ANSWER and entries(content) == expected(model)
    events, _ = stream(server, TEXT, {"prompt": ["x", "y"], "logprobs": 0})
    for index in range(2):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        told = [choice["logprobs"] for choice in own if choice["logprobs"]]
        tokens = [token for one in told for token in one["tokens"]]
        offsets = [offset for one in told for offset in one["text_offset"]]
        assert tokens == [token for token, _ in expected(model)]
        assert all(ANSWER.startswith(token, offset) for token, offset in zip(tokens, offsets))
    events, _ = stream(server, CHAT, ask())
    assert all(event["choices"][0]["logprobs"] is None for event in events)


def test_limits_and_stop_texts_end_the_tokens_too(server, model):
    for body, kept in ((ask(max_tokens=3), 3), (ask(stop="e f"), None)):
        answer = post(server, CHAT, {**body, "logprobs": True}).json()
        content = answer["choices"][0]["logprobs"]["content"]
        assert (
            len(content)
            == answer["usage"]["completion_tokens"]
            == (kept or len(content))
            < len(expected(model))
        )
        assert entries(content) == expected(model)[: len(content)]
        events, _ = stream(server, CHAT, {**body, "logprobs": True})
        streamed = [event["choices"][0]["logprobs"] for event in events]
        assert [one for told in streamed if told for one in told["content"]] == content


def test_characters_of_several_tokens(model):
    """A token is told once its bytes are text; alone it is no character."""
    ids = model.tokenizer.encode("a\N{GRINNING FACE}b")
    assert len(ids) > 3
    told = TokenLogprobs(model.tokenizer)
    decoded = "a\N{GRINNING FACE}b"
    for count in range(1, len(ids) + 1):
        settled = len(model.tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}"))
        told.push(ids[:count], [0.5] * count, settled)
    assert told.push(ids, [0.5] * len(ids), None) == [] and len(told.told) == len(ids)
    content = of_chat(told.told)["content"]
    assert content[0]["bytes"] == [97] and content[1]["bytes"] is None
    offsets = of_completion(told.told, False)["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] == decoded.index("b")
    assert of_chat(None) is None and of_completion(None, True) is None
    none = TokenLogprobs(model.tokenizer).push(ids[:1], [0.0], None)
    assert math.isfinite(none[0].logprob)


def test_clients_read_them_from_a_real_engine(model):
    prompt = "Divide with remainder until zero: 51 and 16."
    config = blockbatch.DecodeConfig(gen_length=64)
    alone = Engine(model, max_requests=2)
    request = alone.submit(model.tokenizer.encode(prompt), config, confidences=True)
    alone.run_until_idle()
    logs = [math.log(sure) for sure in request.result.confidences]
    with serving(model, Engine(model, max_requests=4)) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            chat = dict(model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=64)
            answer = client.chat.completions.create(**chat, logprobs=True).choices[0]
            assert answer.message.content == request.result.text
            assert [one.logprob for one in answer.logprobs.content] == pytest.approx(logs, abs=1e-4)
            assert all(one.logprob <= 0 for one in answer.logprobs.content)
            streamed = []
            for chunk in client.chat.completions.create(**chat, logprobs=True, stream=True):
                if chunk.choices[0].logprobs is not None:
                    streamed += chunk.choices[0].logprobs.content
            assert [one.logprob for one in streamed] == pytest.approx(logs, abs=1e-4)
            text = client.completions.create(model="tiny", prompt=prompt, max_tokens=64, logprobs=1).choices[
                0
            ]
            assert text.logprobs.token_logprobs == pytest.approx(logs, abs=1e-4)
        # Another measure of being sure has no probability to tell.
        body = ask(prompt, logprobs=True, max_tokens=64, blockbatch={"confidence": "entropy"})
        error = post(server, CHAT, body)
        assert error.status_code == 400 and "expected 'probability'" in error.json()["error"]["message"]


def test_the_schema_has_them(server):
    parts = get(server, "/openapi.json").json()["components"]["schemas"]
    assert {"ChatLogprobs", "CompletionLogprobs"} <= set(parts)
    asked = (
        parts["ChatRequest"]["properties"]["logprobs"],
        parts["CompletionRequest"]["properties"]["logprobs"],
    )
    assert all("in the forward that committed it" in one["description"] for one in asked)


def test_a_worker_of_dynamo_tells_them(model):
    ids, asked = model.tokenizer.encode(ANSWER), {"token_ids": [9], "output_options": {"logprobs": 0}}
    for sent in (0, 3):
        moved = {**asked, "token_ids": [9, *ids[:sent]], "migration_link": moves.link(1, 1)}
        read = moves.read(moved if sent else asked, Reader(model, {}), "name")
        engine, told = ScriptedEngine(model, ANSWER), []
        request = engine.submit(read.job.prompt, read.job.config, on_update=lambda _: None, confidences=True)
        stream = moves.TokenStream(model, read)
        while not stream.done:
            engine.step()
            chunk = stream.chunk(request)
            told += [] if chunk is None else chunk.get("log_probs", [])
        assert told == pytest.approx([value for _, value in expected(model)][sent:])
