"""Whole decodes on a GPU: captured steps, memory that stays, no waits but one a step, use after a failure."""

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch import tiny
from blockbatch.decoding.graphs import StepGraphs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model():
    loaded = blockbatch.load_model("tiny", device="cuda", dtype="float32")
    assert StepGraphs.possible(loaded), "the compiled operators are not all there"
    return loaded


def prompts(count):
    problems = [
        tiny.generate_problems(family, "test", count, 0) for family in ("arithmetic", "code", "symbolic")
    ]
    return [problem.prompt for trio in zip(*problems) for problem in trio][:count]


def decode(model, prompt, **options):
    return blockbatch.generate(model, prompt, blockbatch.DecodeConfig(gen_length=128, **options))


def test_a_gpu_is_the_default():
    loaded = blockbatch.load_model("tiny")
    assert loaded.device.type == "cuda" and loaded.dtype == torch.bfloat16
    assert bbk.backend_of("varlen_attention", loaded.device) != "reference"


CHEAPER = [
    {},
    {"query_span": "open", "refresh_scope": "generation"},
    {"method": "dual_cache", "refresh_scope": "generation", "drafts": (1, 2, 4), "eos_exit": "prefix"},
]


@pytest.mark.parametrize("options", CHEAPER, ids=str)
def test_replayed_steps_equal_steps_run_as_they_are(model, monkeypatch, options):
    replayed = [decode(model, prompt, **options) for prompt in prompts(12)]  # each size after its first step
    monkeypatch.setattr(StepGraphs, "possible", staticmethod(lambda model: False))
    plain = blockbatch.load_model("tiny", device="cuda", dtype="float32")
    for prompt, result in zip(prompts(12), replayed):
        expected = decode(plain, prompt, **options)
        assert (result.canvas, result.nfe, result.branches) == (
            expected.canvas,
            expected.nfe,
            expected.branches,
        )


def test_memory_stays_over_a_hundred_decodes(model):
    some = prompts(20)
    longest = max(some, key=len)
    for prompt in [longest, *some * 3]:  # whole rows are captured when their sizes come up again
        decode(model, prompt)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(5):
        for prompt in some:
            decode(model, prompt)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("options", CHEAPER, ids=str)
def test_a_step_waits_for_the_device_once(model, options, unchecked):
    """Anything that waits on its own, such as .item(), raises in this mode; the wait on an event does not."""
    ids = model.tokenizer.encode(prompts(1)[0])
    config = blockbatch.DecodeConfig(gen_length=128, **options)
    for _ in range(2):
        session = blockbatch.generation.open_session(model, ids, config)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            session.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_failed_decode_leaves_the_engine_usable(model, monkeypatch):
    prompt = prompts(1)[0]
    expected = decode(model, prompt)
    for name in ("decode_policy", "lm_head_confidence"):
        # Of whole rows that are captured already no operator is called.
        fresh = blockbatch.load_model("tiny", device="cuda", dtype="float32")
        with monkeypatch.context() as broken:
            broken.setattr(bbk, name, lambda *args, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                decode(fresh, prompt)
        result = decode(fresh, prompt)
        assert (result.canvas, result.nfe) == (expected.canvas, expected.nfe)


def test_a_failure_inside_a_capture(model, monkeypatch):
    fresh = blockbatch.load_model("tiny", device="cuda", dtype="float32")
    prompt = max(prompts(9), key=lambda prompt: decode(model, prompt).nfe.block)
    original, calls = bbk.linear_swiglu, []

    def fails_while_capturing(*args, **options):
        calls.append(1)
        if torch.cuda.is_current_stream_capturing():
            raise ZeroDivisionError
        return original(*args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(bbk, "linear_swiglu", fails_while_capturing)
        with pytest.raises(ZeroDivisionError):
            decode(fresh, prompt)
    assert calls
    result, expected = decode(fresh, prompt), decode(fresh, prompt)
    assert (result.canvas, result.nfe) == (expected.canvas, expected.nfe)


def test_two_streams_at_a_time(model):
    first, second = prompts(2)
    config = blockbatch.DecodeConfig(gen_length=128)
    whole = [blockbatch.generate(model, prompt, config).text for prompt in (first, second)]
    texts = ["", ""]
    streams = [blockbatch.stream(model, prompt, config) for prompt in (first, second)]
    for _ in range(200):
        for index, pieces in enumerate(streams):
            texts[index] += next(pieces, "")
    assert texts == whole


def test_several_prompts_in_one_batch(model):
    some = prompts(6)
    together = blockbatch.generate(model, some, blockbatch.DecodeConfig(gen_length=128))
    assert [result.canvas for result in together] == [decode(model, prompt).canvas for prompt in some]


def test_too_little_memory_is_said_before_any_work(model):
    small = blockbatch.load_model("tiny", device="cuda", cache_bytes=2**20)
    with pytest.raises(MemoryError, match="cache_bytes: expected at least .* got 1,048,576"):
        decode(small, prompts(1)[0])


def test_the_command_line_takes_the_gpu_and_says_what_it_needs(capsys):
    from blockbatch.cli import main

    assert main(["generate", "--prompt", prompts(1)[0], "--gen-length", "64"]) in (0, None)
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert printed.err.startswith("cuda:0: K/V cache ") and "MiB free beside the weights" in printed.err
