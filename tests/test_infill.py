"""Fills against the naive oracle, a plain loop, and `generate`: what is given stands, all else is decoded."""

import random

import pytest
import torch

import blockbatch
import oracle
from blockbatch.infill import GappedText, decode
from custom_methods import registered, threshold_rule
from fill_cases import assert_filled, dream_settings, random_region, scripted, settings
from oracle import dream_decoder
from plain_models import PlainModel, write_dream, write_llada
from scripted_engine import EngineScripted
from test_callers import outcome

VOCABULARY = 40
MASK = VOCABULARY - 1


def fill_ids(engine, ids, config):
    (result,) = decode(engine, [GappedText(ids, {})], config)
    return result


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_scripted_fills_equal_the_oracle(method):
    rng = random.Random(f"fill {method}")
    merged = synced = refreshes = decoded = 0
    for _ in range(80 if method == "blockbatch" else 40):
        model = scripted(rng)
        prompt = [rng.randrange(20) for _ in range(rng.randint(1, 30))]
        region = random_region(rng, model)
        oracle_config, config = settings(rng, method, len(region))
        expected = oracle.decode(model, prompt, oracle_config, region)
        engine = EngineScripted(model, page_size=rng.choice((1, 4, 16, 64)))
        result = fill_ids(engine, prompt + region, config)
        assert_filled(result, expected, prompt, region, model.mask_token_id, (oracle_config, region))
        assert len(result.trace) == result.nfe.total
        merged += sum(branch.merged for branch in result.branches)
        synced += sum(branch.synced for branch in result.branches)
        refreshes += result.nfe.refresh
        decoded += region.count(model.mask_token_id)
    assert decoded > 400 and (refreshes > 20 or method == "vanilla")
    assert method != "blockbatch" or (merged > 50 and synced > 20)


def test_dreams_published_rule_equals_its_oracle():
    rng = random.Random("fill dream")
    for _ in range(40):
        model = scripted(rng, offset=1)
        prompt = [rng.randrange(20) for _ in range(rng.randint(1, 30))]
        region = random_region(rng, model)
        oracle_config, config = dream_settings(rng, len(region))
        expected = dream_decoder.decode(model, prompt, oracle_config, region)
        result = fill_ids(EngineScripted(model, page_size=rng.choice((4, 16))), prompt + region, config)
        assert_filled(result, expected, prompt, region, model.mask_token_id, (oracle_config, region))


@pytest.mark.parametrize("method", ["dual_cache", "local_leap"])
def test_drafts_change_no_token(method):
    rng = random.Random(f"fill drafts {method}")
    adopted = 0
    for _ in range(30):
        model = scripted(rng)
        ids = [rng.randrange(20) for _ in range(5)] + random_region(rng, model)
        options = dict(method=method, gen_length=64, block_size=16, threshold=rng.choice((0.7, 0.95)))
        plain = fill_ids(EngineScripted(model), ids, blockbatch.DecodeConfig(**options))
        config = blockbatch.DecodeConfig(**options, drafts=rng.choice(((1,), (1, 2, 3))))
        drafted = fill_ids(EngineScripted(model), ids, config)
        assert drafted.canvas == plain.canvas
        assert drafted.nfe.total + drafted.adopted == plain.nfe.total
        adopted += drafted.adopted
    assert adopted > 8


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_texts_of_a_batch_are_filled_as_alone(method):
    rng = random.Random(f"fill batch {method}")
    engine = EngineScripted(scripted(rng, offset=1))
    mask = engine.spec.mask_token_id
    texts = []
    for length in (7, 20, 20, 20, 33, 7):
        region = (random_region(rng, engine.scripted, most=1) + random_region(rng, engine.scripted))[:length]
        region += [mask] * (length - len(region))
        texts.append(GappedText([rng.randrange(20) for _ in range(rng.randint(1, 25))] + region, {}))
    _, first = settings(rng, method, 20)
    _, second = settings(rng, "blockbatch", 20)
    configs = [first, first, second, first, first, second]
    together = decode(engine, texts, configs)
    for text, config, result in zip(texts, configs, together, strict=True):
        alone = fill_ids(engine, text.ids, config)
        assert outcome(result) == outcome(alone) and result.gaps == alone.gaps
    engine.cache_bytes = 6 * 64 * 2 * 2 * 4  # room for one or two
    assert [outcome(result) for result in decode(engine, texts, configs)] == list(map(outcome, together))


