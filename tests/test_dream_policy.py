"""Dream's published rule on random states: the reference against the oracle, and what is refused."""

import dataclasses
import random

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
import dream_bridge
from blockbatch.generation import generate
from oracle import dream_policy as policy
from oracle.dream_decoder import DreamConfig, decode
from oracle.dream_states import random_case
from oracle.scripted import ScriptedModel
from oracle.states import EOS
from scripted_engine import EngineScripted
from test_decoding import assert_equal


def against_oracle(seed, decode_policy):
    phase, config, state, forwards = random_case(seed)
    params = dream_bridge.params_of(config, state, EOS)
    tensors = dream_bridge.to_tensors(state, params)
    plan, predictions = dream_bridge.step_inputs(state, forwards, phase)
    plan, events = decode_policy(tensors, predictions, plan, params)
    dream_bridge.FUNCTIONS[phase](state, config, forwards)
    dream_bridge.assert_same(state, config, tensors, plan, events)


@pytest.mark.parametrize("first", range(0, 600, 150))
def test_random_states_equal_the_oracle(first):
    for seed in range(first, first + 150):
        try:
            against_oracle(seed, bbk.decode_policy)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_random_states_meet_every_event():
    seen = dict.fromkeys(("init", "block", "refresh", "merge", "sync", "eos", "length", "due", "sticky"), 0)
    for seed in range(600):
        phase, config, state, forwards = random_case(seed)
        before = [dict(branch, tokens=list(branch["tokens"])) for branch in state["branches"]]
        dream_bridge.FUNCTIONS[phase](state, config, forwards)
        seen[phase] += 1
        seen["due"] += state["refresh_due"]
        for kind, *_ in state["events"]:
            seen[kind] += 1
        if state["stop_reason"]:
            seen[state["stop_reason"]] += 1
        for i, branch in enumerate(state["branches"]):
            if branch["synced"]:
                continue
            for p, (old, new) in enumerate(zip(before[i]["tokens"], branch["tokens"])):
                # Merged although this forward did not predict it.
                seen["sticky"] += phase == "block" and old != new and new not in (
                    forwards[i]["top"][p], *forwards[i]["likely"][p]
                )  # fmt: skip
    assert min(seen.values()) > 10, seen


def scripted(rng):
    return ScriptedModel(
        rng.randrange(10**6),
        peak=rng.choice(((0.0, 2.0), (1.0, 8.0), (3.0, 9.0))),
        agreement=rng.choice((0.5, 0.8, 0.95)),
        eos_rate=rng.choice((0.0, 0.02, 0.1)),
        eos_count=rng.choice((1, 2)),
        prediction_offset=1,
        suppress_mask=True,
    )


def settings(rng):
    options = {
        "gen_length": 64,
        "block_sizes": rng.choice(((4, 8, 16, 32), (1, 2, 4, 8), (8, 32), (16,), (4, 8, 16, 32, 64))),
        "threshold": rng.choice((0.7, 0.9)),
        "sync_threshold": rng.choice((1, 4, 8, None)),
        "refresh_interval": rng.choice((8, 32, None)),
        "eos_exit": rng.choice(("prefix", "none")),
    }
    return DreamConfig(**options), blockbatch.DecodeConfig(**options, policy="dream_published")


def assert_decode_equals_the_oracle(rng):
    model, (oracle_config, config) = scripted(rng), settings(rng)
    prompt = [rng.randrange(20) for _ in range(rng.randint(1, 40))]
    expected = decode(model, prompt, oracle_config)
    result = generate(EngineScripted(model, page_size=rng.choice((4, 16))), prompt, config)
    assert_equal(result, expected, oracle_config)


def test_scripted_decodes_equal_the_oracle():
    rng = random.Random(4)
    for _ in range(40):
        assert_decode_equals_the_oracle(rng)


