"""How callers write it: conversations, streams with a result, settings of every prompt."""

import gc
import random
import weakref
from types import MappingProxyType

import numpy as np
import pytest
import torch

import block_models
import blockbatch
from blockbatch import generation
from blockbatch.models.chat import SPECIAL_TOKENS, format_chat
from plain_models import write_dream, write_llada
from test_tokenizer import write_tokenizer

ENDS = ("<|endoftext|>", "<|mask|>")
CONFIG = blockbatch.DecodeConfig(gen_length=16, block_sizes=(4, 16))
METHODS = [
    CONFIG,
    blockbatch.DecodeConfig("vanilla", gen_length=8),
    blockbatch.DecodeConfig("prefix_cache", gen_length=16),
    blockbatch.DecodeConfig("dual_cache", gen_length=16, drafts=(1, 2), eos_exit="prefix"),
    blockbatch.DecodeConfig("local_leap", gen_length=16, stop="7"),
    blockbatch.DecodeConfig.preset("fast", gen_length=32),
]


def load(folder, family):
    """A random instruct model: MASK is the last id, EOS the one before."""
    special = [*dict.fromkeys((*SPECIAL_TOKENS[family], *ENDS))]
    write = {"llada": write_llada, "dream": write_dream}[family]
    write(folder, vocab_size=256 + len(special), sharpness=4.0)
    write_tokenizer(folder, special, eos_token="<|endoftext|>")
    return blockbatch.load_model(folder, device="cpu")


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request, tmp_path_factory):
    return load(tmp_path_factory.mktemp("model"), request.param)


def outcome(result):
    return result.text, result.tokens, result.canvas, result.nfe, result.stop_reason, result.branches


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


def test_a_conversation(model):
    text = format_chat(TURNS, model.spec.family, model.tokenizer.token_to_id)
    expected = blockbatch.generate(model, model.tokenizer.encode(text), CONFIG)
    assert outcome(model.chat(TURNS, CONFIG)) == outcome(expected)
    assert outcome(model.chat(tuple(map(MappingProxyType, TURNS)), CONFIG)) == outcome(expected)
    ids = model.chat_ids(TURNS)
    assert outcome(blockbatch.generate(model, ids, CONFIG)) == outcome(expected)
    assert "".join(blockbatch.stream(model, np.array(ids), CONFIG)) == expected.text


def test_one_user_message_is_a_conversation(model):
    alone = [{"role": "user", "content": "One?"}]
    assert model.chat_ids("One?") == model.chat_ids(alone)
    assert outcome(model.chat("One?", CONFIG)) == outcome(model.chat(alone, CONFIG))


def test_a_conversation_ends_at_a_stop_text(model):
    answers = {message: model.chat(message, CONFIG).text for message in "abcdefgh"}
    message, whole = next((message, text) for message, text in answers.items() if len(set(text)) > 1)
    stop = next(character for character in whole if character != whole[0])
    config = blockbatch.DecodeConfig(gen_length=16, block_sizes=(4, 16), stop=stop)
    result = model.chat(message, config)
    assert result.stop_reason == "stop" and result.text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "messages, error, message",
    [
        (None, TypeError, "messages: expected a list of .*, got NoneType"),
        ({"role": "user", "content": "a"}, TypeError, "messages: expected a list of .*, got dict"),
        ([], ValueError, "messages: expected at least one message, got none"),
        (["a"], TypeError, r"messages\[0\]: expected .*, got 'a'"),
        ([TURNS[0], {"role": "user"}], TypeError, r"messages\[1\]: expected .*, got .'role': 'user'"),
        ([{"role": "bot", "content": "a"}], ValueError, "role must be one of .*, got 'bot'"),
        ([{"role": "user", "content": 3}], ValueError, "content must be text, got 3"),
        (
            [{"role": "user", "content": "a\ud83db"}],
            ValueError,
            "messages: expected text of whole characters",
        ),
        ("a <|mask|>", ValueError, "messages: expected no MASK token"),
    ],
    ids=repr,
)
def test_what_is_no_conversation(model, messages, error, message):
    with pytest.raises(error, match=message):
        model.chat(messages, CONFIG)


def test_thinking_is_sdars(model):
    with pytest.raises(ValueError, match="enable_thinking must be None"):
        model.chat(TURNS, CONFIG, enable_thinking=False)


def test_who_cannot_chat(tmp_path):
    base = blockbatch.load_model("tiny", device="cpu")
    with pytest.raises(blockbatch.CheckpointError, match="not trained for chat"):
        base.chat("One?")
    write_llada(tmp_path)
    bare = blockbatch.load_model(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="messages: expected a model with a tokenizer, got one without"):
        bare.chat("One?")


def test_settings_of_every_prompt(model):
    rng = random.Random(1)
    configs = [rng.choice(METHODS) for _ in range(14)]
    prompts = [[rng.randrange(250) for _ in range(rng.randrange(1, 12))] for _ in configs]
    alone = [
        blockbatch.generate(model, prompt, config) for prompt, config in zip(prompts, configs, strict=True)
    ]
    for given in (configs, tuple(configs)):
        together = blockbatch.generate(model, prompts, given)
        assert [outcome(result) for result in together] == [outcome(result) for result in alone]
    assert blockbatch.generate(model, [], []) == []


