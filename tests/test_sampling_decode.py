"""Decodes that draw tokens, or may not write some: every method, on random models of all four families."""

from pathlib import Path

import pytest
import torch

import block_models
import blockbatch
from blockbatch import DecodeConfig, generate
from blockbatch.decoding.choice import method_for, sampling_for
from blockbatch.decoding.session import Session
from sampling_cases import draw_of

DATA = Path(__file__).parent / "data"
PROMPT, OTHER = [5, 9, 3, 7, 2, 8], [4, 4, 1]
FULL = [
    dict(method="blockbatch", block_sizes=(4, 8, 16), refresh_interval=16),
    dict(method="blockbatch", block_sizes=(4, 16), query_span="open", commit="local_leap", eos_exit="none"),
    dict(method="blockbatch", block_sizes=(4, 16), eos_exit="window"),
    dict(method="vanilla", block_size=8, steps=16),
    dict(method="prefix_cache", block_size=8),
    dict(method="dual_cache", block_size=8, eos_exit="prefix"),
    dict(method="dual_cache", block_size=8, query_span="open"),
    dict(method="local_leap", block_size=16),
]
DREAM = [*FULL, dict(method="blockbatch", block_sizes=(4, 8, 16), policy="dream_published")]
BLOCK = [dict(method="block_diffusion"), dict(method="blockbatch", block_sizes=(4, 16))]
CASES = {"llada": FULL, "dream": DREAM, "sdar": BLOCK, "fast_dllm_v2": BLOCK}
EVERY = [(family, index) for family, cases in CASES.items() for index in range(len(cases))]
every_method = pytest.mark.parametrize("family, index", EVERY, ids=[f"{f}-{i}" for f, i in EVERY])


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


def config_of(family, index, **options):
    return DecodeConfig(gen_length=32, **CASES[family][index], **options)


def length_before_eos(model, result):
    ends = model.eos_token_ids
    return next((at for at, token in enumerate(result.canvas) if token in ends), len(result.canvas))


@every_method
def test_a_request_is_the_same_in_any_batch(models, family, index):
    model = models[family]
    config = config_of(family, index, temperature=1.3, seed=11)
    together = generate(model, [PROMPT, OTHER, PROMPT, PROMPT], config)
    assert together[0].canvas == generate(model, PROMPT, config).canvas
    for place in (1, 3):
        seed = blockbatch.request_seed(11, place)
        alone = generate(
            model, (PROMPT, OTHER)[place == 1], config_of(family, index, temperature=1.3, seed=seed)
        )
        assert alone.canvas == together[place].canvas and alone.nfe == together[place].nfe
    same_prompt = [together[0].canvas, together[2].canvas, together[3].canvas]
    assert same_prompt[0] != same_prompt[1] != same_prompt[2] != same_prompt[0]
    mask = model.spec.mask_token_id
    assert all(mask not in result.tokens for result in together)


@every_method
def test_bans_and_min_tokens_hold(models, family, index):
    model = models[family]
    ends = model.eos_token_ids
    for temperature in (0.0, 1.0):
        plain = generate(model, [PROMPT, OTHER], config_of(family, index, temperature=temperature))
        common = {token for result in plain for token in result.tokens} - set(ends)
        bad = tuple(sorted(common))[:6]
        assert bad
        options = dict(temperature=temperature, min_tokens=20, eos_bias=30.0, bad_token_ids=bad)
        for result in generate(model, [PROMPT, OTHER], config_of(family, index, **options)):
            assert not set(bad) & set(result.tokens)
            # The bias is enough to end the text where it may end.
            assert length_before_eos(model, result) == 20 or family in ("sdar", "fast_dllm_v2")
            assert length_before_eos(model, result) >= 20
    never = generate(model, PROMPT, config_of(family, index, eos_bias=-1e4))
    assert len(never.canvas) > 24 and length_before_eos(model, never) == len(never.canvas)


@every_method
def test_temperature_0_is_greedy(models, family, index):
    """Also where it goes through the operator that draws; and a low temperature is as good as none."""
    model = models[family]
    greedy = generate(model, [PROMPT, OTHER], config_of(family, index))
    banned = model.spec.mask_token_id  # which these models never predict
    for options in (dict(seed=5), dict(bad_token_ids=(banned,)), dict(temperature=1e-3)):
        for result, expected in zip(
            generate(model, [PROMPT, OTHER], config_of(family, index, **options)), greedy
        ):
            assert result.canvas == expected.canvas and result.nfe == expected.nfe


@pytest.mark.parametrize("confidence", ["entropy", "margin"])
@every_method
def test_other_confidences(models, family, index, confidence):
    model = models[family]
    results = generate(model, [PROMPT, OTHER], config_of(family, index, confidence=confidence, trace=True))
    shares = [
        value
        for result in results
        for record in result.trace
        for commit in record["commits"]
        for value in commit["confidence"]
    ]
    assert shares and all(0.0 <= value <= 1.0 for value in shares)
    assert model.spec.mask_token_id not in results[0].tokens


