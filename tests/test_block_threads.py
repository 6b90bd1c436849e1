"""Block-causal models where others work too: threads that share a model, and numbers that break."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import block_models
import blockbatch
from blockbatch.decoding import NonFiniteLogitsError


@pytest.fixture
def model(tmp_path):
    return blockbatch.load_model(block_models.write(tmp_path / "model", "sdar", seed=7), device="cpu")


def config(**options):
    return blockbatch.DecodeConfig(
        **{"method": "block_diffusion", "threshold": 0.3, "gen_length": 96, "eos_token_ids": (), **options}
    )


@pytest.mark.parametrize("options", [{}, {"prefix_cache": True}, {"method": "blockbatch"}])
def test_threads_share_the_pages_of_a_model(model, options):
    """The pool grows and moves while others decode; every text is the one that it is alone."""
    prompts = [block_models.prompt(3 + 5 * seed, seed) for seed in range(12)]
    other = blockbatch.load_model(model.name, device="cpu")
    expected = [blockbatch.generate(other, prompt, config()).canvas for prompt in prompts]
    if options.get("method"):
        expected = [blockbatch.generate(other, prompt, config(**options)).canvas for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda ids: blockbatch.generate(model, ids, config(**options)), prompts))
    assert [result.canvas for result in found] == expected
    assert model.pool.held() == 0


@pytest.mark.parametrize("method", ["block_diffusion", "blockbatch"])
def test_logits_that_are_not_finite(model, method):
    prompts = [[1, 2], [3] * 20, [4]]
    expected = blockbatch.generate(model, prompts, config(method=method))
    kept = model.weights.embedding[3].clone()
    model.weights.embedding[3] = float("nan")
    with pytest.raises(
        NonFiniteLogitsError, match=r"prompt\[1\]: expected finite logits, .* in fused forward 1"
    ):
        blockbatch.generate(model, prompts, config(method=method))
    assert model.pool.held() == 0
    # Pages that held NaN serve the next decode.
    model.weights.embedding[3] = kept
    assert torch.isnan(model.pool.kv).any()
    again = blockbatch.generate(model, prompts, config(method=method))
    assert [result.canvas for result in again] == [result.canvas for result in expected]
