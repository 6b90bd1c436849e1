"""Pages of block-causal models: growth, bounds, long texts, streams, and the prefix cache."""

import random

import pytest
import torch

import block_models
import blockbatch
from blockbatch import block_memory, generation
from blockbatch.text_pages import OutOfPagesError, TextPages
from test_tokenizer import write_tokenizer

SHAPE = dict(num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))


def new_model(tmp_path, family="sdar", block_size=16, tokenizer=False, **options):
    changes = {"max_position_embeddings": 4096}
    folder = block_models.write(tmp_path / family, family, seed=7, block_size=block_size, **changes)
    if tokenizer:
        write_tokenizer(folder, special=())
    return blockbatch.load_model(folder, device="cpu", **options)


def config(**options):
    return blockbatch.DecodeConfig(
        **{"method": "block_diffusion", "threshold": 0.3, "eos_token_ids": (), **options}
    )


def test_a_pool_grows_keeps_contents_and_ends():
    pool = TextPages(40, page_size=4, **SHAPE)
    first = pool.take(3)
    pool.kv[:, :, first] = 1.0
    more = pool.take(30)
    assert len({*first, *more}) == 33 and pool.pages_in_use == 33
    assert pool.kv[:, :, first].eq(1.0).all() and pool.generation == 2
    with pytest.raises(OutOfPagesError, match="cache: expected 8 pages of 4 positions, got 7 of at most 40"):
        pool.take(8)
    assert pool.pages_in_use == 33
    pool.release(first)
    assert len(pool.take(8)) == 8 and pool.pages_in_use == 38
    assert pool.kv.shape[2] == 40


