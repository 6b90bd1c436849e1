"""Whole decodes of scripted models against the naive oracle, alone and in batches."""

import itertools
import random

import pytest

import blockbatch
from blockbatch.generation import generate
from blockbatch.tracing import replay
from oracle import OracleConfig, ScriptedModel, decode
from scripted_engine import EngineScripted

BLOCK_SIZE_SETS = ((4, 8, 16, 32), (1, 2, 4, 8), (8, 32), (16,), (4, 8, 16, 32, 64))


def scripted(rng, **options):
    offset = rng.choice((0, 0, 1))
    return ScriptedModel(
        rng.randrange(10**6),
        peak=rng.choice(((0.0, 2.0), (1.0, 8.0), (3.0, 9.0), (7.0, 10.0))),
        agreement=rng.choice((0.5, 0.8, 0.95)),
        eos_rate=rng.choice((0.0, 0.02, 0.1)),
        eos_count=rng.choice((1, 2)),
        prediction_offset=offset,
        suppress_mask=bool(offset),
        **options,
    )


def configs(rng, method):
    """The same settings for the oracle and for the package."""
    options = {"method": method, "gen_length": 64, "eos_exit": rng.choice(("prefix", "window", "none"))}
    if method == "blockbatch":
        options |= {
            "block_sizes": rng.choice(BLOCK_SIZE_SETS),
            "threshold": rng.choice((0.7, 0.9, 0.95)),
            "merge_threshold": rng.choice((0.5, 0.6)),
            "sync_threshold": rng.choice((1, 4, 8)),
            "refresh_interval": rng.choice((8, 32, None)),
            "commit": rng.choice(("threshold", "local_leap")),
        }
    else:
        options |= {"block_size": rng.choice((16, 32))}
        steps = rng.choice((8, 24, 64)) if method != "local_leap" else None
        if method == "vanilla":
            options |= {"steps": steps - steps % (64 // options["block_size"])}
        elif steps and rng.random() < 0.4:
            options |= {"threshold": None, "steps": steps - steps % (64 // options["block_size"])}
        else:
            options |= {"threshold": rng.choice((0.7, 0.9))}
    return OracleConfig(**options), blockbatch.DecodeConfig(**options, trace=True)


def assert_equal(result, expected, note):
    assert result.canvas == expected.canvas, note
    assert result.tokens == expected.tokens, note
    nfe = (result.nfe.init, result.nfe.block, result.nfe.refresh)
    assert nfe == (expected.nfe_init, expected.nfe_block, expected.nfe_refresh), note
    assert (result.block_size, result.stop_reason) == (expected.winner_block_size, expected.stop_reason), note
    for branch, other in zip(result.branches, expected.branches, strict=True):
        for name in ("block_size", "committed", "merged", "synced"):
            assert getattr(branch, name) == other[name], (note, name)


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_scripted_decodes_equal_the_oracle(method):
    rng = random.Random(method)
    for _ in range(120 if method == "blockbatch" else 30):
        model = scripted(rng)
        oracle_config, config = configs(rng, method)
        prompt = [rng.randrange(20) for _ in range(rng.randint(1, 40))]
        expected = decode(model, prompt, oracle_config)
        result = generate(EngineScripted(model, page_size=rng.choice((4, 16, 64))), prompt, config)
        assert_equal(result, expected, oracle_config)
        canvases = replay(result.trace, len(result.branches), config.gen_length, model.mask_token_id)
        assert canvases == [branch["tokens"] for branch in expected.branches]
        assert len(result.trace) == result.nfe.total
        kinds = [record["kind"] for record in result.trace]
        assert [kinds.count(kind) for kind in ("init", "block", "refresh")] == [
            result.nfe.init,
            result.nfe.block,
            result.nfe.refresh,
        ]


@pytest.mark.parametrize(
    "method, eos_exit", list(itertools.product(blockbatch.METHODS, ("prefix", "window", "none")))
)
def test_batch_equals_single(method, eos_exit):
    rng = random.Random(f"{method} {eos_exit}")
    model = EngineScripted(ScriptedModel(rng.randrange(1000), peak=(1.0, 8.0), eos_rate=0.03))
    config = blockbatch.DecodeConfig(method=method, gen_length=64, eos_exit=eos_exit, trace=True)
    prompts = [[rng.randrange(20) for _ in range(length)] for length in (3, 40, 0, 17, 17, 1)]
    together = generate(model, prompts, config)
    assert len(together) == len(prompts)
    for prompt, result in zip(prompts, together):
        (alone,) = generate(model, [prompt], config)
        assert (result.canvas, result.nfe, result.branches) == (alone.canvas, alone.nfe, alone.branches)
        assert (result.stop_reason, result.block_size) == (alone.stop_reason, alone.block_size)
        for one, other in zip(result.trace, alone.trace, strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_small_cache_splits_the_batch_and_changes_nothing():
    model = EngineScripted(ScriptedModel(5, eos_rate=0.03))
    config = blockbatch.DecodeConfig(gen_length=32, block_sizes=(4, 8, 32))
    prompts = [[1] * length for length in (5, 9, 30, 2)]
    together = generate(model, prompts, config)
    one_request = 3 * 64 * 2 * 2 * 4  # rows * positions * (K and V) * head_dim * bytes
    model.cache_bytes = one_request
    split = generate(model, prompts, config)
    assert [result.canvas for result in split] == [result.canvas for result in together]
    model.cache_bytes = one_request - 1
    with pytest.raises(MemoryError, match=f"cache_bytes: expected at least {one_request:,} bytes .* got"):
        generate(model, prompts, config)


def test_a_model_that_keeps_writing_mask_is_refused():
    model = EngineScripted(ScriptedModel(1, mask_rate=1.0))
    with pytest.raises(RuntimeError, match="the model keeps predicting its own MASK token"):
        generate(model, [1, 2], blockbatch.DecodeConfig(gen_length=32, block_sizes=(4, 8)))
    result = generate(EngineScripted(ScriptedModel(1)), [1, 2], blockbatch.DecodeConfig(gen_length=32))
    assert result.stop_reason in ("eos", "length")
