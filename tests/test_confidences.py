"""How sure the model was of each token at its commit: as a naive decoder sees it, forward by forward."""

import contextlib
import math
import random
from collections import Counter

import pytest
import torch

import blockbatch
from blockbatch.decoding.engine import Engine
from cuda_places import open_place
from engine_mixes import random_prompt, scripted
from oracle import OracleConfig, decode
from plain_models import PlainModel, write_llada

CASES = {
    "dual cache": dict(method="dual_cache", block_size=8, eos_exit="prefix"),
    "dual cache, open queries": dict(method="dual_cache", block_size=16, query_span="open", eos_exit="none"),
    "vanilla": dict(method="vanilla", block_size=16, steps=24, threshold=None),
    "drafts": dict(method="dual_cache", block_size=16, eos_exit="prefix", drafts=(1, 3, 6)),
    "blockbatch": dict(block_sizes=(4, 8, 16, 48), sync_threshold=2, refresh_interval=16),
    "blockbatch, generation": dict(block_sizes=(8, 16), refresh_scope="generation", sync_threshold=4),
}


def naive(model, prompt, options):
    """What a request's confidences must be by the oracle's log, its result, and what happened on the way."""
    own = {name: value for name, value in options.items() if name != "drafts"}
    result = decode(model, prompt, OracleConfig(**own))
    count, length, start, mask = (
        len(result.branches), options["gen_length"], len(prompt), model.mask_token_id,
    )  # fmt: skip
    kept, told, seen = [{} for _ in range(count)], [], Counter()
    held, synced = [[mask] * length for _ in range(count)], [0] * count
    for record in result.log:
        branches = record["state"]["branches"]
        follows = [branch["synced"] > before for branch, before in zip(branches, synced)]
        for index, branch in enumerate(branches):
            for position, token in enumerate(branch["tokens"][start:]):
                if held[index][position] == mask != token and not follows[index]:
                    kept[index][position] = branch["confidence"][start + position]
        leads = [index for index in range(count) if not follows[index]]
        leader = max(leads, key=lambda index: (branches[index]["decoded"], -index))
        for index in range(count):
            if follows[index]:
                kept[index] = dict(kept[leader])
                seen["synced"] += 1
        held, synced = [branch["tokens"][start:] for branch in branches], [b["synced"] for b in branches]
        while len(told) < length and len({line[len(told)] for line in held} | {mask}) == 2:
            if mask in {line[len(told)] for line in held}:
                break
            told.append(kept[0][len(told)])
    while len(told) < length and result.canvas[len(told)] != mask:
        told.append(kept[result.winner][len(told)])
    seen["merged"] = sum(branch["merged"] for branch in result.branches)
    return told, result, seen


def assert_close(found, expected):
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["reference", "host"])
@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_a_naive_decoder(monkeypatch, case, place):
    """In company of requests that ask for none and of larger ones; by the reference and by CUDA C++."""
    seen, options = Counter(), {"gen_length": 48, "threshold": 0.6, **CASES[case]}
    operators = open_place("cpu").default(monkeypatch) if place == "host" else contextlib.nullcontext()
    with operators:
        for seed in range(3):
            rng, model = random.Random(seed), scripted(seed)
            config = blockbatch.DecodeConfig(**options)
            longer = blockbatch.DecodeConfig(**{**options, "gen_length": 96})
            prompts = [random_prompt(rng, model.spec.vocab_size) for _ in range(14)]
            engine = Engine(model, max_requests=16, cache_tokens=1 << 14)
            others = [engine.submit(prompts[0], config)]
            asking = [engine.submit(prompt, config, confidences=True) for prompt in prompts[1:3]]
            for _ in range(3):
                engine.step()
            # More requests than there are slots at first, with longer canvases: the state grows.
            others += [engine.submit(prompt, longer) for prompt in prompts[3:13]]
            asking.append(engine.submit(prompts[13], config, confidences=True))
            engine.run_until_idle()
            assert all(one.confidences is None and one.result.confidences is None for one in others)
            for request in asking:
                told, result, events = naive(model.scripted, request.prompt, options)
                assert request.result.tokens == result.tokens
                assert_close(request.confidences[: len(told)], told)
                assert len(request.confidences) >= len(request.final)
                assert request.result.confidences == request.confidences[: len(request.result.tokens)]
                seen += events
                seen["adopted"] += request.result.adopted
    expected = {"blockbatch": {"merged", "synced"}, "drafts": {"adopted"}}.get(case, set())
    assert expected <= {name for name, number in seen.items() if number}, seen


@pytest.mark.parametrize("case", ["vanilla", "dual cache", "blockbatch"])
def test_those_of_a_transformer(tmp_path, case):
    """Against a plain one, whose keys and values are a list for each row."""
    write_llada(tmp_path, sharpness=3.0, seed=1)
    model, options = (
        blockbatch.load_model(tmp_path, device="cpu"),
        {"gen_length": 48, "threshold": 0.4, **CASES[case]},
    )
    plain = PlainModel(tmp_path)
    config = blockbatch.DecodeConfig(**options)
    engine = Engine(model, max_requests=4, cache_tokens=4096)
    asking = [engine.submit(prompt, config, confidences=True) for prompt in ([3, 5, 8, 2], [7] * 20)]
    engine.run_until_idle()
    for request in asking:
        told, result, _ = naive(plain, request.prompt, options)
        assert request.result.tokens == result.tokens
        assert_close(request.confidences[: len(told)], told)


@pytest.mark.parametrize(
    "options", [{"method": "block_diffusion"}, {}, {"block_sizes": (4, 8, 32), "sync_threshold": 2}]
)
def test_block_causal_models(options):
    """As the traces of `generate` have them."""
    model = blockbatch.load_model("tiny-block", device="cpu")
    config = blockbatch.DecodeConfig(gen_length=64, **options)
    prompt = model.tokenizer.encode("Divide with remainder until zero: 51 and 16.")
    engine = Engine(model, max_requests=2)
    asked, other = engine.submit(prompt, config, confidences=True), engine.submit(prompt, config)
    engine.run_until_idle()
    traced = blockbatch.generate(model, prompt, blockbatch.DecodeConfig(gen_length=64, trace=True, **options))
    assert asked.result.tokens == other.result.tokens == traced.tokens and other.confidences is None
    at = {}
    for record in traced.trace:
        for commit in record["commits"]:
            for position, token, value in zip(commit["positions"], commit["tokens"], commit["confidence"]):
                at.setdefault((position, token), []).append(value)
    found = asked.result.confidences
    assert len(found) == len(traced.tokens) and all(0 < value <= 1 for value in found)
    known = [
        any(math.isclose(value, one, rel_tol=1e-4) for one in at.get(place, ()))
        for place, value in zip(enumerate(traced.tokens), found)
    ]
    merged = sum(branch.merged for branch in traced.branches)
    assert known.count(False) <= merged  # of which a trace tells no confidence


def test_another_measure_is_no_probability():
    engine = Engine(scripted(0), max_requests=2, cache_tokens=1 << 12)
    with pytest.raises(ValueError, match="confidence: expected 'probability'"):
        engine.submit([1, 2], blockbatch.DecodeConfig(gen_length=32, confidence="entropy"), confidences=True)
