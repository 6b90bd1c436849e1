"""Drawn tokens in the engine, in infilling, behind the server, and with a config for each prompt."""

import types

import pytest

import block_models
import blockbatch
from blockbatch import DecodeConfig, generate
from blockbatch.decoding.engine import Engine
from test_sampling_decode import CASES, DATA, OTHER, PROMPT

REQUESTS = [
    dict(temperature=1.1, seed=5),
    dict(),
    dict(temperature=0.7, seed=9, top_p=0.9),
    dict(temperature=1.1, seed=6),
    dict(min_tokens=12, eos_bias=3.0, bad_token_ids=(3, 8)),
    dict(temperature=1.1, seed=5),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = {
        "llada": blockbatch.load_model(DATA / "conformance", device="cpu"),
        "dream": blockbatch.load_model(DATA / "conformance_dream", device="cpu"),
    }
    for family in ("sdar", "fast_dllm_v2"):
        folder = tmp_path_factory.mktemp(family)
        block_models.write(folder, family)
        found[family] = blockbatch.load_model(folder, device="cpu")
    return found


@pytest.mark.parametrize(
    "family, index",
    [("llada", 0), ("llada", 1), ("dream", 5), ("dream", 8), ("sdar", 0), ("fast_dllm_v2", 1)],
)
def test_the_engine_draws_what_generate_draws(models, family, index):
    model = models[family]
    configs = [DecodeConfig(gen_length=32, **CASES[family][index], **options) for options in REQUESTS]
    prompts = [PROMPT, OTHER, PROMPT, PROMPT, OTHER, OTHER]
    engine = Engine(model, max_requests=4, cache_tokens=4096)
    handed = [engine.submit(prompt, config) for prompt, config in zip(prompts[:3], configs[:3], strict=True)]
    engine.step()
    handed += [engine.submit(prompt, config) for prompt, config in zip(prompts[3:], configs[3:], strict=True)]
    engine.run_until_idle()
    for request, prompt, config in zip(handed, prompts, configs, strict=True):
        assert request.error is None
        alone = generate(model, prompt, config)
        assert request.result.tokens == alone.tokens and request.result.nfe == alone.nfe
    together = generate(model, prompts, configs)
    assert [result.tokens for result in together] == [request.result.tokens for request in handed]


def test_each_config_has_its_own_seed(models):
    model = models["llada"]
    config = DecodeConfig(method="dual_cache", gen_length=16, block_size=8, temperature=1.5, seed=3)
    apart = generate(model, [PROMPT, PROMPT], config)
    assert apart[0].canvas != apart[1].canvas
    same = generate(model, [PROMPT, PROMPT], [config, config])
    assert same[0].canvas == same[1].canvas == apart[0].canvas


def test_infilling_draws_too(models):
    model = models["llada"]
    mask = model.spec.mask_token_id
    text = [*PROMPT, mask, mask, mask, 9, 4, mask, mask, 7]
    config = DecodeConfig(
        method="dual_cache", gen_length=16, temperature=1.5, seed=3, bad_token_ids=(5, 6, 7)
    )
    first, second = blockbatch.fill(model, [text, text], config)
    assert first.canvas == blockbatch.fill(model, text, config).canvas != second.canvas
    for result in (first, second):
        gaps = [token for gap in result.gaps for token in gap.tokens]
        assert len(gaps) == 5 and not {5, 6, 7, mask} & set(gaps)
        assert result.canvas[9:11] == [9, 4] and result.canvas[-1] == 7


def test_what_clients_of_the_server_say():
    pytest.importorskip("pydantic", reason="the server's packages are not installed")
    from blockbatch.serving.reading import _sampling

    def read(options=None, **body):
        return _sampling(types.SimpleNamespace(**body), options or {})

    greedy = {"temperature": 0.0, "top_p": None, "top_k": None}
    assert read() == read(temperature=0, top_p=1, seed=7) == read(temperature=1e-6, top_k=4) == greedy
    drawn = read(temperature=0.5, top_p=0.9, top_k=-1, seed=-1)
    assert drawn == {"temperature": 0.5, "top_p": 0.9, "top_k": None, "seed": 2**63 - 1}
    assert read(temperature=1)["seed"] != read(temperature=1)["seed"]
    assert "seed" not in read({"seed": 4}, temperature=1)
    assert read({"temperature": 0.7, "seed": 4}, top_p=0.5) == {"top_p": 0.5}
    for given in (drawn, greedy, read(temperature=2)):
        DecodeConfig(**given)


@pytest.mark.gpu
def test_the_engine_on_a_gpu_draws_what_generate_draws():
    for family in ("llada", "dream"):
        folder = DATA / {"llada": "conformance", "dream": "conformance_dream"}[family]
        model = blockbatch.load_model(folder, device="cuda", dtype="float32")
        test_the_engine_draws_what_generate_draws({family: model}, family, 0)
