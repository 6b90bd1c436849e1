"""The engine: requests that join and leave at any forward decode as they do alone."""

import random
from collections import Counter

import pytest
import torch

import blockbatch
from blockbatch.decoding.engine import Engine
from cuda_places import open_place
from custom_methods import registered
from engine_mixes import outcome, random_config, random_mix, random_prompt, run_mix, scripted
from interpreter import interpreted_checks
from plain_models import write_dream, write_llada

WRITERS = {"llada": write_llada, "dream": write_dream}


@pytest.fixture(scope="module", params=WRITERS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder, sharpness=3.0, seed=1)
    return blockbatch.load_model(folder, device="cpu")


def options_of(seed):
    """Of an engine: room for few whole rows or many, few requests or many at a time, with and without
    cancels."""
    rng = random.Random(seed)
    return dict(
        max_tokens_per_step=rng.choice((1, 60, 150, None)),
        max_requests=rng.choice((2, 5, 12)),
        cancel=rng.choice((0.0, 0.3)),
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_mixes_of_a_transformer(model, seed):
    is_dream = model.spec.prediction_offset == 1
    random_mix(model, 10 * seed + is_dream, 16, dream=is_dream, samples=True, **options_of(seed))


@pytest.mark.parametrize("dream", [False, True], ids=["llada", "dream"])
@pytest.mark.parametrize("place", ["reference", "host"])
def test_random_mixes_see_the_right_keys(monkeypatch, place, dream):
    """On a model that tells which K/V each query saw, with the reference and with the CUDA C++ operators."""
    seen, seeds = Counter(), range(1) if place == "reference" else range(2, 10)
    for seed in seeds:
        fake = scripted(seed, dream)
        if place == "host":
            with open_place("cpu").default(monkeypatch):
                engine, requests = random_mix(fake, 1000 * seed, 24, dream=dream, **options_of(seed))
        else:
            engine, requests = random_mix(fake, 1000 * seed, 24, dream=dream, **options_of(seed))
        results = [request.result for request in requests if request.result]
        seen.update(result.stop_reason for result in results)
        for name in ("merged", "synced", "adopted"):
            seen[name] += sum(getattr(branch, name) for result in results for branch in result.branches)
        stats = engine.stats()
        seen["spared"] += sum(request.nfe.total for request in requests) - stats.steps
        seen["mixed"] += sum(stats.forwards.values()) - stats.steps
        seen["cancelled"] += stats.cancelled
    # Requests share forwards, and forwards hold several phases.
    expected = {"eos", "length", "spared", "mixed"}
    if place == "host":
        expected |= {"synced", "merged", "cancelled"} | (set() if dream else {"adopted"})
    assert expected <= {name for name, count in seen.items() if count > 0}, seen


def test_random_mixes_in_triton():
    """Of Triton's operators in the interpreter."""
    checks = interpreted_checks("triton_engine_checks.py")
    assert len(checks) == 3 and not any(checks.values()), checks


def test_windows_and_whole_rows_share_a_forward(model):
    """A second request's init goes along with the first one's windows."""
    engine = Engine(model, max_requests=4, cache_tokens=4096)
    config = blockbatch.DecodeConfig(
        gen_length=32, block_sizes=(8, 32), eos_exit="none", threshold=1.0, refresh_interval=None
    )
    first = engine.submit([1, 2, 3], config)
    engine.step()
    engine.step()
    second = engine.submit([4, 5, 6, 7], config)
    before = engine.stats()
    engine.step()
    after = engine.stats()
    assert after.steps == before.steps + 1
    assert after.forwards["init"] == before.forwards["init"] + 1
    assert after.forwards["block"] == before.forwards["block"] + 1
    assert (first.nfe.block, second.nfe.init) == (2, 1)
    engine.run_until_idle()
    for request, prompt in ((first, [1, 2, 3]), (second, [4, 5, 6, 7])):
        assert outcome(request.result) == outcome(blockbatch.generate(model, prompt, config))


def test_whole_rows_beyond_the_budget_wait_while_windows_go_on(model):
    """A refresh of several rows goes a row at a time; the other request decodes meanwhile."""
    sizes = dict(gen_length=64, block_sizes=(4, 8, 16, 32), eos_exit="none", threshold=1.0)
    often = blockbatch.DecodeConfig(**sizes, refresh_interval=4, sync_threshold=None)
    never = blockbatch.DecodeConfig(**sizes, refresh_interval=None)
    engine = Engine(model, max_requests=2, max_tokens_per_step=1, cache_tokens=4096)
    refreshing, steady = engine.submit([1, 2, 3], often), engine.submit([4, 5], never)
    held_up = most = 0
    while engine.step():
        stood = steady.nfe.block, refreshing.nfe.total
        if steady.ended or refreshing.ended or steady.nfe.init == 0:
            continue
        engine.step()
        assert steady.ended or steady.nfe.block > stood[0]
        held_up = held_up + 1 if refreshing.nfe.total == stood[1] else 0
        most = max(most, held_up)
    assert most > 0, "a refresh took several forwards"
    for request, prompt, config in ((refreshing, [1, 2, 3], often), (steady, [4, 5], never)):
        assert outcome(request.result) == outcome(blockbatch.generate(model, prompt, config))


def test_rules_of_ones_own(model):
    """One that keeps a tensor between forwards, beside requests of other methods."""

    def surest(state, candidates, confidence):
        state.memory["seen"].add_(1)
        late = state.memory["seen"] > 3
        return candidates & ((confidence >= state.options["threshold"]) | late)

    with registered("surest", surest, options={"threshold": 0.6}, memory={"seen": torch.int32}):
        rng, requests = random.Random(4), []
        for index in range(12):
            config = random_config(rng, model.spec.vocab_size)
            if index % 2:
                config = blockbatch.DecodeConfig(
                    method="surest", gen_length=rng.choice((16, 32)), threshold=rng.choice((0.3, 0.6))
                )
            requests.append((random_prompt(rng, model.spec.vocab_size), config))
        run_mix(model, requests, rng, max_tokens_per_step=60)


@pytest.mark.parametrize("seed", range(3))
def test_half_done_refreshes_beside_short_ones(monkeypatch, seed):
    """A refresh of many rows takes several forwards; meanwhile others begin, end and are cancelled."""
    rng = random.Random(seed)
    sizes = ((4,), (8,), (4, 8, 16, 32), (4, 8, 16, 32, 64))
    apart = dict(gen_length=64, merge_threshold=None, sync_threshold=None, eos_exit="none")
    requests = [
        (
            random_prompt(rng, 23),
            blockbatch.DecodeConfig(**apart, block_sizes=rng.choice(sizes), refresh_interval=4),
        )
        for _ in range(16)
    ]
    with open_place("cpu").default(monkeypatch):
        engine, _ = run_mix(
            scripted(seed), requests, rng, max_tokens_per_step=rng.choice((200, 300, 600)), cancel=0.3
        )
    assert engine.stats().refreshes > engine.stats().forwards["refresh"]
