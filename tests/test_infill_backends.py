"""Fills on every backend: the compiled policy on the host, Triton's in its interpreter, all on a GPU."""

import random
import runpy
from pathlib import Path

import pytest

import blockbatch
import fast_interpreter
import oracle
from blockbatch.infill import GappedText, decode
from blockbatch_kernels import triton
from cuda_places import open_place
from fill_cases import assert_filled, dream_settings, random_region, scripted, settings
from interpreter import in_interpreter, run_in_the_interpreter
from oracle import dream_decoder
from scripted_engine import EngineScripted

if triton.interpreted():
    fast_interpreter.replace_language_once()


def check(rng, method, backend=None, most=90):
    """One fill of a scripted model against the oracle; "dream" stands for Dream's published rule."""
    dream = method == "dream"
    model = scripted(rng, offset=1 if dream else None)
    prompt = [rng.randrange(20) for _ in range(rng.randint(1, 30))]
    region = random_region(rng, model, most)
    if dream:
        own, config = dream_settings(rng, len(region))
        expected = dream_decoder.decode(model, prompt, own, region)
    else:
        own, config = settings(rng, method, len(region))
        expected = oracle.decode(model, prompt, own, region)
    engine = EngineScripted(model, page_size=rng.choice((4, 16)))
    engine.backend = backend
    (result,) = decode(engine, [GappedText(prompt + region, {})], config)
    assert_filled(result, expected, prompt, region, model.mask_token_id, (own, region))


@pytest.mark.parametrize("method", [*blockbatch.METHODS, "dream"])
def test_the_compiled_policy_on_the_host(method, monkeypatch):
    rng = random.Random(f"compiled {method}")
    with open_place("cpu").default(monkeypatch):
        for _ in range(40 if method == "blockbatch" else 12):
            check(rng, method)


def test_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "interpreted")


@in_interpreter
@pytest.mark.parametrize("method", [*blockbatch.METHODS, "dream"])
def test_interpreted_triton(method):
    rng = random.Random(f"interpreted {method}")
    for _ in range(3):
        check(rng, method, "triton", most=24)


EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "fill.py"))
TEXT = EXAMPLE["TASK"] + EXAMPLE["CODE"]
OPTIONS = [dict(method=method) for method in blockbatch.METHODS] + [
    dict(method="dual_cache", drafts=(1, 2), refresh_scope="generation"),
    dict(method="blockbatch", query_span="open", refresh_interval=None, commit="local_leap"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_the_built_in_model_on_a_gpu(backend, options):
    """In fp32 the tokens and forwards of a CPU, alone and beside other texts, again on the same buffers."""
    config = blockbatch.DecodeConfig(**options)
    own = blockbatch.load_model("tiny", device="cpu")
    on_gpu = blockbatch.load_model("tiny", device="cuda", dtype="float32", backend=backend)
    texts = [TEXT, TEXT.replace("i{3}", "i % 9"), "Sort in descending order: Hal 27, Max 43.{7}, Hal 27"]
    expected = [blockbatch.fill(own, text, config) for text in texts]
    assert ["{" in result.text for result in expected] == [False] * 3
    for _ in range(2):
        found = [blockbatch.fill(on_gpu, text, config) for text in texts]
        together = blockbatch.fill(on_gpu, [texts[0], *texts, texts[0]], config)
        for got in (found, together[1:4]):
            assert [one.canvas for one in got] == [one.canvas for one in expected]
            assert [one.nfe for one in got] == [one.nfe for one in expected]


def test_the_example(capsys):
    EXAMPLE["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["vanilla", "dual_cache", "blockbatch"]
    assert all(line.endswith("[' i in', ' i % 8 == 0', ' % 9']") for line in lines[:3])
    assert lines[0].startswith("vanilla: 12 forwards") and lines[3] == "def sum_steps(n):"
    assert lines[5:8] == [
        "    for i in range(1, n + 1):",
        "        if i % 8 == 0:",
        "            total += i % 9",
    ]
