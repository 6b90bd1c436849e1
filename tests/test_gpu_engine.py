"""The engine on a GPU in fp32: mixes decode as alone on every backend, steps are captured, waits are few."""

import random
from pathlib import Path

import pytest
import torch

import block_models
import blockbatch
from blockbatch.decoding import graphs, slot_forward
from blockbatch.decoding.engine import Engine
from engine_mixes import outcome, pages_in_use, random_mix, run_mix
from test_engine_blocks import random_config as random_block_config

pytestmark = pytest.mark.gpu
DATA = Path(__file__).parent / "data"
FOLDERS = {"llada": DATA / "conformance", "dream": DATA / "conformance_dream"}


# Triton compiles its kernels for every number of rows: a small mix.
MIXES = [("triton", 0, 8), *((backend, seed, 24) for backend in ("cuda", None) for seed in range(3))]


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("backend, seed, count", MIXES)
def test_random_mixes(backend, family, seed, count):
    model = blockbatch.load_model(FOLDERS[family], device="cuda", dtype="float32", backend=backend)
    rng = random.Random(seed)
    random_mix(
        model,
        10 * seed,
        count,
        dream=family == "dream",
        samples=True,
        max_tokens_per_step=rng.choice((1, 100, None)),
        max_requests=rng.choice((3, 12)),
        cancel=rng.choice((0.0, 0.2)),
    )


@pytest.mark.parametrize("family", ["sdar", "fast_dllm_v2"])
def test_random_mixes_of_block_causal_models(tmp_path, family):
    folder = block_models.write(tmp_path / "model", family, seed=7, hidden_size=64)
    model = blockbatch.load_model(folder, device="cuda", dtype="float32")
    rng = random.Random(1)
    requests = [
        (block_models.prompt(rng.randint(0, 70), number), random_block_config(rng, family))
        for number in range(16)
    ]
    run_mix(model, requests, rng, cache_tokens=4096)


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cuda", dtype="float32")


def submit_many(engine, tiny, count, config):
    prompts = [tiny.tokenizer.encode(f"Q: {3 + n}+4*{n}=?\nA:") for n in range(count)]
    return [engine.submit(prompt, config) for prompt in prompts]


@pytest.mark.parametrize(
    "options",
    [
        dict(gen_length=128),
        dict(gen_length=128, query_span="open", refresh_scope="generation"),
        dict(method="dual_cache", gen_length=64, drafts=(1, 2), eos_exit="prefix"),
    ],
    ids=str,
)
def test_captured_steps_decode_as_alone(tiny, options):
    config = blockbatch.DecodeConfig(**options)
    engine = Engine(tiny, max_requests=6, cache_tokens=1 << 15)
    requests = submit_many(engine, tiny, 16, config)
    engine.run_until_idle()
    (forward,) = engine._lane._forwards.values()
    assert forward._graphs, "window steps were captured"
    for request in requests:
        assert outcome(request.result) == outcome(blockbatch.generate(tiny, request.prompt, config))
    assert pages_in_use(engine) == 0


def test_the_host_waits_once_a_step(tiny, monkeypatch, unchecked):
    """In a step in which nobody joins or ends."""
    config = blockbatch.DecodeConfig(gen_length=128, eos_exit="none", threshold=1.0, refresh_interval=None)
    engine = Engine(tiny, max_requests=4, cache_tokens=1 << 15)
    submit_many(engine, tiny, 4, config)
    engine.run_until_idle()  # captures all sizes that come up
    submit_many(engine, tiny, 4, config)
    for _ in range(6):
        engine.step()
    waits = []
    synchronize = torch.cuda.Event.synchronize
    monkeypatch.setattr(
        torch.cuda.Event, "synchronize", lambda event: (waits.append(event), synchronize(event))[1]
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 5
    engine.close()


def test_slots_that_grow_keep_what_runs(tiny):
    """More requests, longer texts and more branches than the first ones had."""
    engine = Engine(tiny, max_requests=20, cache_tokens=1 << 15)
    small = blockbatch.DecodeConfig(gen_length=32, block_sizes=(8,))
    large = blockbatch.DecodeConfig(gen_length=256)
    requests = submit_many(engine, tiny, 4, small)
    engine.step()
    engine.step()
    requests += submit_many(engine, tiny, 12, large)
    engine.run_until_idle()
    for request in requests:
        expected = blockbatch.generate(tiny, request.prompt, request.config)
        assert outcome(request.result) == outcome(expected)


def test_memory_stays_over_many_requests(tiny):
    config = blockbatch.DecodeConfig(gen_length=64)
    engine = Engine(tiny, max_requests=8, cache_tokens=1 << 14)
    submit_many(engine, tiny, 40, config)
    engine.run_until_idle()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        submit_many(engine, tiny, 40, config)
        engine.run_until_idle()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (4 << 20)


def test_eager_steps_equal_captured_ones(tiny, monkeypatch):
    config = blockbatch.DecodeConfig(gen_length=128)
    captured = Engine(tiny, max_requests=6, cache_tokens=1 << 15)
    first = submit_many(captured, tiny, 10, config)
    captured.run_until_idle()
    monkeypatch.setattr(graphs.StepGraphs, "possible", staticmethod(lambda model: False))
    assert slot_forward.StepGraphs is graphs.StepGraphs
    eager = Engine(tiny, max_requests=6, cache_tokens=1 << 15)
    second = submit_many(eager, tiny, 10, config)
    eager.run_until_idle()
    for one, other in zip(first, second, strict=True):
        assert outcome(one.result) == outcome(other.result)