def test_a_batch_gives_what_each_prompt_gives_alone():
    rng = random.Random(8)
    for eos_exit in ("prefix", "none"):
        engine = EngineScripted(scripted(rng))
        config = blockbatch.DecodeConfig(
            gen_length=32, refresh_interval=8, eos_exit=eos_exit, policy="dream_published"
        )
        prompts = [[rng.randrange(20) for _ in range(length)] for length in (3, 40, 17, 1)]
        for prompt, result in zip(prompts, generate(engine, prompts, config)):
            alone = generate(engine, prompt, config)
            assert (result.canvas, result.nfe, result.branches) == (alone.canvas, alone.nfe, alone.branches)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "dual_cache"}, "policy: not an option of dual_cache"),
        ({"policy": "dream"}, "policy: expected one of llada_published, dream_published, published, got"),
        ({"eos_exit": "window"}, "eos_exit: expected prefix or none with policy=.dream_published., got"),
        ({"merge_threshold": 0.6}, "merge_threshold: expected 0.5 with policy=.dream_published., got 0.6"),
        ({"tail_threshold": 1.0}, "tail_threshold: expected None with policy"),
        ({"query_span": "open"}, "query_span: expected 'window' with policy"),
        ({"refresh_scope": "generation"}, "refresh_scope: expected 'canvas' with policy"),
        ({"commit": "local_leap"}, "commit: expected 'threshold' with policy"),
    ],
)
def test_settings_that_the_rule_does_not_have(change, message):
    with pytest.raises(ValueError, match=message):
        blockbatch.DecodeConfig(**{"policy": "dream_published", **change})


def test_other_models_are_refused():
    config = blockbatch.DecodeConfig(policy="dream_published", gen_length=32)
    for decode_it in (generate, blockbatch.generation.open_session):
        with pytest.raises(ValueError, match="policy: expected llada_published for a model .*llada.*, got"):
            decode_it(EngineScripted(ScriptedModel(1)), [1, 2], config)


def test_operators_refuse_what_the_rule_does_not_have():
    phase, config, state, forwards = random_case(5)
    params = dream_bridge.params_of(config, state, EOS)
    tensors = dream_bridge.to_tensors(state, params)
    plan, predictions = dream_bridge.step_inputs(state, forwards, phase)
    for change, message in (
        (dict(eos_exit="window"), "eos_exit: expected prefix or none with policy"),
        (dict(leap_radius=2), "leap_radius: expected 0 with policy"),
        (dict(merge_threshold=0.75), "merge_threshold: expected 0.5 with policy"),
        (dict(query_span="open"), "query_span: expected 'window' with policy"),
        (dict(policy="other"), "policy: expected one of llada_published, dream_published, got 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            bbk.decode_policy(tensors, predictions, plan, dataclasses.replace(params, **change))
    with pytest.raises(ValueError, match="predictions.likely_token: expected a tensor with policy"):
        bbk.decode_policy(tensors, predictions._replace(likely_token=None), plan, params)
    tensors.map_token, tensors.map_probability = tensors.map_token[..., :0], tensors.map_probability[..., :0]
    with pytest.raises(ValueError, match="state.map_token: expected entries with policy"):
        bbk.decode_policy(tensors, predictions, plan, params)


def test_entries_of_the_map_are_enough():
    """Every step gives a MASK that stays one a new token of one half, and a second one on a tie."""
    for sizes, gen_length in (((2, 4, 8), 16), ((8,), 16), ((4, 6), 12)):
        config = DreamConfig(gen_length=gen_length, block_sizes=sizes, threshold=1.0, sync_threshold=None)
        state = policy.new_state([1], config, 15, ())
        params = dream_bridge.params_of(config, state, ())
        entries = bbk.map_entries(sizes, gen_length)
        tensors = bbk.BranchState.create(
            *(torch.tensor(x, dtype=torch.int32) for x in ([[1]], [1], sizes)), gen_length, 15, entries
        )
        plan, most = bbk.initial_plan(tensors, params), 0
        for step in range(3 * gen_length):
            if not int(plan.flags[0]):
                break
            size = tensors.tokens.numel()
            place = torch.arange(size) % gen_length
            # The last MASK of a window is the surest, so that the first one stays as long as can be.
            likely = torch.tensor([[1000 + 2 * step, 1001 + 2 * step, -1, -1]], dtype=torch.int32)
            predictions = bbk.Predictions(
                torch.arange(size),
                torch.zeros(size, dtype=torch.int32),
                place / (2.0 * gen_length),
                None,
                likely.expand(size, 4).contiguous(),
                torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(size, 4).contiguous(),
            )
            plan, _ = bbk.decode_policy(tensors, predictions, plan, params)
            used = (tensors.map_probability > 0).sum(-1)
            most = max(most, int(used.masked_fill(tensors.tokens != 15, 0).max()))
        assert not int(plan.flags[0]) and most <= entries and most == 2 * (max(sizes) - 1)
