"""Commit rules of one's own: equal to the built-in ones where they say the same, refused where they fail."""

import random
import warnings

import pytest
import torch

import blockbatch
import plain_models
from blockbatch.decoding.graphs import StepGraphs
from blockbatch.decoding.host_waits import host_wait_of
from blockbatch.decoding.rule import CHOSEN
from custom_methods import PROBLEMS, nothing, registered, threshold_rule, told

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Base, and options of both methods.
SETTINGS = [
    ("dual_cache", {}),
    ("dual_cache", {"block_size": 16, "eos_exit": "window", "refresh_scope": "generation"}),
    ("dual_cache", {"eos_exit": "prefix", "query_span": "open"}),
    ("prefix_cache", {"block_size": 8}),
    ("blockbatch", {}),
    ("blockbatch", {"eos_exit": "none", "refresh_interval": 16}),
    (
        "blockbatch",
        {"block_sizes": (4, 16), "query_span": "open", "merge_threshold": 0.7, "sync_threshold": 2},
    ),
]


@pytest.fixture(scope="module")
def tiny():
    loaded = {}

    def load(device, backend=None):
        if (device, backend) not in loaded:
            loaded[device, backend] = blockbatch.load_model("tiny", device=device, backend=backend)
        return loaded[device, backend]

    return load


def check_equal(model, base, options, threshold=0.9, gen_length=64, prompts=PROBLEMS):
    given = dict(gen_length=gen_length, threshold=threshold, trace=True, **options)
    with registered("copy_of_it", threshold_rule, base=base, options={"threshold": 0.5}):
        ours = blockbatch.generate(model, prompts, blockbatch.DecodeConfig(method="copy_of_it", **given))
    published = blockbatch.generate(model, prompts, blockbatch.DecodeConfig(method=base, **given))
    assert [told(result) for result in ours] == [told(result) for result in published]
    return published


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base, options", SETTINGS, ids=[f"{base} {options}" for base, options in SETTINGS])
def test_the_published_rule_registered(tiny, base, options, device, backend):
    if backend is not None and device == "cpu":
        pytest.skip("the reference is what the CPU runs")
    model = tiny(device, backend)
    for threshold in (0.9, 0.6):
        results = check_equal(model, base, options, threshold)
    assert any(len(record["commits"]) for result in results for record in result.trace)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("base", ["dual_cache", "blockbatch"])
def test_the_published_rule_on_compiled_backends(tiny, base, backend):
    model = tiny("cuda", backend)
    check_equal(model, base, {"eos_exit": "prefix"})
    runners = [runner for runner in model.runners._idle.values() if runner.batch.rule]
    assert runners and (backend == "triton" or StepGraphs.possible(model))
    if StepGraphs.possible(model):
        assert all(runner.graphs._graphs for runner in runners)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_published_rule_on_random_models(tmp_path, family):
    """Confidences on both sides of the thresholds, ends by EOS of several branches at once."""
    getattr(plain_models, f"write_{family}")(tmp_path)
    model = blockbatch.load_model(tmp_path, device="cpu")
    rng = random.Random(5)
    ends = set()
    for _ in range(12):
        prompts = [[rng.randrange(2, 36) for _ in range(rng.randrange(2, 9))] for _ in range(2)]
        tokens = tuple(rng.sample(range(2, 36), 6))
        options = {"eos_token_ids": tokens, "sync_threshold": rng.choice((2, 8, None))}
        for result in check_equal(model, "blockbatch", options, rng.choice((0.05, 0.3, 0.9)), 32, prompts):
            ends.add((result.stop_reason, result.block_size))
    assert {reason for reason, _ in ends} >= {"eos"} and len({size for _, size in ends}) > 1


def test_a_rule_that_chooses_nothing_decodes_a_token_a_forward(tiny):
    """As the fixed schedule of as many steps as tokens does."""
    model = tiny("cpu")
    with registered("never", nothing):
        ours = blockbatch.generate(model, PROBLEMS[0], blockbatch.DecodeConfig(method="never", gen_length=32))
    config = blockbatch.DecodeConfig(method="dual_cache", gen_length=32, threshold=None, steps=32)
    published = blockbatch.generate(model, PROBLEMS[0], config)
    assert (ours.canvas, ours.nfe) == (published.canvas, published.nfe) and ours.nfe.total == 32


