"""Commit rules of one's own in the engine: requests that join and leave decode as they do alone."""

import random

import pytest
import torch

import blockbatch
from blockbatch.decoding.engine import Engine
from custom_methods import registered, threshold_rule
from engine_mixes import random_config, random_prompt, run_mix
from plain_models import write_llada


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada")
    write_llada(folder, sharpness=3.0, seed=1)
    return lambda device: blockbatch.load_model(folder, device=device, dtype="float32")


def twice(state, candidates, confidence):
    """Needs its memory: a token is written once two forwards in a row predicted it."""
    seen = state.memory["seen"]
    stable = seen == state.top_token + 1
    seen.copy_(torch.where(candidates, state.top_token + 1, seen))
    return stable & (confidence > 0.3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("seed", range(3))
def test_random_mixes_decode_as_alone(load, seed, device):
    model, rng = load(device), random.Random(seed)
    with (
        registered("twice", twice, base="blockbatch", memory={"seen": torch.int32}),
        registered("twice_open", twice, memory={"seen": torch.int32}),
        registered("copy_of_it", threshold_rule, base="prefix_cache", options={"threshold": 0.5}),
    ):
        requests = []
        for _ in range(20):
            prompt, gen_length = random_prompt(rng, model.spec.vocab_size), rng.choice((16, 32))
            config = rng.choice(
                (
                    dict(method="twice", block_sizes=rng.choice(((4, 8), (4, 8, 16)))),
                    dict(method="twice_open", block_size=8, query_span=rng.choice(("window", "open"))),
                    dict(method="copy_of_it", block_size=8, threshold=rng.choice((0.3, 0.9))),
                    None,
                )
            )
            given = (
                random_config(rng, model.spec.vocab_size)
                if config is None
                else blockbatch.DecodeConfig(gen_length=gen_length, **config)
            )
            requests.append((prompt, given))
        # More slots than at first, so that the memory of running requests moves.
        run_mix(model, requests, rng, max_requests=12)


def test_a_rule_that_fails_is_refused_when_it_is_handed_in(load):
    engine = Engine(load("cpu"), cache_tokens=1 << 12)
    other = engine.submit([1, 2, 3], blockbatch.DecodeConfig(gen_length=16))
    with registered("wrong", lambda state, candidates, confidence: confidence):
        with pytest.raises(ValueError, match="method 'wrong': expected a rule that returns a bool tensor"):
            engine.submit([1, 2, 3], blockbatch.DecodeConfig(method="wrong", gen_length=16))
    engine.run_until_idle()
    assert other.status == "finished" and engine.stats().failed == 0
