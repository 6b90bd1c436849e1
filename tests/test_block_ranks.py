"""Block-causal models that several processes hold together, over gloo: what one process decodes."""

import random

import pytest
import torch

import block_models
import block_rank_cases as cases
import blockbatch
import engine_rank_cases
import rank_cases
import rank_processes
from block_causal_data import FAMILIES, records
from test_engine_blocks import random_config
from test_engine_ranks import alone

pytestmark = pytest.mark.xdist_group("block_ranks")

PROMPT = "Divide with remainder until zero: 51 and 16."
PROMPTS = [PROMPT, "Sort: 5 2 9", "Reverse: 3 1 4 1 5"]
LENGTH = {"gen_length": 64}
TINY = [
    (PROMPT, {"method": "block_diffusion", **LENGTH}),
    (PROMPT, {"method": "block_diffusion", **LENGTH, "stop": ("=15",), "prefix_cache": True}),
    (PROMPTS, {"method": "block_diffusion", **LENGTH, "fuse_store": False}),
    (PROMPTS, {"method": "blockbatch", **LENGTH, "block_sizes": (4, 8, 32), "sync_threshold": 2}),
    (PROMPT, {"method": "block_diffusion", **LENGTH, "temperature": 0.8, "seed": 3}),
    (PROMPT, {"method": "block_diffusion", **LENGTH, "bad_token_ids": (7,)}),
]


two = rank_processes.fixture(2)


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny-block", device="cpu")


def test_two_ranks_decode_what_one_process_decodes(two, tiny):
    expected = [
        rank_cases.outcomes(blockbatch.generate(tiny, prompt, blockbatch.DecodeConfig(**options)))
        for prompt, options in TINY
    ]
    assert two.same(rank_cases.decode_all, "tiny-block", TINY) == expected


def test_two_ranks_stream_what_one_process_streams(two, tiny):
    options = TINY[0][1]
    expected = list(blockbatch.stream(tiny, PROMPT, blockbatch.DecodeConfig(**options)))
    assert two.same(rank_cases.stream, "tiny-block", PROMPT, options) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_published_decodes(two, family):
    two.values(cases.check_records, family, range(0, len(records(family)), 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(two, family, tmp_path):
    """Norms of heads and biases are in the right parts."""
    folder = str(block_models.write(tmp_path, family))
    ids = [[5, 7, 90, 3, 94, 94], [8, 8, 1, 94, 2, 10]]
    first, second = two.values(rank_cases.logits, folder, ids)
    assert torch.equal(first, second)
    expected = blockbatch.load_model(folder, device="cpu").logits(ids)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1, 64, None])
def test_an_engine_serves_what_one_process_decodes(two, family, budget, tmp_path):
    """Requests that join and are cancelled at random, drawn ones of several kinds among them."""
    folder = block_models.write(tmp_path, family, seed=7)
    model = blockbatch.load_model(folder, device="cpu")
    rng = random.Random(f"{family} {budget}")
    requests = [
        (block_models.prompt(rng.randint(1, 70), number), random_config(rng, family), {"confidences": True})
        for number in range(14)
    ]
    options = dict(cancel=0.2, max_requests=6, max_tokens_per_step=budget, cache_tokens=2048)
    found, _ = two.values(engine_rank_cases.mix, str(folder), requests, 3, **options)[0]
    expected = alone(model, requests)
    assert sum(one is not None for one in found) > 7
    assert len({config.is_plain for _, config, _ in requests}) == 2
    for one, right, request in zip(found, expected, requests, strict=True):
        assert one is None or one[0] == right, request


def test_a_rank_that_differs_ends_the_decode(two):
    options = {"method": "block_diffusion", **LENGTH, "threshold": 1.0}
    for forwards, error in two.values(cases.diverge, "tiny-block", 3, PROMPT, options):
        assert "the state of the decode" in error and forwards < 40


def test_a_rank_that_differs_ends_the_engine(two):
    options = {"method": "block_diffusion", **LENGTH, "threshold": 1.0}
    for error in two.values(cases.diverge_in_engine, "tiny-block", 3, PROMPT, options):
        assert "the state of the engine" in error


def test_numbers_that_break_end_the_decode_on_all_ranks(two):
    found = two.same(cases.poison, "tiny-block", PROMPT, {"method": "block_diffusion", **LENGTH})
    assert len(found) == 2
    for error in found:
        assert error.startswith("prompt: expected finite logits, got NaN")


def test_whole_rows_are_refused(two):
    for answer in two.run(rank_cases.load, "tiny-block", whole_rows=True):
        assert answer.type == "ValueError" and answer.text.startswith(
            "whole_rows: expected False for sdar, whose attention is causal across blocks, got True"
        )