def test_what_is_chosen_outside_of_the_windows_is_passed_over(tiny):
    def everything(state, candidates, confidence):
        candidates.fill_(True)  # a copy
        state.tokens.zero_()
        state.window_end.fill_(64)
        return torch.ones_like(candidates)

    with registered("all_at_once", everything):
        config = blockbatch.DecodeConfig(method="all_at_once", gen_length=64, block_size=16, trace=True)
        result = blockbatch.generate(tiny("cpu"), PROBLEMS[0], config)
    # A block a forward, each with its refresh, which is that forward.
    assert result.nfe.total == 4 and len(result.canvas) == 64
    for place, record in enumerate(result.trace):
        assert [commit["positions"] for commit in record["commits"]] == [
            [*range(16 * place, 16 * place + 16)]
        ]


def test_confidences_of_traces_and_merges_are_the_models(tiny):
    with registered("copy_of_it", threshold_rule, base="blockbatch", options={"threshold": 0.9}):
        config = blockbatch.DecodeConfig(method="copy_of_it", gen_length=64, trace=True)
        result = blockbatch.generate(tiny("cpu"), PROBLEMS[0], config)
    values = [
        value for record in result.trace for commit in record["commits"] for value in commit["confidence"]
    ]
    assert values and max(values) <= 1.001 < CHOSEN
    assert sum(branch.merged for branch in result.branches) > 0


def remembering(state, candidates, confidence):
    seen = state.memory["seen"]
    first = seen == 0
    seen.add_(candidates.int())
    # Nothing at the first sight of a position, everything at the second.
    return ~first


def test_a_memory_is_of_the_request(tiny):
    """Zero at its beginning, whatever ran on the buffers before; not shared within a batch."""
    model = tiny("cpu")
    with registered("second_sight", remembering, memory={"seen": torch.int32}):
        config = blockbatch.DecodeConfig(method="second_sight", gen_length=32, block_size=8)
        alone = [blockbatch.generate(model, prompt, config) for prompt in PROBLEMS]
        together = blockbatch.generate(model, PROBLEMS, config)
        # A block takes two forwards: the surest token, then the rest.
        assert alone[0].nfe.total == 2 * 4
        for one, other in zip(alone, together, strict=True):
            assert (one.canvas, one.nfe) == (other.canvas, other.nfe)


@pytest.mark.gpu
def test_a_memory_in_captured_steps(tiny):
    model = tiny("cuda")
    with registered("second_sight", remembering, memory={"seen": torch.int32}):
        config = blockbatch.DecodeConfig(method="second_sight", gen_length=64, block_size=8)
        for _ in range(3):  # a runner with graphs serves again
            assert blockbatch.generate(model, PROBLEMS[0], config).nfe.total == 2 * 8


def waits(state, candidates, confidence):
    if candidates.any():
        return threshold_rule(state, candidates, confidence)
    return candidates


@pytest.mark.gpu
def test_a_rule_that_waits_runs_without_graphs_and_says_so_once(tiny):
    model, config = tiny("cuda"), blockbatch.DecodeConfig(method="dual_cache", gen_length=64)
    published = blockbatch.generate(model, PROBLEMS, config)
    with registered("waits", waits, options={"threshold": 0.9}):
        config = blockbatch.DecodeConfig(method="waits", gen_length=64)
        with pytest.warns(RuntimeWarning, match="method 'waits': its rule waits for the device"):
            results = blockbatch.generate(model, PROBLEMS, config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            blockbatch.generate(model, PROBLEMS[0], config)
    assert [result.canvas for result in results] == [result.canvas for result in published]


@pytest.mark.gpu
def test_graphs_switched_off(tiny):
    model = tiny("cuda")
    with registered("plain_steps", threshold_rule, options={"threshold": 0.9}, graphs=False):
        blockbatch.generate(model, PROBLEMS, blockbatch.DecodeConfig(method="plain_steps", gen_length=64))
    runners = [runner for runner in model.runners._idle.values() if runner.batch.rule]
    assert runners[-1].batch.method.rule.name == "plain_steps" and runners[-1].graphs is None


@pytest.mark.parametrize(
    "run, expected",
    [
        (lambda x: x.topk(2, dim=1).indices, None),
        (lambda x: torch.where(x > 0, x, 0.0).cumsum(1).argmax(1), None),
        (lambda x: torch.zeros_like(x).scatter(1, torch.arange(3).expand(2, 3), x), None),
        (lambda x: x[:, torch.arange(2)], None),
        (lambda x: x.masked_fill(x > 0, 1.0), None),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x.max()), "_local_scalar_dense"),
        (lambda x: 1 if (x > 0).any() else 0, "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.clone().index_put_((x > 0,), torch.tensor(1.0)), "index_put_"),
        (lambda x: (x > 0).nonzero(), "nonzero"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: torch.unique(x), "_unique2"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: torch.nn.functional.one_hot(x.long().abs()), "_local_scalar_dense"),
        (lambda x: torch.argwhere(x), "nonzero"),
        (lambda x: torch.where(x > 0), "nonzero"),
        (lambda x: x.to("meta"), "_to_copy"),
    ],
)  # fmt: skip
def test_host_waits_are_seen(run, expected):
    x = torch.randn(2, 5)
    with torch.no_grad():
        assert host_wait_of(lambda: run(x)) == expected