def test_prompts_of_equal_settings_run_together(model, monkeypatch):
    batches = []
    original = generation._session
    monkeypatch.setattr(generation, "_session", lambda *a: batches.append(len(a[1])) or original(*a))
    again = blockbatch.DecodeConfig(gen_length=16, block_sizes=(16, 4))  # another object of the same settings
    blockbatch.generate(model, [[1], [2], [3], [4]], [CONFIG, METHODS[1], again, METHODS[1]])
    assert batches == [2, 2]


def test_settings_that_are_not_one_for_each(model):
    for prompt, config, error, message in (
        ([[1], [2]], [CONFIG], ValueError, "config: expected one for each of 2 prompts, got 1"),
        ([[1], [2]], [CONFIG, None], TypeError, r"config\[1\]: expected a DecodeConfig, got NoneType"),
        ([[1], [2]], "fast", TypeError, "config: expected a DecodeConfig or a list of them, got str"),
        ([1, 2], [CONFIG, CONFIG], TypeError, "config: expected a DecodeConfig for one prompt, got list"),
        ([[1], [2]], [CONFIG, blockbatch.DecodeConfig("block_diffusion")], ValueError, "method: expected"),
    ):
        with pytest.raises(error, match=message):
            blockbatch.generate(model, prompt, config)
    with pytest.raises(TypeError, match="config: expected a DecodeConfig for one prompt, got list"):
        blockbatch.stream(model, [1], [CONFIG])


def test_bad_input_of_a_later_group_is_told_before_any_work(model, monkeypatch):
    monkeypatch.setattr(generation, "_session", lambda *a: pytest.fail("work"))
    long = blockbatch.DecodeConfig(gen_length=2**20)
    with pytest.raises(ValueError, match=r"prompt\[1\]: expected prompt and gen_length to fit"):
        blockbatch.generate(model, [[1], [2]], [CONFIG, long])


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_a_stream_holds_the_result(model, config):
    prompt = [1, 2, 3]
    stream = blockbatch.stream(model, torch.tensor(prompt), config)
    assert isinstance(stream, blockbatch.Stream) and iter(stream) is stream
    pieces = []
    for piece in stream:
        pieces.append(piece)
    assert "".join(pieces) == stream.result.text and all(pieces)
    assert outcome(stream.result) == outcome(blockbatch.generate(model, prompt, config))
    assert next(stream, None) is None


def test_a_stream_has_no_result_before_its_end(model):
    stream = blockbatch.stream(model, [1, 2], METHODS[1])
    assert stream.result is None
    assert next(stream) and stream.result is None


def test_a_stream_records_a_trace(model):
    config = blockbatch.DecodeConfig(gen_length=16, block_sizes=(4, 16), trace=True)
    stream = blockbatch.stream(model, [1, 2], config)
    list(stream)
    expected = blockbatch.generate(model, [1, 2], config).trace
    plain = [{**record, "seconds": 0} for record in expected]
    assert [{**record, "seconds": 0} for record in stream.result.trace] == plain and plain


def held_by(stream):
    """Whether the session of a stream is alive, asked later."""
    session, _ = stream._running
    return weakref.ref(session)


def test_leaving_a_stream_ends_the_decode(model):
    with blockbatch.stream(model, [1, 2], METHODS[1]) as stream:
        session = held_by(stream)
        assert next(stream) and session() is not None
    gc.collect()
    assert session() is None and stream.result is None
    assert list(stream) == []
    with pytest.raises(ZeroDivisionError):
        with blockbatch.stream(model, [1, 2], METHODS[1]) as stream:
            session = held_by(stream)
            raise ZeroDivisionError
    assert session() is None
    with blockbatch.stream(model, [1, 2], METHODS[1]) as stream:
        list(stream)
    assert stream.result is not None, "leaving takes nothing away"


def test_a_stream_that_fails_is_closed(model, monkeypatch):
    stream = blockbatch.stream(model, [1, 2], METHODS[1])
    session = held_by(stream)
    monkeypatch.setattr(type(session()), "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert stream._running is None and list(stream) == []


def test_numbers_that_break_end_a_stream_and_free_it(tmp_path):
    broken = load(tmp_path, "llada")
    broken.weights.lm_head[:] = float("nan")
    stream = blockbatch.stream(broken, [1, 2], CONFIG)
    session = held_by(stream)
    with pytest.raises(blockbatch.NonFiniteLogitsError) as caught:
        next(stream)
    assert caught.value.name == "prompt" and session() is None


def test_block_causal_models_stream_and_mix(tmp_path):
    model = blockbatch.load_model(block_models.write(tmp_path / "sdar", "sdar"), device="cpu")
    configs = [
        blockbatch.DecodeConfig("block_diffusion", gen_length=32),
        blockbatch.DecodeConfig(gen_length=32, block_sizes=(4, 16)),
    ]
    prompts = [block_models.prompt(9, 0), block_models.prompt(9, 1)]
    mixed = blockbatch.generate(model, prompts, configs)
    assert [outcome(result) for result in mixed] == [
        outcome(blockbatch.generate(model, prompt, config))
        for prompt, config in zip(prompts, configs, strict=True)
    ]
