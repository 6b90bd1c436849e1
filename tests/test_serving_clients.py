"""OpenAI's own client against the server, with the engine and the built-in models behind it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import blockbatch
import picture_traces
from blockbatch.decoding.engine import Engine
from serving_fakes import HTTP, serving, until

openai = pytest.importorskip("openai")

LENGTH = 64


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def server(model):
    with serving(model, Engine(model, max_requests=4), api_key="key") as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as made:
        yield made


def prompts(count=6):
    kinds = ("arithmetic", "code", "symbolic")
    return [picture_traces.problem(kinds[place % 3], place).prompt for place in range(count)]


def messages(text):
    return [{"role": "user", "content": text}]


def generated(model, text, **options):
    options = {"gen_length": LENGTH, **options}
    return blockbatch.generate(model, text, blockbatch.DecodeConfig(**options))


def test_models(client):
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "blockbatch"


def test_a_chat_and_its_stream_are_what_generate_gives(client, model):
    for text in prompts(2):
        expected = generated(model, text)
        answer = client.chat.completions.create(model="tiny", messages=messages(text), max_tokens=LENGTH)
        (choice,) = answer.choices
        assert choice.message.content == expected.text and choice.message.role == "assistant"
        assert choice.finish_reason == ("length" if expected.stop_reason == "length" else "stop")
        assert answer.usage.completion_tokens == len(expected.tokens)
        assert answer.usage.prompt_tokens == len(model.tokenizer.encode(text))
        nfe = answer.usage.blockbatch["nfe"]
        assert (nfe["init"], nfe["block"], nfe["total"]) == (1, expected.nfe.block, expected.nfe.total)
        assert answer.usage.blockbatch["branches"] == len(expected.branches)
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=messages(text), max_tokens=LENGTH, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == expected.text and chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage == answer.usage


def test_many_at_once_each_as_alone(client, model):
    cases = [
        {"method": "dual_cache", "gen_length": 64},
        {"preset": "fast", "gen_length": 64},
        {"block_sizes": (8, 32), "gen_length": 64},
        {"preset": "careful", "gen_length": 32},
    ]

    def config(case):
        given = dict(case)
        preset = given.pop("preset", None)
        return blockbatch.DecodeConfig.preset(preset, **given) if preset else blockbatch.DecodeConfig(**given)

    asked = [(text, cases[place % len(cases)]) for place, text in enumerate(prompts(8))]

    def decode(case):
        text, options = case
        answer = client.completions.create(
            model="tiny", prompt=text, max_tokens=options["gen_length"], extra_body={"blockbatch": options}
        )
        return answer.choices[0].text, answer.usage.blockbatch["nfe"]["total"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(decode, asked))
    for (text, options), answer in zip(asked, answers, strict=True):
        expected = blockbatch.generate(model, text, config(options))
        assert answer == (expected.text, expected.nfe.total)


def test_stop_and_limit(client, model):
    text = prompts(3)[2]
    whole = generated(model, text).text
    stop = whole[len(whole) // 2 :][:3]
    answer = client.chat.completions.create(
        model="tiny", messages=messages(text), max_tokens=LENGTH, stop=[stop]
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(
        model="tiny", messages=messages(text), max_tokens=5, extra_body={"blockbatch": {"gen_length": LENGTH}}
    )
    tokens = generated(model, text).tokens[:5]
    assert short.choices[0].message.content == model.tokenizer.decode(tokens)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 5


def test_completions(client, model):
    text = prompts(1)[0]
    expected = generated(model, text)
    ids = model.tokenizer.encode(text)
    for prompt in (text, ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=LENGTH)
        assert answer.choices[0].text == expected.text
    parts = client.completions.create(model="tiny", prompt=[text, text], max_tokens=LENGTH, stream=True)
    texts = ["", ""]
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [expected.text] * 2


def test_typed_errors(client, server):
    def create(**options):
        return client.chat.completions.create(**{"model": "tiny", "messages": messages("x"), **options})

    with pytest.raises(openai.BadRequestError) as refused:
        create(n=2)
    assert refused.value.param == "n" and refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as refused:
        create(extra_body={"blockbatch": {"threshold": 7}})
    assert refused.value.param == "blockbatch.threshold"
    with pytest.raises(openai.BadRequestError) as refused:
        create(max_tokens=5000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        create(model="other")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()


def test_a_client_of_a_full_server_comes_again(model):
    with serving(model, Engine(model, max_requests=1, max_queue=0)) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=8) as client:

            def create(text):
                return client.chat.completions.create(model="tiny", messages=messages(text), max_tokens=32)

            with ThreadPoolExecutor(3) as pool:
                answers = list(pool.map(create, prompts(3)))
        assert all(answer.choices[0].finish_reason for answer in answers)


def test_a_client_that_leaves_frees_its_pages(model):
    with serving(model, Engine(model)) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x") as client:
            with client.chat.completions.create(
                model="tiny", messages=messages(prompts(1)[0]), max_tokens=512, stream=True,
                extra_body={"blockbatch": {"method": "vanilla", "eos_exit": "none"}},
            ) as chunks:  # fmt: skip
                next(iter(chunks))
                assert server.service.bridge.engine.stats().cache_usage > 0
        wanted = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 1.0'
        until(lambda: wanted in HTTP.get(server.url + "/metrics").text)
        until(lambda: not server.engine.stats().running)
        stats = server.engine.stats()
        assert (stats.running, stats.cancelled, stats.cache_usage) == (0, 1, 0.0)


def test_block_causal_models():
    model = blockbatch.load_model("tiny-block", device="cpu")
    with serving(model, Engine(model, max_requests=2), model_name="blocks") as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            for text in prompts(2):
                expected = generated(model, text)
                answer = client.chat.completions.create(
                    model="blocks", messages=messages(text), max_tokens=LENGTH
                )
                # A canvas that ends with its block holds more tokens than were asked for.
                assert answer.usage.completion_tokens == min(len(expected.tokens), LENGTH)
                kept = model.tokenizer.decode(expected.tokens[:LENGTH])
                assert answer.choices[0].message.content == kept
                assert answer.usage.blockbatch["nfe"]["total"] <= expected.nfe.total