BAD_MASKS = [
    (lambda s, c, p: None, TypeError, r"bool tensor \[1, 32\] on cpu, got None"),
    (lambda s, c, p: p, ValueError, r"bool tensor \[1, 32\] on cpu, got float32 \[1, 32\] on cpu"),
    (lambda s, c, p: c.int(), ValueError, r"bool tensor .* got int32 \[1, 32\] on cpu"),
    (lambda s, c, p: c[:, :5], ValueError, r"bool tensor .* got bool \[1, 5\] on cpu"),
    (lambda s, c, p: c[0], ValueError, r"bool tensor .* got bool \[32\] on cpu"),
    (lambda s, c, p: c.to("meta"), ValueError, r"bool tensor .* got bool \[1, 32\] on meta"),
]


@pytest.mark.parametrize("rule, error, message", BAD_MASKS, ids=range(len(BAD_MASKS)))
def test_wrong_masks_are_refused_before_any_forward(tiny, monkeypatch, rule, error, message):
    model = tiny("cpu")
    monkeypatch.setattr(model, "predict", lambda *args, **options: pytest.fail("a forward ran"))
    with registered("wrong", rule):
        with pytest.raises(error, match="method 'wrong': expected a rule that returns a " + message):
            blockbatch.generate(model, PROBLEMS[0], blockbatch.DecodeConfig(method="wrong", gen_length=32))


def test_an_error_of_the_rule_is_the_callers(tiny):
    def broken(state, candidates, confidence):
        return candidates[state.options["no such option"]]

    with registered("broken", broken), pytest.raises(KeyError, match="no such option"):
        blockbatch.generate(tiny("cpu"), PROBLEMS[0], blockbatch.DecodeConfig(method="broken", gen_length=32))


def test_gaps_of_a_text(tiny):
    """Given tokens stand, and a rule sees the MASKs between them alone."""
    text = "3*16={2}, 51-48={3}\n"
    with registered("copy_of_it", threshold_rule, base="blockbatch", options={"threshold": 0.9}):
        ours = blockbatch.fill(tiny("cpu"), text, blockbatch.DecodeConfig(method="copy_of_it", gen_length=32))
    published = blockbatch.fill(tiny("cpu"), text, blockbatch.DecodeConfig(gen_length=32))
    assert (ours.text, ours.nfe) == (published.text, published.nfe)


def test_stop_texts(tiny):
    given = dict(gen_length=64, stop=",")
    with registered("copy_of_it", threshold_rule, base="blockbatch", options={"threshold": 0.9}):
        ours = blockbatch.generate(
            tiny("cpu"), PROBLEMS, blockbatch.DecodeConfig(method="copy_of_it", **given)
        )
    published = blockbatch.generate(tiny("cpu"), PROBLEMS, blockbatch.DecodeConfig(**given))
    assert [told(result) for result in ours] == [told(result) for result in published]
    assert [result.stop_reason for result in ours] == ["stop"] * 2


def test_under_the_callers_inference_mode(tiny):
    with registered("second_sight", remembering, memory={"seen": torch.int32}):
        config = blockbatch.DecodeConfig(method="second_sight", gen_length=32, block_size=8)
        expected = blockbatch.generate(tiny("cpu"), PROBLEMS[0], config)
        with torch.inference_mode():
            assert blockbatch.generate(tiny("cpu"), PROBLEMS[0], config).canvas == expected.canvas


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base", ["dual_cache", "blockbatch"])
@pytest.mark.parametrize(
    "drawn", [{"confidence": "margin"}, {"confidence": "entropy"}, {"temperature": 2.0, "seed": 3}], ids=str
)
def test_drawn_tokens_and_other_confidences(tiny, base, drawn, device):
    """A rule compares what the built-in rule compares: margins with a threshold are a rule of margins."""
    results = check_equal(tiny(device), base, {**drawn, "eos_exit": "prefix"}, 0.7, 32)
    given = dict(method=base, gen_length=32, threshold=0.7, eos_exit="prefix", trace=True)
    greedy = blockbatch.generate(tiny(device), PROBLEMS, blockbatch.DecodeConfig(**given))
    assert all(told(one) != told(other) for one, other in zip(results, greedy, strict=True))
