"""The options that say how tokens are drawn: what they may be, and where they come from."""

import json

import numpy
import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch import DecodeConfig
from blockbatch.cli import main
from blockbatch.config import decode_settings
from blockbatch.decoding.choice import method_for, sampling_for
from blockbatch.evaluation.harness_options import decode_options
from blockbatch.evaluation.settings import parse_setting
from blockbatch.sampling_options import CONFIDENCES, SamplingOptions

NOT_A_NUMBER = float("nan")
BAD = [
    ({"temperature": "hot"}, TypeError, "temperature: expected a number, got 'hot'"),
    ({"temperature": -1}, ValueError, "temperature: expected 0 or a number from 0.001 to 1000, got -1"),
    ({"temperature": 1e-9}, ValueError, "temperature: expected 0 or a number from 0.001 to 1000, got 1e-09"),
    ({"temperature": NOT_A_NUMBER}, ValueError, "temperature: expected a finite number, got nan"),
    ({"temperature": True}, TypeError, "temperature: expected a number, got True"),
    ({"temperature": None}, TypeError, "temperature: expected a number, got None"),
    ({"top_p": 0.0, "temperature": 1}, ValueError, "top_p: expected a value above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5, "temperature": 1}, ValueError, "top_p: expected a value above 0 and at most 1, got 1.5"),
    ({"top_p": "all", "temperature": 1}, TypeError, "top_p: expected a number, got 'all'"),
    ({"top_p": 0.9}, ValueError, "top_p: expected None at temperature 0, which draws nothing, got 0.9"),
    ({"top_k": 0, "temperature": 1}, ValueError, "top_k: expected at least 1, got 0"),
    ({"top_k": 2.5, "temperature": 1}, TypeError, "top_k: expected an integer, got 2.5"),
    ({"top_k": 3}, ValueError, "top_k: expected None at temperature 0, which draws nothing, got 3"),
    ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
    ({"seed": 2**63}, ValueError, f"seed: expected at most 2**63 - 1, got {2**63}"),
    ({"seed": "a"}, TypeError, "seed: expected an integer, got 'a'"),
    ({"min_tokens": -1}, ValueError, "min_tokens: expected at least 0, got -1"),
    ({"min_tokens": 257}, ValueError, "min_tokens: expected at most gen_length = 256, got 257"),
    ({"min_tokens": 1.0}, TypeError, "min_tokens: expected an integer, got 1.0"),
    ({"eos_bias": float("inf")}, ValueError, "eos_bias: expected a finite number, got inf"),
    ({"eos_bias": 2e4}, ValueError, "eos_bias: expected a number from -10000 to 10000, got 20000.0"),
    ({"eos_bias": "low"}, TypeError, "eos_bias: expected a number, got 'low'"),
    ({"bad_token_ids": 7}, TypeError, "bad_token_ids: expected a sequence of integers, got 7"),
    ({"bad_token_ids": "7"}, TypeError, "bad_token_ids: expected a sequence of integers, got '7'"),
    ({"bad_token_ids": [1, -2]}, ValueError, "bad_token_ids: expected at least 0, got -2"),
    ({"bad_token_ids": [1.5]}, TypeError, "bad_token_ids: expected an integer, got 1.5"),
    (
        {"confidence": "sure"},
        ValueError,
        "confidence: expected one of probability, entropy, margin, got 'sure'",
    ),
    (
        {"method": "dual_cache", "drafts": (1, 2), "temperature": 0.5},
        ValueError,
        "drafts: expected None at a temperature above 0: no draft knows what will be drawn, got (1, 2)",
    ),
]


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.mark.parametrize("options, error, message", BAD, ids=[str(options) for options, _, _ in BAD])
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error) as caught:
        DecodeConfig(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bad_token_ids=(10**6,)), "bad_token_ids: expected ids from 0 to"),
        (dict(min_tokens=3, eos_token_ids=()), "min_tokens: expected 0 for a model without an EOS, got 3"),
        (dict(eos_bias=-1, eos_token_ids=()), "eos_bias: expected 0 for a model without an EOS, got -1.0"),
    ],
)
def test_what_the_model_cannot_have_is_named(tiny, options, message):
    for call in (blockbatch.generate, blockbatch.stream):
        with pytest.raises(ValueError, match=message):
            call(tiny, "1+1", DecodeConfig(**options))
    with pytest.raises(ValueError, match="bad_token_ids: expected to leave a token that can be written"):
        method_for(tiny, DecodeConfig(bad_token_ids=range(tiny.spec.vocab_size)))


def test_the_presets_with_drafts_refuse_a_temperature():
    with pytest.raises(ValueError, match="drafts: expected None at a temperature above 0"):
        DecodeConfig.preset("careful", temperature=0.5)
    assert DecodeConfig.preset("careful", temperature=0.5, drafts=None).temperature == 0.5
    assert DecodeConfig.preset("careful", eos_bias=-1.0, confidence="margin").drafts == (1, 2, 3)


