"""The built-in block diffusion model: it loads, and what it decodes on a CPU is right, at any length."""

import pytest
import torch

import blockbatch
from blockbatch import tiny
from blockbatch.evaluation.settings import parse_setting
from blockbatch.tasks.built_in.several import check_answers, draw_texts, join

# Forwards one by one, as published.
PUBLISHED = dict(method="block_diffusion", threshold=0.9, fuse_store=False)
LONG = 1024


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny-block", device="cpu")


def problems():
    return [problem for family in tiny.FAMILIES for problem in tiny.generate_problems(family, "test", 3, 1)]


def decoded(model, prompts, gen_length=160, **options):
    return blockbatch.generate(model, prompts, blockbatch.DecodeConfig(gen_length=gen_length, **options))


def test_what_was_loaded(model):
    spec = model.spec
    assert (spec.family, spec.block_size, spec.num_layers, spec.hidden_size) == ("sdar", 32, 8, 256)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (6, 2, 64, 1416)
    assert spec.mask_token_id == model.tokenizer.encode("<|mdm_mask|>")[0]
    assert spec.eos_token_ids == (model.tokenizer.encode("<|endoftext|>")[0],)
    assert spec.max_length > 10_000 and model.dtype == torch.float32


def test_problems_are_solved_by_every_rule(model):
    drawn = problems()
    prompts = [problem.prompt for problem in drawn]
    published = decoded(model, prompts, **PUBLISHED)
    joined = decoded(model, prompts, **{**PUBLISHED, "fuse_store": True})
    branches = decoded(model, prompts)
    assert [one.tokens for one in joined] == [one.tokens for one in published]
    for results in (published, branches):
        right = [tiny.check(problem, one.text) for problem, one in zip(drawn, results, strict=True)]
        assert sum(right) >= 8, right
        assert {one.stop_reason for one in results} == {"eos"}
    forwards = [sum(one.nfe.total for one in results) for results in (published, joined, branches)]
    assert forwards[0] > forwards[1] > forwards[2]


def test_answers_behind_a_thousand_tokens_are_right(model):
    drawn = [problem for family in tiny.FAMILIES for problem in tiny.generate_problems(family, "test", 8, 1)]
    text = draw_texts(drawn, 12, 1)[0]
    prompt, reference = join(text)
    (result,) = decoded(model, [prompt], 1536, method="block_diffusion", threshold=0.9, max_length="grow")
    assert result.stop_reason == "eos"
    assert len(model.tokenizer.encode(prompt)) + len(result.tokens) > LONG
    right = check_answers(text, result.text)
    assert sum(right) >= 8 and any(right[-2:]), right
    assert all(check_answers(text, reference))


def test_a_switch_of_a_setting_is_written_as_on_the_command_line():
    for written, expected in (("off", False), ("on", True), ("false", False), ("none", None)):
        setting = parse_setting(f"apart:method=block_diffusion,fuse_store={written}", 128)
        assert setting.config.fuse_store is expected
    with pytest.raises(ValueError, match="--set: apart: fuse_store: expected on or off, got '0'"):
        parse_setting("apart:method=block_diffusion,fuse_store=0", 128)


def test_torchs_default_device_and_dtype_are_the_users(model):
    prompt = problems()[0].prompt
    settings = (PUBLISHED, {})
    expected = [decoded(model, prompt, 64, **options) for options in settings]
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        again = blockbatch.load_model("tiny-block", device="cpu")
        assert again.dtype == torch.float32 and not again.weights.embedding.is_meta
        found = [decoded(again, prompt, 64, **options) for options in settings]
    finally:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
    for one, other in zip(found, expected, strict=True):
        assert (one.canvas, one.nfe) == (other.canvas, other.nfe)
