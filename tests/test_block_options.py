"""Options of block diffusion: defaults by family, and what is refused, with messages that say why."""

import re
import warnings

import pytest

import block_models
import blockbatch
from block_causal_data import DATA, load
from blockbatch import DecodeConfig
from blockbatch.decoding.block_diffusion import method
from blockbatch.methods import BLOCK_METHOD_TABLE, BLOCK_METHODS, METHODS


def config(**options):
    return DecodeConfig(method="block_diffusion", **options)


def test_the_table_of_methods():
    assert set(BLOCK_METHOD_TABLE).isdisjoint(METHODS) and set(BLOCK_METHODS) - set(BLOCK_METHOD_TABLE) == {
        "blockbatch"
    }


def test_published_defaults():
    sdar, v2 = load("sdar").spec, load("fast_dllm_v2").spec
    made = method(config(), sdar, (1,))
    assert (made.block_size, made.steps, made.commit, made.threshold) == (4, 4, "dynamic", 0.85)
    assert made.fuse_store and not made.grow and not made.prefix_cache
    made = method(config(), v2, (1,))
    assert (made.block_size, made.sub_block_size, made.threshold, made.block_cache) == (32, 8, 1.0, False)
    assert (made.sampler, made.strict, made.fuse_store) == ("generate", False, False)
    assert method(config(block_size=4), v2, ()).sub_block_size == 4


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block_size=0), "block_size: expected at least 1, got 0"),
        (dict(steps="4"), "steps: expected an integer, got '4'"),
        (dict(sub_block_size=True), "sub_block_size: expected an integer, got True"),
        (dict(threshold=1.5), "threshold: expected a value from 0 to 1, got 1.5"),
        (dict(commit="threshold"), "commit: expected dynamic, static, sequential or all, got 'threshold'"),
        (dict(sampler="beam"), "sampler: expected generate or batch, got 'beam'"),
        (dict(max_length=None), "max_length: expected limit or grow, got None"),
        (dict(block_cache=1), "block_cache: expected True or False, got 1"),
        (dict(prefix_cache=None), "prefix_cache: expected True or False, got None"),
        (dict(drafts=(1,)), r"drafts: not an option of block_diffusion \(it has block_size, steps"),
        (dict(eos_exit="none"), "eos_exit: not an option of block_diffusion"),
        (dict(gen_length=0), "gen_length: expected at least 1, got 0"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        config(**options)
    for name in ("fuse_store", "sub_block_size", "max_length"):
        with pytest.raises(ValueError, match=f"{name}: not an option of vanilla"):
            DecodeConfig(method="vanilla", **{name: 8})


@pytest.mark.parametrize(
    "family, options, message",
    [
        (
            "sdar",
            dict(sub_block_size=2),
            "sub_block_size: expected none for sdar, since it is an option of fast",
        ),
        ("sdar", dict(block_cache=True), "block_cache: expected none for sdar"),
        ("sdar", dict(sampler="batch"), "sampler: expected none for sdar"),
        ("sdar", dict(strict_published=True), "strict_published: expected False for sdar"),
        ("sdar", dict(steps=5), "steps: expected at most the block's 4 positions, got 5"),
        (
            "fast_dllm_v2",
            dict(steps=5),
            "steps: expected none for fast_dllm_v2, since it is an option of sdar",
        ),
        ("fast_dllm_v2", dict(commit="static"), "commit: expected none for fast_dllm_v2"),
        ("fast_dllm_v2", dict(fuse_store=True), "fuse_store: expected none for fast_dllm_v2"),
        (
            "fast_dllm_v2",
            dict(sub_block_size=5),
            "sub_block_size: expected a divisor of block_size = 32, got 5",
        ),
        ("fast_dllm_v2", dict(block_size=48), "block_size: expected a divisor of the trained 32, .* got 48"),
        ("fast_dllm_v2", dict(block_size=64), "strict_published=True runs it all the same"),
    ],
)
def test_options_that_a_family_does_not_have(family, options, message):
    model = load(family)
    with pytest.raises(ValueError, match=message):
        blockbatch.generate(model, [1, 2], config(**options))
    assert model.pool is None


def test_bad_prompts():
    model = load("fast_dllm_v2")
    with pytest.raises(ValueError, match=r"prompt: expected no MASK token \(id 126\), got one at position 1"):
        blockbatch.generate(model, [1, 126], config())
    with pytest.raises(ValueError, match="expected at least one token for fast_dllm_v2, got an empty"):
        blockbatch.generate(model, [[]], config())
    with pytest.raises(ValueError, match="eos_token_ids: expected ids from 0 to 127, got 128"):
        blockbatch.generate(model, [1], config(eos_token_ids=(128,)))
    without = blockbatch.load_model(DATA / "fast_dllm_v2", device="cpu")
    with pytest.raises(ValueError, match="model: expected to know the id of MASK"):
        blockbatch.generate(without, [1], config())
    (result,) = blockbatch.generate(load("sdar"), [[]], config(gen_length=8))
    assert len(result.canvas) == 8


def test_an_untrained_block_size_is_said_so():
    model = load("sdar")
    with pytest.warns(UserWarning, match="block_size: expected the trained 4, got 8, .* larger than trained"):
        blockbatch.generate(model, [1], config(gen_length=8, block_size=8))
    with pytest.warns(UserWarning, match="smaller than trained keeps its accuracy for some models"):
        blockbatch.generate(model, [1], config(gen_length=8, block_size=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blockbatch.generate(model, [1], config(gen_length=8))


@pytest.mark.parametrize(
    "family, options", [("sdar", {}), ("fast_dllm_v2", {}), ("sdar", dict(method="blockbatch"))]
)
def test_a_model_that_predicts_its_own_mask_is_told(tmp_path, family, options):
    folder = block_models.write(tmp_path / family, family)
    model = blockbatch.load_model(folder, device="cpu")
    model.weights.lm_head.zero_()
    model.weights.lm_head[block_models.MASK] = 1.0
    model.weights.final_norm.fill_(1.0)
    # Every hidden state has the same sign along MASK's row once its own is all it can be.
    model.weights.embedding.abs_()
    for layer in model.weights.layers:
        layer.out_weight.zero_()
        layer.down_weight.zero_()
    message = re.escape(f"model: expected predictions other than MASK (id {block_models.MASK})")
    with pytest.raises(RuntimeError, match=message):
        blockbatch.generate(
            model, [1, 2], DecodeConfig(**{"method": "block_diffusion", "gen_length": 32, **options})
        )
    assert model.pool.held() == 0
