"""The engine on block-causal models: every request runs its own program, and their forwards go together."""

import random

import pytest

import block_models
import blockbatch
from blockbatch.decoding.engine import Engine, RequestTooLargeError
from engine_mixes import outcome, run_mix

FAMILIES = ("sdar", "fast_dllm_v2")


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    folder = block_models.write(tmp_path / "model", request.param, seed=7)
    return blockbatch.load_model(folder, device="cpu")


def random_config(rng, family):
    options = dict(gen_length=rng.choice((16, 32, 48, 64)), threshold=rng.choice((0.2, 0.5, 0.9)))
    if rng.random() < 0.5:
        options["eos_token_ids"] = tuple(rng.sample(range(94), 4))
    if rng.random() < 0.3:
        options |= dict(temperature=0.7, seed=rng.randrange(100), top_p=rng.choice((None, 0.8)))
    if rng.random() < 0.3:
        sizes = tuple(rng.sample((4, 8, 16), rng.randint(1, 3)))
        return blockbatch.DecodeConfig(method="blockbatch", block_sizes=sizes, **options)
    options["prefix_cache"] = rng.random() < 0.3
    if family == "sdar":
        options |= dict(commit=rng.choice(("dynamic", "sequential")), fuse_store=rng.random() < 0.5)
    else:
        options |= dict(sub_block_size=rng.choice((4, 8, 16)), block_cache=rng.random() < 0.5)
    return blockbatch.DecodeConfig(method="block_diffusion", **options)


@pytest.mark.parametrize("seed", range(3))
def test_random_mixes_decode_as_alone(model, seed):
    rng = random.Random(seed)
    requests = [
        (block_models.prompt(rng.randint(0, 70), number), random_config(rng, model.spec.family))
        for number in range(16)
    ]
    engine, handles = run_mix(
        model,
        requests,
        rng,
        cancel=rng.choice((0.0, 0.3)),
        max_tokens_per_step=rng.choice((1, 64, None)),
        # Pages for the whole of a few texts: a text that begins may grow to its end.
        cache_tokens=2048,
    )
    stats = engine.stats()
    assert stats.steps < sum(handle.nfe.total for handle in handles)
    assert stats.forwards["denoise"] > 0


def test_long_prompts_do_not_hold_up_blocks(model):
    """A prompt beyond the budget waits for the turn in which it is the first; the others go on."""
    config = blockbatch.DecodeConfig(method="block_diffusion", gen_length=64, threshold=1.0, eos_token_ids=())
    engine = Engine(model, max_tokens_per_step=40, cache_tokens=4096)
    long = [engine.submit(block_models.prompt(160, number), config) for number in range(3)]
    for expected in range(1, 4):
        engine.step()
        assert sum(request.nfe.total > 0 for request in long) == expected
    engine.run_until_idle()
    for number, request in enumerate(long):
        alone = blockbatch.generate(model, block_models.prompt(160, number), config)
        assert outcome(request.result) == outcome(alone)


def test_numbers_that_break_fail_one_request_alone(model):
    config = blockbatch.DecodeConfig(method="block_diffusion", gen_length=32, threshold=0.3, eos_token_ids=())
    prompts = [[1, 2], [3] * 20, [4]]
    expected = [blockbatch.generate(model, prompt, config) for prompt in prompts]
    if any(3 in result.canvas for result in expected[::2]):
        pytest.skip("the damaged token is also predicted elsewhere")
    kept = model.weights.embedding[3].clone()
    model.weights.embedding[3] = float("nan")
    engine = Engine(model, cache_tokens=2048)
    requests = [engine.submit(prompt, config) for prompt in prompts]
    engine.run_until_idle()
    assert requests[1].status == "failed"
    assert isinstance(requests[1].error, blockbatch.NonFiniteLogitsError)
    for request, result in zip(requests[::2], expected[::2], strict=True):
        assert outcome(request.result) == outcome(result)
    model.weights.embedding[3] = kept
    again = engine.submit(prompts[1], config)
    engine.run_until_idle()
    assert outcome(again.result) == outcome(expected[1])
    assert engine._lane.pages_in_use() == 0


def test_a_text_that_never_fits_is_refused(model):
    engine = Engine(model, cache_tokens=64)
    with pytest.raises(RequestTooLargeError, match="at most 4 pages"):
        engine.submit([1] * 40, blockbatch.DecodeConfig(method="block_diffusion", gen_length=64))
    fits = engine.submit([1] * 10, blockbatch.DecodeConfig(method="block_diffusion", gen_length=16))
    engine.run_until_idle()
    assert fits.status == "finished"


def test_fewer_branches_inside_the_block(model):
    engine = Engine(model, branches="load", cache_tokens=1 << 14, max_requests=2, max_queue=100)
    config = blockbatch.DecodeConfig(method="blockbatch", gen_length=32)
    requests = [engine.submit([1, 2, 3], config) for _ in range(60)]
    assert requests[0].branches == 3 and requests[-1].branches == 1
    for request in requests[1:-1]:
        engine.cancel(request)
    engine.run_until_idle()
    for request in (requests[0], requests[-1]):
        assert len(request.result.branches) == request.branches
        assert outcome(request.result) == outcome(blockbatch.generate(model, [1, 2, 3], request.config))


def test_fixed_bits_are_refused(model):
    with pytest.raises(ValueError, match="deterministic: expected False for"):
        Engine(model, deterministic=True)
