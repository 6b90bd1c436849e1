"""The rules of examples/, run as they stand there, and held to a decoder without cache written naively."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import blockbatch
from blockbatch.cli import main
from blockbatch.registry import registered_methods
from custom_methods import PROBLEMS

EXAMPLES = Path(__file__).parents[1] / "examples"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for name in registered_methods():
        blockbatch.unregister_method(name)


@pytest.mark.parametrize("name", ["top_two", "stable_tokens"])
def test_as_programs_and_as_plugins(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, PROBLEMS[0]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    text, counts = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    plugin = ["--plugin", str(EXAMPLES / f"{name}.py"), "--method", name, "--eos-exit", "prefix"]
    assert main(["generate", PROBLEMS[0], "--gen-length", "64", *plugin]) == 0
    assert capsys.readouterr().out.rstrip("\n") == text
    assert counts.endswith("forwards")


def naive(model, prompt, gen_length, block_size, choose):
    """Whole forwards, one block after the other; `choose` gives the positions of a block that are written.

    Args:
        choose: called with the block's MASKs, their top tokens and confidences, and what the last forward
            predicted (a dict, empty at first), all by position.
    """
    mask = model.spec.mask_token_id
    ids = model.tokenizer.encode(prompt)
    canvas, forwards, last = ids + [mask] * gen_length, 0, {}
    for start in range(len(ids), len(canvas), block_size):
        while masks := [p for p in range(start, start + block_size) if canvas[p] == mask]:
            probabilities = model.logits([canvas])[0].float().softmax(-1)
            forwards += 1
            values, tokens = probabilities.max(-1)
            tokens, values = tokens.tolist(), values.tolist()
            chosen = choose(masks, tokens, values, last) or [max(masks, key=lambda p: (values[p], -p))]
            last |= {p: tokens[p] for p in masks}
            for position in chosen:
                canvas[position] = tokens[position]
    return canvas[len(ids) :], forwards


def two_surest(masks, tokens, values, last):
    return sorted(masks, key=lambda p: (-values[p], p))[:2]


def seen_twice(masks, tokens, values, last):
    return [p for p in masks if last.get(p) == tokens[p] and values[p] >= 0.6]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["top_two", "stable_tokens"])
def test_without_a_cache_they_choose_what_a_naive_decoder_chooses(rule, device):
    model = blockbatch.load_model("tiny", device=device, dtype="float32")
    module = runpy.run_path(str(EXAMPLES / f"{rule}.py"))
    builder = blockbatch.commit_rule(
        module[rule],
        base="vanilla",
        options={"threshold": 0.6} if rule == "stable_tokens" else None,
        memory={"seen": torch.int32} if rule == "stable_tokens" else None,
    )
    blockbatch.register_method("without_cache", builder)
    config = blockbatch.DecodeConfig(method="without_cache", gen_length=32, block_size=8)
    results = blockbatch.generate(model, PROBLEMS, config)
    forwards = set()
    for prompt, result in zip(PROBLEMS, results, strict=True):
        choose = two_surest if rule == "top_two" else seen_twice
        expected = naive(model, prompt, 32, 8, choose)
        assert (result.canvas, result.nfe.total) == expected
        forwards.add(result.nfe.total)
    # Two tokens a forward; a token a forward is what the stable rule has where nothing is stable.
    assert forwards == {16} if rule == "top_two" else all(4 < count < 32 for count in forwards)


def test_the_programs_of_the_page():
    page = (EXAMPLES.parent / "docs" / "custom_rules.md").read_text()
    scope = {}
    for program in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(program, scope)
    assert registered_methods() == ("top_two", "sure") and scope["config"].threshold == 0.8
    # Every field of the state is on the page.
    for field in blockbatch.RuleState._fields:
        assert f"state.{field}" in page, field