def test_numbers_of_numpy_and_torch_are_kept_as_pythons():
    config = DecodeConfig(
        temperature=torch.tensor(0.5), top_p=numpy.float32(0.5), top_k=numpy.int64(3),
        seed=numpy.uint8(7), min_tokens=torch.tensor(4), eos_bias=numpy.float64(-1),
        bad_token_ids=torch.tensor([3, 1, 3]),
    )  # fmt: skip
    kinds = [type(getattr(config, name)) for name in ("temperature", "top_p", "top_k", "seed", "min_tokens")]
    assert kinds == [float, float, int, int, int] and config.bad_token_ids == (3, 1)
    assert DecodeConfig(bad_token_ids=numpy.array([2, 5])) == DecodeConfig(bad_token_ids=(2, 5))
    assert hash(config) == hash(DecodeConfig(**decode_settings_of(config)))


def decode_settings_of(config):
    return {**decode_settings(config), "method": config.method}


def test_settings_tell_what_was_given():
    assert not set(decode_settings(DecodeConfig())) & set(SamplingOptions.__dataclass_fields__)
    found = decode_settings(DecodeConfig(temperature=0.5, seed=3))
    assert (found["temperature"], found["seed"]) == (0.5, 3) and "top_p" not in found
    assert CONFIDENCES == bbk.CONFIDENCES


def test_seeds_of_a_list():
    seeds = {blockbatch.request_seed(seed, index) for seed in range(30) for index in range(30)}
    assert len(seeds) == 30 * 30 and all(0 <= seed < 2**63 for seed in seeds)
    assert blockbatch.request_seed(17, 0) == 17
    # Written down: a change would be another text for everybody's seed.
    assert blockbatch.request_seed(0, 1) == 3792036479730369372


def test_plain_decodes_have_no_kind(tiny):
    for config in (DecodeConfig(), DecodeConfig(seed=7)):
        assert config.is_plain and method_for(tiny, config).sampling is None
        assert sampling_for(tiny, config, 3) is None
    kind = method_for(tiny, DecodeConfig(temperature=0.5, top_p=1.0)).sampling
    assert kind == ("probability", False, False, ())
    asked = sampling_for(tiny, DecodeConfig(min_tokens=4, bad_token_ids=(9, 2)), 0)
    ends = tiny.eos_token_ids
    kind = method_for(tiny, DecodeConfig(min_tokens=4, bad_token_ids=(9, 2))).sampling
    assert kind.changed == tuple(sorted({9, 2, *ends}))
    assert asked.min_tokens == tuple(4 if token in ends else 0 for token in kind.changed)


def test_the_command_line(capsys):
    command = [
        "generate",
        "3+4=",
        "--device",
        "cpu",
        "--gen-length",
        "16",
        "--json",
        "--method",
        "dual_cache",
    ]
    drawn = ["--temperature", "1.5", "--top-p", "0.9", "--top-k", "none", "--seed", "5", "--min-tokens", "4"]
    drawn += ["--eos-bias", "-2", "--bad-token-ids", "3,4", "--confidence", "margin"]
    reports = []
    for _ in range(2):
        assert main([*command, *drawn]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["tokens"] == reports[1]["tokens"]
    settings = reports[0]["settings"]
    assert settings["temperature"] == 1.5 and settings["bad_token_ids"] == [3, 4]
    assert settings["eos_bias"] == -2.0 and "top_k" not in settings
    assert main([*command, "--top-p", "0.9"]) == 2
    assert "top_p: expected None at temperature 0" in capsys.readouterr().err


def test_settings_of_an_evaluation_and_of_the_harness():
    setting = parse_setting("warm:temperature=0.5,seed=3,bad_token_ids=4/5,confidence=entropy", 64)
    config = setting.config
    assert (config.temperature, config.seed, config.bad_token_ids) == (0.5, 3, (4, 5))
    assert config.confidence == "entropy"
    given = decode_options(None, {"temperature": 0.5, "top_p": "none", "bad_token_ids": "4:5"})
    assert DecodeConfig(**given) == DecodeConfig(temperature=0.5, bad_token_ids=(4, 5))


def test_an_evaluation_draws_the_same_in_batches_of_any_size(tiny):
    from blockbatch import generation

    prompts = [tiny.tokenizer.encode(text) for text in ("2+2=", "3*5=", "9-1=")]
    config = DecodeConfig(method="dual_cache", gen_length=16, temperature=2.0, seed=1)
    together = generation.decode(tiny, prompts, config, numbers=[4, 9, 2])
    for prompt, number, result in zip(prompts, [4, 9, 2], together, strict=True):
        (alone,) = generation.decode(tiny, [prompt], config, numbers=[number])
        assert alone.canvas == result.canvas
