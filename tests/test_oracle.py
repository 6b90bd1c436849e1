"""The oracle itself: against published decodes, and on scripted models."""

import json
from pathlib import Path

import pytest
import torch

from hand_made_states import config_of, make_state
from oracle import OracleConfig, ScriptedModel, decode, policy
from oracle.decoders import block_queries
from oracle.states import random_case
from plain_models import PlainModel

DATA = Path(__file__).parent / "data" / "conformance"
RECORDS = json.loads((DATA / "trajectories.json").read_text())


@pytest.fixture(scope="module")
def conformance_model():
    return PlainModel(DATA)


@pytest.mark.parametrize("record", RECORDS, ids=[f"{i}-{r['method']}" for i, r in enumerate(RECORDS)])
def test_conformance(conformance_model, record):
    settings = {name: record[name] for name in OracleConfig.__dataclass_fields__ if name in record}
    result = decode(conformance_model, record["prompt"], OracleConfig(**settings))
    assert result.canvas == record["canvas"]
    if record["method"] != "blockbatch":
        assert result.nfe == record["nfe"]
        return
    assert (result.nfe_init, result.nfe_block, result.nfe_refresh) == (
        record["nfe_init"], record["nfe_block"], record["nfe_refresh"],
    )  # fmt: skip
    assert result.winner_block_size == record["winner_block_size"]
    assert {str(b["block_size"]): b["merged"] for b in result.branches} == record["merged"]


def scripted_decodes(eos_exit, seeds=range(12), **options):
    for seed in seeds:
        model = ScriptedModel(seed, peak=(0.0, 7.0), agreement=0.9, eos_rate=0.01, **options)
        config = OracleConfig(
            gen_length=64, block_sizes=(4, 16, 64), eos_exit=eos_exit, sync_threshold=4, refresh_interval=16
        )
        yield model, decode(model, [1, 2, 3, 4, 5], config)


@pytest.mark.parametrize("eos_exit", ["prefix", "window", "none"])
@pytest.mark.parametrize("offset", [0, 1])
def test_scripted_decodes_meet_every_event(eos_exit, offset):
    merged = synced = refreshes = 0
    reasons = set()
    for model, result in scripted_decodes(eos_exit, prediction_offset=offset, suppress_mask=offset == 1):
        assert model.mask_token_id not in result.tokens
        if eos_exit == "none":
            assert model.mask_token_id not in result.canvas
        assert not model.eos_token_ids.intersection(result.tokens)
        merged += sum(b["merged"] for b in result.branches)
        synced += sum(b["synced"] for b in result.branches)
        refreshes += result.nfe_refresh
        reasons.add(result.stop_reason)
    assert merged > 50 and synced > 20 and refreshes > 10
    assert reasons == ({"length"} if eos_exit == "none" else {"length", "eos"})


def test_scripted_logits_depend_on_the_whole_cache():
    model = ScriptedModel(3, agreement=0.0)
    row = model.new_row(6)
    before = model.forward([1, 2, 3, 4, 5, 6], range(6), row)
    assert torch.equal(model.forward([2, 3], [1, 2], row), before[1:3])
    after = model.forward([7], [5], row)
    assert not torch.equal(after, before[5:])
    assert not torch.equal(model.forward([2, 3], [1, 2], row), before[1:3])


def test_queries_of_a_block_denoise():
    def queries(method, offset):
        config = config_of(method=method, gen_length=8, block_sizes=(4,), block_size=4)
        state = make_state(config, [[1, 2, 3, 4] + [9] * 4], window=[(6, 10)])
        model = ScriptedModel(prediction_offset=offset)
        return list(block_queries(model, state, config, state["branches"][0]))

    assert queries("blockbatch", 0) == queries("dual_cache", 0) == [6, 7, 8, 9]
    assert queries("blockbatch", 1) == queries("local_leap", 1) == [5, 6, 7, 8]
    assert queries("prefix_cache", 0) == [6, 7, 8, 9] and queries("prefix_cache", 1) == [5, 6, 7, 8, 9]
    assert queries("vanilla", 1) == list(range(10))


@pytest.mark.parametrize("method", ["vanilla", "prefix_cache", "dual_cache"])
def test_baselines_without_threshold_need_steps_forwards(method):
    config = OracleConfig(method=method, gen_length=64, block_size=16, steps=32, threshold=None)
    result = decode(ScriptedModel(1, eos_rate=0.0), [1, 2, 3], config)
    assert result.nfe == 32
    if method != "vanilla":
        assert (result.nfe_init, result.nfe_block, result.nfe_refresh) == (1, 28, 3)


def test_local_leap_needs_fewer_forwards_than_dual_cache():
    def nfe(method):
        config = OracleConfig(method=method, gen_length=64)
        return sum(decode(ScriptedModel(s, agreement=1.0), [1, 2, 3], config).nfe for s in range(8))

    assert nfe("local_leap") < nfe("dual_cache")


def test_a_model_that_only_predicts_mask_is_reported():
    with pytest.raises(RuntimeError, match="MASK"):
        decode(ScriptedModel(mask_rate=1.0), [1], OracleConfig(gen_length=8, block_sizes=(4, 8)))


def test_random_states_meet_every_event():
    events = dict.fromkeys(
        ("merged", "synced", "refresh_due", "eos", "length", "init", "block", "refresh"), 0
    )
    for seed in range(600):
        phase, config, state, forwards = random_case(seed)
        getattr(policy, f"{phase}_phase")(state, config, forwards)
        events[phase] += 1
        events["merged"] += sum(b["merged"] for b in state["branches"])
        events["synced"] += sum(b["synced"] for b in state["branches"])
        events["refresh_due"] += state["refresh_due"]
        if state["stop_reason"]:
            events[state["stop_reason"]] += 1
            continue
        for branch in state["branches"]:
            assert not (branch["done"] and policy.masks_that_count(state, config, branch)), seed
            stuck = not branch["done"] and not policy.window_masks(state, config, branch)
            assert phase == "refresh" or not stuck, seed
    assert min(events.values()) > 5, events
