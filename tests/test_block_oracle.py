"""Block diffusion against a naive program on a plain model: the data's decodes, and fresh random models."""

import random
import warnings

import pytest
import torch

import block_models
import blockbatch
from block_causal_data import DATA, FAMILIES, MASK, PAD, records
from oracle import block_diffusion as oracle

ROUNDS = 24


def naive(model, record):
    args = record["args"]
    if record["algorithm"] == "sdar":
        names = ("gen_length", "block", "steps", "rule", "threshold", "stop")
        return oracle.sdar(model, record["prompt"], *(args[name] for name in names))
    names = ("max_new_tokens", "block", "sub", "threshold", "cache", "stop")
    return oracle.fast_dllm_v2(
        model, record["prompt"], *(args[name] for name in names), batch=record["algorithm"] == "v2_batch"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_naive_program_reproduces_the_published_decodes(family):
    model = oracle.PlainBlockModel(DATA / family, MASK)
    for record in records(family):
        text, log = naive(model, record)
        rest = record["tokens"][len(text) :]
        assert text == record["tokens"][: len(text)] and set(rest) <= {PAD}
        assert log == record["forwards"]


def log_of(result):
    names = ("kind", "packed_tokens", "stored", "input_ids")
    return [[entry[name] for name in names] for entry in result.trace]


def generate(model, prompt, **options):
    config = blockbatch.DecodeConfig(method="block_diffusion", trace=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return blockbatch.generate(model, prompt, config)


def test_random_sdar_models(tmp_path):
    rng = random.Random(5)
    folder = block_models.write(tmp_path / "model", "sdar", seed=1, block_size=8, tie_word_embeddings=True)
    model, plain = (
        blockbatch.load_model(folder, device="cpu"),
        oracle.PlainBlockModel(folder, block_models.MASK),
    )
    ended = 0
    for seed in range(ROUNDS):
        block = rng.choice((2, 4, 8, 16, 12))
        prompt = block_models.prompt(rng.randint(1, 40), seed)
        rule = rng.choice(("static", "dynamic", "dynamic", "sequential", "all"))
        options = dict(gen_length=rng.randint(1, 40), steps=rng.randint(1, block))
        options["threshold"] = rng.choice((0.2, 0.5, 0.9))
        stop = rng.sample(range(block_models.MASK), rng.randint(0, 4))
        text, log = oracle.sdar(plain, prompt, block=block, rule=rule, stop=stop, **options)
        options |= dict(block_size=block, commit=rule, eos_token_ids=stop)
        result = generate(model, prompt, fuse_store=False, **options)
        assert (result.canvas, log_of(result)) == (text[len(prompt) :], log), (seed, options)
        joined = generate(model, prompt, **options)
        assert joined.canvas == result.canvas and joined.nfe.total <= result.nfe.total
        ended += result.stop_reason == "eos"
    assert 0 < ended < ROUNDS


def test_random_fast_dllm_v2_models(tmp_path):
    rng = random.Random(6)
    folder = block_models.write(tmp_path / "model", "fast_dllm_v2", seed=2, block_size=16)
    model, plain = (
        blockbatch.load_model(folder, device="cpu"),
        oracle.PlainBlockModel(folder, block_models.MASK),
    )
    ended = 0
    for seed in range(ROUNDS):
        block = rng.choice((4, 8, 16, 16, 12, 32))
        sub = rng.choice([size for size in (1, 2, 3, 4, 8, 16) if block % size == 0])
        prompt = block_models.prompt(rng.choice((1, 7, block, 2 * block, 3 * block + 1)), seed)
        # The published sampler fails on a prompt that is not stored.
        batch = rng.random() < 0.3 and len(prompt) > block
        given = (4 * block, block, sub, rng.choice((0.3, 0.7, 1.0)), rng.random() < 0.5)
        stop = rng.randrange(block_models.MASK) if rng.random() < 0.7 else block_models.STOP
        text, log = oracle.fast_dllm_v2(plain, prompt, *given, stop, batch=batch, fixed=len(prompt) == block)
        if len(prompt) == block and 16 % block:
            continue  # strict_published, which those sizes need, would not read the prompt
        options = dict(zip(("gen_length", "block_size", "sub_block_size", "threshold", "block_cache"), given))
        result = generate(
            model, prompt, **options, sampler="batch" if batch else "generate",
            strict_published=16 % block > 0, eos_token_ids=[stop],
        )  # fmt: skip
        assert (result.canvas, log_of(result)) == (text[len(prompt) :], log), (seed, options)
        ended += result.stop_reason == "eos"
    assert 0 < ended < ROUNDS


def test_a_prompt_of_exactly_one_block_is_read_unless_strict(tmp_path):
    folder = block_models.write(tmp_path / "model", "fast_dllm_v2", seed=2, block_size=16)
    model, plain = (
        blockbatch.load_model(folder, device="cpu"),
        oracle.PlainBlockModel(folder, block_models.MASK),
    )
    prompt = block_models.prompt(16, 3)
    # At threshold 0 every place is written at once. Nothing else could be told: all MASKs look alike there.
    given = (32, 16, 16, 0.0, False)
    names = ("gen_length", "block_size", "sub_block_size", "threshold", "block_cache")
    texts = set()
    for strict in (False, True):
        text, log = oracle.fast_dllm_v2(plain, prompt, *given, block_models.STOP, fixed=not strict)
        result = generate(model, prompt, **dict(zip(names, given)), strict_published=strict)
        assert (result.canvas, log_of(result)) == (text[16:], log)
        assert [entry["kind"] for entry in result.trace][0] == ("block" if strict else "prefill")
        texts.add(tuple(result.canvas))
    assert len(texts) == 2


def test_plain_logits(tmp_path):
    """The package's full forward of fresh models, against the plain one in double precision."""
    for family in FAMILIES:
        folder = block_models.write(tmp_path / family, family, seed=3)
        model = blockbatch.load_model(folder, device="cpu")
        ids = block_models.prompt(37, 9)
        for size in (None, 1, 5, 16, 64):
            got = model.logits(ids, block_size=size)[0]
            single, _ = oracle.PlainBlockModel(folder, 0).forward(ids, None, size or 16)
            exact, _ = oracle.PlainBlockModel(folder, 0, torch.float64).forward(ids, None, size or 16)
            allowed = 2 * (single - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (got - exact).abs().max() <= allowed, (family, size)
