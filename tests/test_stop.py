"""Stop sequences: the text without them cut where the first begins, for fewer forwards, on every path."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import blockbatch
from blockbatch import branches, generation
from blockbatch.decoding import METHOD_BUILDERS, Session, forward
from blockbatch.stops import StopScan
from blockbatch.tiny import generate_problems
from plain_models import write_dream, write_llada
from test_generation import VOCABULARY, write_tokenizer

texts = st.text("ab€", max_size=12)
stop_texts = st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3)


def cut(text, stop):
    """`text` before the first of `stop`, and whether there is one."""
    found = [text.index(part) for part in stop if part in text]
    return (text[: min(found)], True) if found else (text, False)


@given(texts, stop_texts, st.data())
def test_scan_lets_through_what_no_stop_sequence_can_take(text, stop, data):
    expected, found = cut(text, stop)
    scan, out, read = StopScan(stop), "", 0
    while read < len(text):
        size = data.draw(st.integers(1, 4))
        out += scan.push(text[read : read + size])
        read = min(read + size, len(text))
        assert expected.startswith(out), "what was let through is never taken back"
        assert scan.found == (cut(text[:read], stop)[1] and not waits(text[:read], stop))
        assert scan.found or len(out) > read - max(map(len, stop), default=1)
    assert (out + scan.finish(), scan.found) == (expected, found)


def waits(text, stop):
    """Whether a stop sequence that begins before the first complete one may still be completed."""
    before = len(cut(text, stop)[0])
    return any(
        part.startswith(text[at:]) and len(part) > len(text) - at for part in stop for at in range(before)
    )


@pytest.fixture(params=["llada", "dream"])
def model(request, tmp_path):
    write = {"llada": write_llada, "dream": write_dream}[request.param]
    write(tmp_path, vocab_size=VOCABULARY, sharpness=3.0)  # MASK is the last id, EOS the one before
    write_tokenizer(tmp_path)
    return blockbatch.load_model(tmp_path, device="cpu")


def random_prompts(count):
    rng = random.Random(count)
    return [[rng.randrange(VOCABULARY - 2) for _ in range(rng.randrange(3, 12))] for _ in range(count)]


OPTIONS = {
    "blockbatch": {"block_sizes": (2, 4, 8), "refresh_interval": 8},
    "vanilla": {"block_size": 4},
    "prefix_cache": {"block_size": 4, "eos_exit": "window"},
    "dual_cache": {"block_size": 4, "eos_exit": "prefix"},
    "local_leap": {"block_size": 4},
}


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_a_stop_sequence_ends_decoding_and_nothing_else(model, method):
    """Against the same prompts without: text cut, forwards saved; alone, in a batch and streamed."""
    options = {"method": method, "gen_length": 16, **OPTIONS[method]}
    prompts = random_prompts(3)
    plain = blockbatch.generate(model, prompts, blockbatch.DecodeConfig(**options))
    longest = max(plain, key=lambda result: len(result.text))
    for start in (1, len(longest.text) // 3):
        stop = (longest.text[start : start + 2], "not there")
        config = blockbatch.DecodeConfig(**options, stop=stop)
        results = blockbatch.generate(model, prompts, config)
        for prompt, without, result in zip(prompts, plain, results):
            expected, found = cut(without.text, stop)
            assert result.text == expected
            assert result.stop_reason == ("stop" if found else without.stop_reason)
            assert without.tokens[: len(result.tokens)] == result.tokens
            assert model.tokenizer.decode(result.tokens).startswith(expected)
            assert found or result.nfe == without.nfe
            assert result.nfe.total <= without.nfe.total and result.seconds > 0
            alone, forwards = count_forwards(model, prompt, config)
            assert (alone.text, alone.nfe, alone.branches) == (result.text, result.nfe, result.branches)
            assert forwards == alone.nfe.total, "forwards that were not counted"
            assert "".join(blockbatch.stream(model, prompt, config)) == expected
        # Branches of a random model seldom agree, and then only their end decides what the text is.
        assert results[plain.index(longest)].nfe.total < longest.nfe.total or method == "blockbatch"


def count_forwards(model, prompt, config):
    """The result, and how often the model really ran."""
    session = generation.open_session(model, prompt, config)
    forwards = 0
    while (step := session.step()) is not None:
        forwards += step.plan.query_tokens > 0
    return generation.build_result(model, session, 0), forwards


def test_a_character_of_several_tokens_stops(model):
    """The euro sign takes three tokens of this vocabulary."""
    reader = generation.PrefixReader(model.tokenizer, ("€",), ())
    ids = model.tokenizer.encode("0€1")
    assert len(ids) == 5
    assert [reader.push(ids[:count]) for count in range(1, 5)] == ["0", "", "", ""]
    assert reader.found


def test_a_special_token_stops(model):
    """It has no text, so its id is looked for; even where the canvas is to be filled after an EOS."""
    prompt, options = random_prompts(1)[0], {"method": "dual_cache", "gen_length": 64, "block_size": 8}
    without = blockbatch.generate(model, prompt, blockbatch.DecodeConfig(**options))
    chosen = without.canvas[7]
    config = blockbatch.DecodeConfig(**options, eos_token_ids=(chosen,))
    filled = blockbatch.generate(model, prompt, config)
    assert filled.canvas == without.canvas
    model.tokenizer._backend.add_special_tokens([model.tokenizer._backend.id_to_token(chosen)])
    config = blockbatch.DecodeConfig(**options, stop=(model.tokenizer._backend.id_to_token(chosen),))
    result = blockbatch.generate(model, prompt, config)
    assert result.tokens == without.canvas[: without.canvas.index(chosen)]
    assert result.stop_reason == "stop" and result.nfe.total < without.nfe.total
    assert "".join(blockbatch.stream(model, prompt, config)) == result.text


def test_unused_it_costs_nothing(model, monkeypatch):
    monkeypatch.setattr(branches, "final_prefixes", None)
    monkeypatch.setattr(forward, "replan", None)
    assert blockbatch.generate(model, [1, 2, 3], blockbatch.DecodeConfig(gen_length=32)).nfe.total > 0


GPU_REFERENCE = pytest.param("cuda", "reference", marks=pytest.mark.gpu, id="reference-on-a-gpu")
PLACES = [
    pytest.param("cpu", None, id="reference"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu, id="cuda"),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu, id="triton"),
]


@pytest.mark.parametrize("eos_exit", ["prefix", "window", "none"])
@pytest.mark.parametrize("device, backend", PLACES)
def test_planning_anew_changes_nothing(tmp_path, device, backend, eos_exit):
    write_llada(tmp_path, vocab_size=VOCABULARY, sharpness=3.0)
    model = blockbatch.load_model(tmp_path, device=device, dtype="float32", backend=backend)
    config = blockbatch.DecodeConfig(
        gen_length=32, block_sizes=(4, 8, 32), refresh_interval=8, eos_exit=eos_exit
    )
    method = METHOD_BUILDERS["blockbatch"](config, model.spec, (VOCABULARY - 2,))
    session = Session(model, random_prompts(3), method, 32)
    phases = set()
    while (step := session.step()) is not None:
        phases.add(step.phase)
        before = [tensor.clone() for tensor in (*vars(session.state).values(), *session._batch.plan)]
        with torch.inference_mode():
            forward.replan(session._batch)
        after = [*vars(session.state).values(), *session._batch.plan]
        assert all(old.equal(new) for old, new in zip(before, after, strict=True))
    assert phases == {"init", "block", "refresh"}


@pytest.mark.parametrize("device, backend", [*PLACES, GPU_REFERENCE])
def test_the_trained_model_stops(device, backend):
    """Captured steps or not, alone or in a batch: the same end and the same count, after fewer forwards."""
    model = blockbatch.load_model("tiny", device=device, dtype="float32", backend=backend)
    prompts = [problem.prompt for problem in generate_problems("arithmetic", "test", 3, 0)]
    plain = blockbatch.generate(model, prompts, blockbatch.DecodeConfig(gen_length=128))
    config = blockbatch.DecodeConfig(gen_length=128, stop=("\n",))
    results = blockbatch.generate(model, prompts, config)
    for prompt, without, result in zip(prompts, plain, results):
        assert result.text == without.text.split("\n")[0] and result.stop_reason == "stop"
        alone = blockbatch.generate(model, prompt, config)
        assert (alone.text, alone.nfe) == (result.text, result.nfe)
    assert sum(result.nfe.total for result in results) < sum(without.nfe.total for without in plain)


@pytest.mark.parametrize(
    "stop, error, message",
    [
        (b"Question:", TypeError, "stop: expected a sequence of texts, got b'Question:'"),
        (None, TypeError, "stop: expected a sequence of texts, got None"),
        ([1], TypeError, "stop: expected texts, got 1"),
        (["a", ""], ValueError, "stop: expected texts of at least one character, got an empty one"),
    ],
)
def test_bad_stop_sequences(stop, error, message):
    with pytest.raises(error, match=message):
        blockbatch.DecodeConfig(stop=stop)


def test_stop_sequences_that_the_model_cannot_write(model):
    config = blockbatch.DecodeConfig(gen_length=32, stop=("<|mdm_mask|>",))
    with pytest.raises(ValueError, match="stop: expected texts that can be decoded, got the MASK token"):
        blockbatch.generate(model, [1], config)
    model.tokenizer = None
    config = blockbatch.DecodeConfig(gen_length=32, stop=("a",))
    for decode in (blockbatch.generate, generation.open_session):
        with pytest.raises(ValueError, match="stop: expected a model with a tokenizer to find texts"):
            decode(model, [1], config)


def test_command_line(capsys):
    from blockbatch.cli import main

    arguments = ["generate", "--prompt", "a = 3\n", "--gen-length", "64", "--json", "--no-live"]
    assert main(arguments) == 0
    plain = json.loads(capsys.readouterr().out)
    stop = plain["text"][len(plain["text"]) // 3 :][:2]
    assert main([*arguments, "--stop", "not there", "--stop", stop]) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["text"] == plain["text"].split(stop)[0]
    assert stopped["stop_reason"] == "stop" and stopped["settings"]["stop"] == ["not there", stop]
    assert plain["settings"]["stop"] == []