def test_prefixes_against_a_dictionary():
    """Random texts of few tokens: what is found is the longest kept beginning, with its own pages."""
    rng = random.Random(1)
    pool, kept = TextPages(10_000, page_size=2, **SHAPE), {}
    for _ in range(200):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(24))]
        size, run = rng.choice(((4, 4), (2, 2)))
        found = pool.find(size, run, tokens)
        runs = [length for length in range(run, len(tokens) + 1, run) if (size, *tokens[:length]) in kept]
        assert len(found) * 2 == max(runs, default=0)
        if runs:
            assert found == kept[(size, *tokens[: runs[-1]])]
        whole = len(tokens) // run * run
        pages = found + pool.take((whole - len(found) * 2) // 2)
        pool.keep(size, run, tokens[:whole], pages)
        for length in range(run, whole + 1, run):
            kept.setdefault((size, *tokens[:length]), pages[: length // 2])
        pool.release(pages)
        assert pool.held() == 0
    assert pool.stats.found > 200 and pool.stats.evicted == 0
    pool.forget()
    assert pool.pages_in_use == 0


def test_the_oldest_prefix_is_given_up_first():
    pool = TextPages(6, page_size=2, **SHAPE)
    texts = [[0, 0, 1, 1], [2, 2], [3, 3, 4, 4]]
    for tokens in texts:
        pages = pool.take(len(tokens) // 2)
        pool.keep(2, 2, tokens, pages)
        pool.release(pages)
    pool.release(pool.find(2, 2, texts[0]))  # used last now
    held = pool.take(3)
    assert [len(pool.find(2, 2, tokens)) for tokens in texts] == [2, 0, 1]
    assert pool.stats.evicted == 2
    with pytest.raises(OutOfPagesError):
        pool.take(9)
    assert len(held) == 3


@pytest.mark.parametrize("family", ["sdar", "fast_dllm_v2"])
def test_a_prefix_is_found_and_changes_nothing(tmp_path, family):
    model = new_model(tmp_path, family)
    system = block_models.prompt(70, 1)
    plain = config(gen_length=48, trace=True)
    cached = config(gen_length=48, trace=True, prefix_cache=True)
    texts = [system, [*system, 5, 6], system[:64], system[:40], [1, *system], system]
    found = []
    for prompt in texts:
        expected, result = (blockbatch.generate(model, prompt, settings) for settings in (plain, cached))
        assert result.canvas == expected.canvas and expected.prefix_tokens == 0
        found.append(result.prefix_tokens)
        fewer = sum(entry["packed_tokens"] for entry in expected.trace) - result.prefix_tokens
        assert sum(entry["packed_tokens"] for entry in result.trace) == fewer
    # With shifted logits the last block of an aligned prompt is computed for the token that it predicts.
    assert found == [0, 64, 64 if family == "sdar" else 48, 32, 0, 64]
    assert model.pool.held() == 0 and model.pool.stats.found == sum(found)
    # A finished text is found as well: the next turn of a conversation begins with it.
    turn = blockbatch.generate(model, texts[0] + expected.canvas + [7, 8], cached)
    assert turn.prefix_tokens >= 64 + 32
    other = blockbatch.DecodeConfig(
        method="block_diffusion", block_size=8, gen_length=16, prefix_cache=True, eos_token_ids=()
    )
    with pytest.warns(UserWarning, match="block_size: expected the trained 16, got 8"):
        assert blockbatch.generate(model, system, other).prefix_tokens == 0


def test_memory_is_checked_before_any_work(tmp_path):
    model = new_model(tmp_path)
    model.cache_bytes = 6 * block_memory.page_bytes(model)
    assert len(blockbatch.generate(model, [1] * 20, config(gen_length=70)).canvas) == 76
    model.predict = None  # no forward may happen
    with pytest.raises(
        MemoryError, match="cache_bytes: expected at least .* bytes for the K/V cache of 1 branch"
    ):
        blockbatch.generate(model, [1] * 20, config(gen_length=80))
    with pytest.raises(
        ValueError, match="prompt: expected prompt and gen_length in whole blocks of 16 to fit"
    ):
        blockbatch.generate(model, [1], config(gen_length=4096))
    with pytest.raises(MemoryError, match="cache_bytes"):
        blockbatch.generate(model, [1] * 100, config(gen_length=80, max_length="grow"))


def test_a_text_grows_as_far_as_memory_goes(tmp_path):
    model = new_model(tmp_path)
    free = blockbatch.generate(model, [1] * 20, config(gen_length=400))
    model = new_model(tmp_path, cache_bytes=6 * block_memory.page_bytes(model))
    result = blockbatch.generate(model, [1] * 20, config(gen_length=400, max_length="grow"))
    assert result.stop_reason == "length" and result.canvas == free.canvas[: 6 * 16 - 20]
    assert model.pool.pages_in_use == 0 and len(model.pool) == 6
    several = blockbatch.generate(model, [[1] * 20, [1] * 20], config(gen_length=400, max_length="grow"))
    assert [one.canvas for one in several] == [result.canvas] * 2
    # As far as the model's positions go.
    model = new_model(tmp_path)
    long = config(gen_length=10_000, threshold=0.0, max_length="grow", commit="all")
    result = blockbatch.generate(model, [1] * 4000, long)
    assert len(result.canvas) == 96 and result.stop_reason == "length"


def test_prompts_run_together_as_far_as_memory_goes(tmp_path):
    model = new_model(tmp_path)
    prompts = [block_models.prompt(length, length) for length in (3, 20, 33, 50)]
    expected = [blockbatch.generate(model, prompt, config(gen_length=32)).canvas for prompt in prompts]
    model.cache_bytes = 12 * block_memory.page_bytes(model)
    results = blockbatch.generate(model, prompts, config(gen_length=32))
    assert [result.canvas for result in results] == expected


def test_a_text_of_a_thousand_tokens(tmp_path):
    """Longer than it could be held as one canvas of masks; a step packs one block, whatever stands before."""
    model = new_model(tmp_path)
    session = generation.open_session(model, [1, 2, 3], config(gen_length=1000, trace=True))
    packed, most = [], 0
    while (step := session.step()) is not None:
        packed.append(step.records[0]["packed_tokens"])
        most = max(most, model.pool.pages_in_use)
    assert max(packed) <= 32 and most == 63
    result = generation.build_result(model, session, 0)
    assert len(result.canvas) == 1005 and block_models.MASK not in result.canvas
    half = blockbatch.generate(model, [1, 2, 3], config(gen_length=500))
    assert half.canvas == result.canvas[: len(half.canvas)]


@pytest.mark.parametrize("method", ["block_diffusion", "blockbatch"])
def test_a_stream_comes_in_pieces_and_gives_its_pages_back(tmp_path, method):
    model = new_model(tmp_path, tokenizer=True)
    settings = blockbatch.DecodeConfig(method=method, gen_length=96, threshold=0.3, eos_token_ids=())
    pieces = list(blockbatch.stream(model, [1, 2, 3], settings))
    assert len(pieces) > 6
    assert "".join(pieces) == blockbatch.generate(model, [1, 2, 3], settings).text
    begun = blockbatch.stream(model, [1, 2, 3], settings)
    next(begun)
    assert model.pool.held() > 0
    begun.close()
    del begun
    assert model.pool.held() == 0


def test_stop_sequences(tmp_path):
    model = new_model(tmp_path, tokenizer=True)
    whole = blockbatch.generate(model, [1, 2, 3], config(gen_length=96))
    stop = whole.text[30:33]
    result = blockbatch.generate(model, [1, 2, 3], config(gen_length=96, stop=(stop,)))
    assert result.stop_reason == "stop" and result.text == whole.text[: whole.text.index(stop)]
    assert result.nfe.total < whole.nfe.total
