"""Confidences of commits on a GPU: those of the CPU, with captured steps that keep them or do not."""

from pathlib import Path

import pytest
import torch

import blockbatch
from blockbatch.decoding.engine import Engine

pytestmark = pytest.mark.gpu
FOLDER = Path(__file__).parent / "data" / "conformance"
CASES = [
    dict(method="dual_cache", block_size=32, eos_exit="prefix"),
    dict(method="dual_cache", block_size=32, eos_exit="prefix", drafts=(1, 2, 4)),
    dict(block_sizes=(4, 8, 16, 64), sync_threshold=2),
    dict(block_sizes=(16, 32), query_span="open", refresh_scope="generation"),
]


def decoded(device, backend, options):
    """Four requests one after the other, every second of which asks, then all at a time."""
    model = blockbatch.load_model(FOLDER, device=device, dtype="float32", backend=backend)
    engine = Engine(model, max_requests=4, cache_tokens=4096)
    config = blockbatch.DecodeConfig(gen_length=64, threshold=0.8, **options)
    prompts, alone = [list(range(3, 9 + number)) for number in range(4)], []
    for number, prompt in enumerate(prompts):
        alone.append(engine.submit(prompt, config, confidences=bool(number % 2)))
        engine.run_until_idle()
    together = [engine.submit(prompt, config, confidences=True) for prompt in prompts]
    engine.run_until_idle()
    return alone, together


@pytest.mark.parametrize("backend", ["triton", "cuda", None], ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_they_are_those_of_the_cpu(backend, options):
    expected, found_on_gpu = decoded("cpu", None, options), decoded("cuda", backend, options)
    assert [request.confidences is None for request in found_on_gpu[0]] == [True, False] * 2
    for found, known in zip(sum(found_on_gpu, []), sum(expected, []), strict=True):
        assert found.result.tokens == known.result.tokens and found.nfe == known.nfe
        if known.confidences is not None:
            values, wanted = torch.tensor(found.confidences), torch.tensor(known.confidences)
            torch.testing.assert_close(
                values[: len(found.final)], wanted[: len(known.final)], rtol=1e-3, atol=1e-4
            )
