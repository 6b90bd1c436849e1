"""torch's default device and dtype are the user's: everything here says what it wants."""

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch import METHODS

PROMPT = "a = 3\nb = a + 4\n"


@pytest.fixture
def elsewhere():
    """What is made without a device has no memory, and what is made without a dtype has another one."""
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    assert torch.zeros(1).is_meta and torch.zeros(1).dtype == torch.float64
    yield
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)


def settings():
    yield from (blockbatch.DecodeConfig(method, gen_length=32) for method in METHODS)
    yield blockbatch.DecodeConfig(gen_length=32, query_span="open", refresh_scope="generation", stop="zz")
    yield blockbatch.DecodeConfig("dual_cache", gen_length=32, drafts=(1, 2), eos_exit="window")
    yield blockbatch.DecodeConfig(gen_length=32, trace=True, trace_kv=True)


@pytest.fixture(scope="module")
def usual():
    model = blockbatch.load_model("tiny", device="cpu")
    results = [blockbatch.generate(model, [PROMPT, "x"], config) for config in settings()]
    return model.logits([[1, 2, 3]]), results


def test_loading_and_decoding_are_the_same(usual, elsewhere):
    logits, expected = usual
    model = blockbatch.load_model("tiny", device="cpu")
    assert not model.weights.embedding.is_meta and model.dtype == torch.float32
    assert torch.equal(model.logits([[1, 2, 3]]), logits)
    for config, results in zip(settings(), expected, strict=True):
        for found, result in zip(blockbatch.generate(model, [PROMPT, "x"], config), results, strict=True):
            assert (found.canvas, found.nfe, found.branches) == (result.canvas, result.nfe, result.branches)
        assert [record["kind"] for record in found.trace or ()] == [
            record["kind"] for record in result.trace or ()
        ]
        assert found.trace is None or found.trace[0].get("kv") == result.trace[0].get("kv")


def test_other_dtypes(elsewhere):
    for dtype in ("bfloat16", "float16"):
        model = blockbatch.load_model("tiny", device="cpu", dtype=dtype)
        assert len(blockbatch.generate(model, PROMPT, blockbatch.DecodeConfig(gen_length=16)).canvas) == 16


def test_the_plan_of_the_attention(elsewhere):
    cpu = dict(device="cpu", dtype=torch.int32)
    table = torch.arange(8, **cpu).view(2, 4)
    plan = bbk.attention_plan(
        table,
        torch.tensor([0, 3, 8], **cpu),
        torch.tensor([40, 64], **cpu),
        page_size=16,
        num_tokens=8,
        num_heads=4,
        num_kv_heads=2,
        backend="reference",
    )
    for tensor in plan[:8]:
        assert tensor.device.type == "cpu" and tensor.dtype == torch.int32
    assert int(plan.counts[0]) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("default", ["cuda", "cpu", "meta"])
def test_the_default_device_of_a_gpu(default):
    before = torch.get_default_device()
    torch.set_default_device(default)
    try:
        for device in ("cpu", "cuda"):
            model = blockbatch.load_model("tiny", device=device, dtype="float32")
            result = blockbatch.generate(model, PROMPT, blockbatch.DecodeConfig(gen_length=64))
            assert model.device.type == device and len(result.canvas) == 64
    finally:
        torch.set_default_device(before)