@pytest.fixture(scope="module", params=["llada", "dream"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write = {"llada": write_llada, "dream": write_dream}[request.param]
    write(folder, vocab_size=VOCABULARY, sharpness=3.0)  # MASK is the last id, EOS the one before
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return blockbatch.load_model(folder, device="cpu")


def random_ids(rng, gaps=(1, 3, 7), given=(1, 4, 12)):
    ids = [rng.randrange(VOCABULARY - 2) for _ in range(rng.randint(1, 9))]
    for _ in range(rng.randint(1, 4)):
        ids += [MASK] * rng.choice(gaps)
        ids += [rng.randrange(VOCABULARY - 1) for _ in range(rng.choice(given))]
    return ids


def naive_vanilla(model, ids, block_size):
    """The most confident MASK of the first block that has one, again and again; a whole forward each time."""
    ids, offset = list(ids), model.spec.prediction_offset
    first, forwards = ids.index(MASK), 0
    while MASK in ids:
        start = first + (ids.index(MASK) - first) // block_size * block_size
        masks = [p for p in range(start, min(start + block_size, len(ids))) if ids[p] == MASK]
        logits = model.logits(ids)[0].float()
        if model.spec.suppress_mask:
            logits[:, MASK] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        best = max(masks, key=lambda p: confidence[p - offset])
        ids[best] = int(token[best - offset])
        forwards += 1
    return ids, forwards


def test_vanilla_equals_a_plain_loop(model):
    rng = random.Random(3)
    for _ in range(12):
        ids, size = random_ids(rng), rng.choice((4, 8, 32))
        config = blockbatch.DecodeConfig("vanilla", gen_length=64, block_size=size)
        result = blockbatch.fill(model, ids, config)
        assert (result.canvas, result.nfe.total) == naive_vanilla(model, ids, size)
        assert result.nfe.total == ids.count(MASK)


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_models_of_both_families_equal_the_oracle(folder, model, method):
    plain = PlainModel(folder)
    rng = random.Random(f"plain {method}")
    for _ in range(6):
        ids = random_ids(rng)
        start = ids.index(MASK)
        oracle_config, config = settings(rng, method, len(ids) - start)
        expected = oracle.decode(plain, ids[:start], oracle_config, ids[start:])
        result = blockbatch.fill(model, ids, config)
        assert_filled(result, expected, ids[:start], ids[start:], MASK, (oracle_config, ids))


@pytest.mark.parametrize(
    "method, preset",
    [*((method, None) for method in blockbatch.METHODS), ("blockbatch", "fast"), ("blockbatch", "paper"),
     ("dual_cache", "careful")],
)  # fmt: skip
def test_a_gap_at_the_end_is_a_generation(model, method, preset):
    """With nothing behind it, fill and generate are the same decode."""
    for seed, length in enumerate((1, 4, 24, 32, 64)):
        rng = random.Random(seed)
        prompt = [rng.randrange(VOCABULARY - 2) for _ in range(7)]
        options = dict(method=method, gen_length=length, eos_exit="none")
        config = (
            blockbatch.DecodeConfig.preset(preset, **options)
            if preset
            else blockbatch.DecodeConfig(**options)
        )
        expected = blockbatch.generate(model, prompt, config)
        result = blockbatch.fill(model, prompt + [MASK] * length, config)
        assert result.canvas == prompt + expected.canvas and result.tokens == prompt + expected.tokens
        assert (result.nfe, result.branches) == (expected.nfe, expected.branches)
        assert result.block_size == expected.block_size


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_what_stands_behind_a_gap_counts(model, method):
    """Attention goes to the right, in the first forward and in those of a block alone."""
    config = blockbatch.DecodeConfig(method, gen_length=32)
    rng, changed = random.Random(5), 0
    for _ in range(12):
        before = [rng.randrange(VOCABULARY - 2) for _ in range(6)]
        behind = [[rng.randrange(VOCABULARY - 2) for _ in range(30)] for _ in range(2)]
        one, other = (
            blockbatch.fill(model, before + [MASK] * 8 + text, config).gaps[0].tokens for text in behind
        )
        changed += one != other
    assert changed > 8


@pytest.mark.parametrize("method", blockbatch.METHODS)
@pytest.mark.parametrize("eos_exit", ["prefix", "window", "none"])
def test_an_eos_in_the_given_text_ends_nothing(model, method, eos_exit):
    eos = VOCABULARY - 2
    config = blockbatch.DecodeConfig(method, gen_length=32, eos_exit=eos_exit)
    ids = [1, 2, MASK, MASK, eos, 3, MASK, eos, MASK, MASK, 4, eos]
    result = blockbatch.fill(model, ids, config)
    assert MASK not in result.canvas and result.stop_reason == "length"
    assert [gap.start for gap in result.gaps] == [2, 6, 8]
    assert result.tokens[-2:] == [4, eos]


def test_block_sizes_beyond_the_canvas_run_once(model):
    config = blockbatch.DecodeConfig(gen_length=128)
    assert config.block_sizes == (4, 8, 16, 32, 64, 128)
    for length, sizes in ((3, (4,)), (8, (4, 8)), (9, (4, 8, 16)), (64, (4, 8, 16, 32, 64))):
        result = blockbatch.fill(model, [1, 2] + [MASK] + [3] * (length - 1), config)
        assert tuple(branch.block_size for branch in result.branches) == sizes


@pytest.mark.parametrize("base", ["dual_cache", "blockbatch"])
def test_rules_of_ones_own_fill(model, base):
    rng = random.Random(base)
    with registered("own", threshold_rule, base=base, options={"threshold": 0.9}):
        for _ in range(3):
            ids = random_ids(rng)
            own = blockbatch.fill(model, ids, blockbatch.DecodeConfig("own", gen_length=32))
            published = blockbatch.fill(model, ids, blockbatch.DecodeConfig(base, gen_length=32))
            assert outcome(own) == outcome(published)
