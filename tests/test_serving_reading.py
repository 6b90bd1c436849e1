"""From bodies to what the engine is asked: chat formats, options on options, canvases and limits."""

from types import SimpleNamespace

import pytest

import blockbatch
from blockbatch.models.tokenizer import Tokenizer
from serving_fakes import ask
from test_tokenizer import DREAM_SPECIAL, LLADA_SPECIAL, write_tokenizer

pydantic = pytest.importorskip("pydantic")
from blockbatch.serving.errors import ApiError  # noqa: E402
from blockbatch.serving.protocol import ChatRequest, CompletionRequest  # noqa: E402
from blockbatch.serving.reading import Reader  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


def with_family(tmp_path, family, special):
    """Something that reads and writes texts as a model of this family does."""
    write_tokenizer(tmp_path, special=special)
    spec = SimpleNamespace(family=family, max_length=4096, prediction_offset=0, block_size=None)
    return SimpleNamespace(tokenizer=Tokenizer.from_folder(tmp_path), spec=spec)


def chat(reader, body=None, **more):
    (job,) = reader.chat(ChatRequest.model_validate({**(body or ask()), **more}))
    return job


@pytest.mark.parametrize(
    "family, special, thinking",
    [("llada", LLADA_SPECIAL, None), ("dream", DREAM_SPECIAL, None), ("sdar", DREAM_SPECIAL, False)],
)
def test_chats_in_the_format_of_the_family(tmp_path, family, special, thinking):
    model = with_family(tmp_path, family, special)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    expected = model.tokenizer.chat(messages, family, enable_thinking=thinking)
    for chat_format in ("auto", "model"):
        reader = Reader(model, {}, chat_format)
        assert not reader.plain_chat
        job = chat(reader, {"messages": messages}, chat_template_kwargs={"enable_thinking": thinking})
        assert model.tokenizer.decode(job.prompt, skip_special=False) == expected
    if family != "sdar":
        with pytest.raises(ApiError, match="enable_thinking"):
            chat(Reader(model, {}), chat_template_kwargs={"enable_thinking": False})
    plain = Reader(model, {}, "plain")
    assert (
        model.tokenizer.decode(chat(plain, {"messages": messages}).prompt)
        == "Be brief.\n\nOne\n\ntwo\n\nthree"
    )


def test_formats_that_a_tokenizer_lacks(model):
    assert Reader(model, {}).plain_chat
    with pytest.raises(ValueError, match="chat_format: expected auto or plain"):
        Reader(model, {}, "model")
    with pytest.raises(ApiError, match="enable_thinking"):
        chat(Reader(model, {}), chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ValueError, match="model: expected a model with a tokenizer"):
        Reader(SimpleNamespace(tokenizer=None), {})


def test_a_request_goes_on_from_the_options_of_the_server(model):
    reader = Reader(model, {"preset": "fast", "gen_length": 96, "threshold": 0.8, "stop": ["x"]})
    job = chat(reader, stop="y")
    assert (job.config.commit, job.config.threshold, job.config.gen_length) == ("local_leap", 0.8, 96)
    assert job.stop == ("x", "y") and job.limit == 96
    job = chat(reader, blockbatch={"threshold": 0.7})
    assert (job.config.commit, job.config.threshold) == ("local_leap", 0.7)
    # Another method or preset has no use for options of the one it replaces.
    job = chat(reader, blockbatch={"method": "dual_cache"})
    assert (job.config.method, job.config.threshold, job.config.gen_length) == ("dual_cache", 0.9, 96)
    job = chat(reader, blockbatch={"preset": "careful"})
    assert job.config.drafts == (1, 2, 3) and job.stop == ("x",)
    with pytest.raises(ValueError, match="threshold"):
        Reader(model, {"threshold": 7})


def test_who_draws_tokens_does_without_the_drafts_of_the_server(model):
    reader = Reader(model, {"preset": "careful"})
    assert chat(reader).config.drafts == (1, 2, 3) == chat(reader, temperature=0).config.drafts
    drawn = chat(reader, temperature=0.7).config
    assert drawn.drafts is None and (drawn.method, drawn.temperature) == ("dual_cache", 0.7)
    for options in ({"drafts": [1]}, {"preset": "careful"}):
        with pytest.raises(ApiError, match="drafts: expected None at a temperature above 0"):
            chat(reader, temperature=0.7, blockbatch=options)


@pytest.mark.parametrize(
    "most, options, canvas",
    [
        (1, {}, 32),
        (32, {}, 32),
        (33, {}, 64),
        (100, {"method": "dual_cache", "block_size": 16}, 112),
        (100, {"block_sizes": [8, 24, 64]}, 192),
        (100, {"gen_length": 200, "block_sizes": [8]}, 200),
        (992, {}, 992),
    ],
)
def test_the_canvas_holds_the_limit(model, most, options, canvas):
    job = chat(Reader(model, {}), max_tokens=most, blockbatch=options)
    assert (job.limit, job.config.gen_length) == (most, canvas)


def test_the_smaller_of_two_limits_counts(model):
    job = chat(Reader(model, {}), max_tokens=50, max_completion_tokens=20)
    assert (job.limit, job.config.gen_length) == (20, 32)


def test_prompts_and_canvases_that_do_not_fit(model):
    reader = Reader(model, {})

    def of(length, **more):
        return reader.completion(CompletionRequest.model_validate({"prompt": [5] * length, **more}))[0]

    assert of(1024 - 256).config.gen_length == 256
    assert (of(800).config.gen_length, of(800).limit) == (224, 224)
    assert of(992).config.gen_length == 32
    for length, more in ((993, {}), (2000, {}), (993, {"max_tokens": 1}), (800, {"max_tokens": 225})):
        with pytest.raises(ApiError) as refused:
            of(length, **more)
        assert refused.value.code == "context_length_exceeded" and refused.value.status == 400


def test_texts_do_not_count_as_numbers():
    for more in ({"max_tokens": "5"}, {"stream": "yes"}, {"temperature": "1"}, {"seed": 1.5}):
        with pytest.raises(pydantic.ValidationError):
            ChatRequest.model_validate({**ask(), **more})