def test_margin_orders_as_the_definition(models):
    """One token a step at the highest margin, computed from whole forwards of the model."""
    model = models["llada"]
    mask, gen_length = model.spec.mask_token_id, 8
    for confidence in ("probability", "entropy", "margin"):
        config = DecodeConfig(method="vanilla", gen_length=gen_length, block_size=8, confidence=confidence)
        ids = torch.tensor([PROMPT + [mask] * gen_length])
        for _ in range(gen_length):
            logits = model.logits(ids)[0].float()
            logits[:, mask] = -torch.inf
            p = logits.softmax(-1)
            top = p.topk(2).values
            entropy = torch.where(p > 0, p * p.log(), 0.0).sum(-1)
            sure = {"probability": top[:, 0], "entropy": entropy, "margin": top[:, 0] - top[:, 1]}[confidence]
            place = torch.where(ids[0] == mask, sure, -torch.inf).argmax()
            ids[0, place] = p[place].argmax()
        assert generate(model, PROMPT, config).canvas == ids[0, len(PROMPT) :].tolist()


def test_dream_draws_in_its_own_positions(models):
    """vanilla with one step writes what the definition draws from one forward of the whole canvas."""
    for family in ("llada", "dream"):
        model = models[family]
        config = DecodeConfig(method="vanilla", gen_length=8, block_size=8, steps=1, temperature=0.8, seed=21)
        ids = torch.tensor([PROMPT + [model.spec.mask_token_id] * 8])
        logits = model.logits(ids)[0].double()
        logits[:, model.spec.mask_token_id] = -torch.inf
        expected = []
        for place in range(len(PROMPT), len(PROMPT) + 8):
            of_place = logits[place - model.spec.prediction_offset].tolist()
            expected.append(draw_of(of_place, 0.8, 21, place, 0)[0])
        assert generate(model, PROMPT, config).canvas == expected


def test_branches_with_the_same_tokens_draw_the_same(models):
    """With one branch or with several of the same window: nothing but the window tells them apart."""
    model = models["llada"]
    options = dict(gen_length=16, temperature=1.5, seed=4, merge_threshold=None, sync_threshold=None)
    options |= dict(refresh_interval=None, eos_exit="none", threshold=0.3, max_step_tokens=None)
    alone = generate(model, PROMPT, DecodeConfig(block_sizes=(16,), trace=True, **options))
    both = generate(model, PROMPT, DecodeConfig(block_sizes=(8, 16), trace=True, **options))
    first, second = (result.trace[0]["commits"] for result in (alone, both))
    whole = {commit["branch"]: dict(zip(commit["positions"], commit["tokens"])) for commit in second}
    mine = dict(zip(first[0]["positions"], first[0]["tokens"]))
    assert whole[1] == mine
    for position, token in whole[0].items():
        assert mine.get(position, token) == token


def test_the_store_of_a_block_and_the_prefix_cache_change_no_noise(models):
    model = models["sdar"]
    config = dict(method="block_diffusion", gen_length=40, temperature=1.2, seed=2)
    prompt = list(range(1, 41))
    fused = generate(model, prompt, DecodeConfig(**config))
    apart = generate(model, prompt, DecodeConfig(fuse_store=False, **config))
    kept = [generate(model, prompt, DecodeConfig(prefix_cache=True, **config)) for _ in range(2)]
    assert kept[1].prefix_tokens > 0
    assert fused.canvas == apart.canvas == kept[0].canvas == kept[1].canvas
    assert fused.nfe != apart.nfe


def test_requests_of_one_batch_may_ask_for_different_things(models):
    """What a continuous batch is made of: one kind, values of each request."""
    model = models["llada"]
    config = DecodeConfig(method="dual_cache", gen_length=16, block_size=8, temperature=1.0, seed=3)
    hot = DecodeConfig(method="dual_cache", gen_length=16, block_size=8, temperature=2.0, seed=8)
    method = method_for(model, config)
    assert method == method_for(model, hot)
    sampling = [sampling_for(model, config, 0), sampling_for(model, hot, 0), sampling_for(model, config, 0)]
    sampling[2] = sampling[2]._replace(temperature=0.0)
    session = Session(model, [PROMPT, PROMPT, PROMPT], method, 16, sampling=sampling)
    session.run()
    greedy = DecodeConfig(method="dual_cache", gen_length=16, block_size=8)
    for request, alone in enumerate((config, hot, greedy)):
        assert session.outcome(request).canvas == generate(model, PROMPT, alone).canvas
    with pytest.raises(ValueError, match="sampling: expected 1 requests' for this method, got None"):
        Session(model, [PROMPT], method, 16)
    with pytest.raises(ValueError, match="sampling: expected none for this method"):
        Session(model, [PROMPT], method_for(model, greedy), 16, sampling=sampling[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "triton", "cuda", "reference"])
@pytest.mark.parametrize("filters", [{}, dict(top_p=0.9, top_k=20)], ids=["all", "filtered"])
def test_every_backend_draws_the_same(models, backend, filters, tmp_path):
    """In fp32, captured steps among them: twice, so that the second decode replays."""
    folders = {"llada": DATA / "conformance", "dream": DATA / "conformance_dream"}
    for family in ("sdar", "fast_dllm_v2"):
        folders[family] = tmp_path / family
        folders[family].mkdir()
        block_models.write(folders[family], family)
    for family, folder in folders.items():
        model = blockbatch.load_model(folder, device="cuda", dtype="float32", backend=backend)
        for index in range(len(CASES[family])):
            options = dict(temperature=0.9, seed=6, min_tokens=4, bad_token_ids=(3,), **filters)
            for seed in (6, 7, 6):
                config = config_of(family, index, **options | dict(seed=seed))
                expected = generate(models[family], [PROMPT, OTHER], config)
                got = generate(model, [PROMPT, OTHER], config)
                assert [result.canvas for result in got] == [result.canvas for result in expected]
